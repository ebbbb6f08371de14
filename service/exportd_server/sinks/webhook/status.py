"""What a receiver's answer means: delivered, to be tried again, or not."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import retry_after

_TRY_AGAIN = {408: "timed out", 425: "finds it too early", 429: "is asked too often"}
_SECONDS = re.compile(r"[0-9]{1,12}\Z")


def settle(status: int, wait: str | None, now: datetime) -> str:
    """The receipt of a status from 200 to 299. Raises `DeliveryFailed` for others, as the
    Standard Webhooks specification advises; `wait` is the `Retry-After` header."""
    answer = f"the receiver answered HTTP {status}"
    if 200 <= status < 300:
        return f"HTTP {status}"
    if status == 410:
        raise DeliveryFailed(f"{answer}: it wants nothing more", retryable=False, gone=True)
    if status in _TRY_AGAIN or 500 <= status < 600:
        why = f": it {_TRY_AGAIN[status]}" if status in _TRY_AGAIN else ""
        raise DeliveryFailed(
            answer + why, retryable=True, retry_after=read_retry_after(wait, now)
        )
    if 300 <= status < 400:
        raise DeliveryFailed(
            f"{answer}: redirects are not followed; give the address that it leads to",
            retryable=False,
        )
    raise DeliveryFailed(answer, retryable=False)


def read_retry_after(text: str | None, now: datetime) -> timedelta | None:
    """The pause that `Retry-After` asks for, in seconds or as a date (RFC 9110, section
    10.2.3), within bounds; None when it says nothing that can be read."""
    if text is None:
        return None
    text = text.strip()
    if _SECONDS.match(text):
        return retry_after(float(text))
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # "-0000" says that the zone is not known, and HTTP knows no other than UTC.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return retry_after((moment - now).total_seconds())
