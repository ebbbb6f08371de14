"""When deliveries are tried again."""

from __future__ import annotations

from datetime import timedelta

from exportd_server.delivery.retry import pause
from exportd_server.sinks.base import RetryPolicy, SinkDefaults

TRIES = 200


def seconds(
    policy: RetryPolicy, attempt: int, asked: timedelta | None = None
) -> list[float]:
    found = [pause(policy, attempt, asked) for _ in range(TRIES)]
    return [each.total_seconds() for each in found if each is not None]


def test_pauses_double_from_the_base_to_the_cap_and_are_spread() -> None:
    policy = RetryPolicy(max_attempts=20, base=0.1, cap=5.0)
    for attempt, ceiling in ((1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2), (7, 5.0), (19, 5.0)):
        found = seconds(policy, attempt)
        assert ceiling / 2 <= min(found) < max(found) <= ceiling
        assert max(found) - min(found) > ceiling / 4, "what failed together comes apart"


def test_no_attempt_is_too_many_for_the_arithmetic() -> None:
    policy = RetryPolicy(max_attempts=10**9, base=0.1, cap=5.0)
    assert all(2.5 <= each <= 5.0 for each in seconds(policy, 10**8))


def test_after_the_last_attempt_there_is_no_other() -> None:
    policy = RetryPolicy(max_attempts=3)
    assert pause(policy, 2) is not None
    assert pause(policy, 3) is None
    assert pause(policy, 4) is None
    assert pause(RetryPolicy(max_attempts=1), 1, timedelta(seconds=1)) is None


def test_a_schedule_is_followed_and_its_last_pause_repeated() -> None:
    policy = RetryPolicy(max_attempts=100, schedule=(5.0, 300.0, 7200.0))
    for attempt, least in ((1, 5.0), (2, 300.0), (3, 7200.0), (50, 7200.0)):
        found = seconds(policy, attempt)
        assert least <= min(found) < max(found) <= least * 1.1


def test_a_receiver_is_never_asked_before_the_moment_it_named() -> None:
    asked = timedelta(seconds=60)
    assert min(seconds(RetryPolicy(), 1, asked)) >= 60
    longer = RetryPolicy(max_attempts=9, schedule=(3600.0,))
    assert min(seconds(longer, 1, asked)) >= 3600


def test_fast_sinks_are_tried_again_three_times_within_seconds() -> None:
    defaults = SinkDefaults()
    assert (defaults.retry.max_attempts, defaults.retry.base) == (4, 0.1)
    assert defaults.retry.cap == 5.0
