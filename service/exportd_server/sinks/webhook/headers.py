"""Headers that a caller or an operator may add, so that none of them can change another,
the body's length, or what the signature covers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import SecretStr

MOST_HEADERS = 32
MOST_VALUE_CHARACTERS = 4096
MOST_CHARACTERS = 16_384
"""Names and values together. Receivers refuse more, usually at 8 to 32 KiB."""

# RFC 9110, section 5.6.2 and 5.5; whitespace around a value belongs to no value.
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}\Z")
_VALUE = re.compile(r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?\Z")
_MEDIA_TYPE = re.compile(
    r"[!#$&^_.+0-9A-Za-z-]+/[!#$&^_.+0-9A-Za-z-]+(?:[ \t]*;[\t -~]*)?\Z"
)

_TAKEN = frozenset(
    {
        # One connection's own (RFC 9110, section 7.6.1).
        "connection",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-authentication-info",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        # They say where the body ends, what it is, and whom it is for.
        "content-encoding",
        "content-length",
        "content-range",
        "expect",
        "host",
    }
)
_TAKEN_PREFIXES = ("webhook-", "x-exportd-")


class BadHeader(ValueError):
    """Says which header is wrong, why, and the mend; never repeats a value. `field` is
    the header as a path, or all of them."""

    def __init__(self, name: str | None, description: str) -> None:
        self.field = "headers" if name is None else f"headers[{name!r}]"
        self.description = description
        super().__init__(f"{self.field}: {description}")


def read_headers(headers: Mapping[str, SecretStr]) -> dict[str, str]:
    """Names in lower case, and values. Raises `BadHeader`."""
    if len(headers) > MOST_HEADERS:
        raise BadHeader(None, f"are too many; use at most {MOST_HEADERS}")
    read: dict[str, str] = {}
    for given, secret in headers.items():
        name, value = given.lower(), secret.get_secret_value()
        # A long name is cut: it comes back in the message.
        shown = given[:128]
        if not _TOKEN.match(given):
            raise BadHeader(shown, "is no header name; use letters, digits and hyphens")
        if name in _TAKEN or name.startswith(_TAKEN_PREFIXES):
            raise BadHeader(shown, "is set by HTTP or by exportd; leave it out")
        if name in read:
            raise BadHeader(shown, "is there twice, in upper and lower case")
        if not _VALUE.match(value):
            raise BadHeader(
                shown,
                "has a value with a line break, a control character, whitespace around "
                "it, or a character beyond Latin-1; encode it",
            )
        if len(value) > MOST_VALUE_CHARACTERS:
            raise BadHeader(
                shown,
                f"has a value that is too long; use at most {MOST_VALUE_CHARACTERS} "
                "characters",
            )
        if name == "content-type" and not _MEDIA_TYPE.match(value):
            raise BadHeader(shown, "is no media type; write TYPE/SUBTYPE")
        read[name] = value
    if sum(len(name) + len(value) for name, value in read.items()) > MOST_CHARACTERS:
        raise BadHeader(
            None, f"are too long; use at most {MOST_CHARACTERS} characters in all"
        )
    return read
