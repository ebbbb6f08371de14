"""Channels that downloads leave to the next one."""

from __future__ import annotations

from contextlib import ExitStack

import grpc
import pytest

from exportd._connection import Channels, Connection


@pytest.fixture
def channels() -> Channels:
    return Channels(Connection("localhost:1"))


def lent(channels: Channels) -> grpc.Channel:
    with channels.lend() as channel:
        return channel


def is_closed(channel: grpc.Channel) -> bool:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/none/None")
    try:
        call(b"", timeout=0)
    except ValueError:
        return True
    except grpc.RpcError:
        return False
    raise AssertionError("nobody listens there")


def test_a_channel_has_one_user_at_a_time_and_is_left_to_the_next(
    channels: Channels,
) -> None:
    with channels.lend() as first, channels.lend() as second:
        assert first is not second
    assert {lent(channels), lent(channels)} < {first, second}
    assert not is_closed(first)


def test_no_more_are_kept_than_a_few(channels: Channels) -> None:
    with ExitStack() as stack:
        found = [stack.enter_context(channels.lend()) for _ in range(Channels.KEPT + 3)]
    assert sum(map(is_closed, found)) == 3


def test_one_that_failed_its_user_is_closed(channels: Channels) -> None:
    with pytest.raises(KeyError), channels.lend() as channel:
        raise KeyError
    assert is_closed(channel)
    assert lent(channels) is not channel


def test_closing_closes_those_that_are_kept_at_once_and_the_others_when_they_are_left(
    channels: Channels,
) -> None:
    with channels.lend() as used:
        kept = lent(channels)
        channels.close()
        assert is_closed(kept)
        assert not is_closed(used)
    assert is_closed(used)
    assert is_closed(lent(channels))
