"""What comes from a browser: query strings and forms."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl

from aiohttp import web

from exportd_server.errors import ErrorReason, ExportdError, InvalidRequest

MOST_FORM = 8192
"""Bytes of a form: the longest token that fits a cookie, and a few short fields."""
_FORM_SECONDS = 10.0
_MOST_FIELDS = 20
_MOST_TEXT = 1000
_FORM = "application/x-www-form-urlencoded"
_PLACE = re.compile(r"(\d{1,16})-([0-9a-f-]{36})", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


async def read_form(request: web.Request) -> Mapping[str, str]:
    """The fields of a form, the last of each name. Raises `InvalidRequest`."""
    if request.content_type != _FORM:
        raise InvalidRequest.of("form", f"must be sent as {_FORM}")
    try:
        async with asyncio.timeout(_FORM_SECONDS):
            body = await request.read()
        fields = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, max_num_fields=_MOST_FIELDS
        )
    except TimeoutError:
        raise InvalidRequest.of("form", "did not come in time") from None
    except web.HTTPRequestEntityTooLarge:
        raise InvalidRequest.of("form", f"has more than {MOST_FORM} bytes") from None
    except ValueError:
        raise InvalidRequest.of("form", "cannot be read") from None
    return dict(fields)


def text(request: web.Request, name: str) -> str:
    """A text that any ledger can look for; empty when it is not there."""
    value = request.query.get(name, "").strip()
    if "\0" in value or len(value) > _MOST_TEXT:
        raise InvalidRequest.of(
            name, f"must have at most {_MOST_TEXT} characters, and not NUL"
        )
    # Bytes that are no text have become half characters.
    return value.encode("utf-8", "replace").decode()


def whole(request: web.Request, name: str) -> int:
    """A whole number from 0; 0 when it is not there."""
    value = request.query.get(name, "0")
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise InvalidRequest.of(name, "must be a whole number")
    return int(value)


def place(request: web.Request) -> tuple[datetime, str] | None:
    """Where a list goes on: behind this one."""
    value = request.query.get("before", "")
    if not value:
        return None
    match = _PLACE.fullmatch(value)
    if match is None:
        raise ExportdError(ErrorReason.INVALID_PAGE_TOKEN)
    return _EPOCH + int(match[1]) * _MICROSECOND, match[2]


def place_of(moment: datetime, id_: str) -> str:
    """The same as a text."""
    return f"{(moment - _EPOCH) // _MICROSECOND}-{id_}"
