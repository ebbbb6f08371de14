"""The tokens in the service's own download URLs: what may be downloaded, and until when,
signed so that nobody else can make one."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

LEAST_KEY_BYTES = 32
"""HMAC-SHA256 wants keys of the size of its output (RFC 2104)."""

_CONTEXT = b"exportd download url v1\0"
"""Signed along, so that a key used for something else gives no tokens."""
_FIELDS = struct.Struct(">BQQi16s")
_VERSION = 1
_SIGNATURE_BYTES = 32
_JOINED = -1
_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Link:
    """What one URL gives: one part, or with None all of them joined, of one generation of
    a job's output."""

    tenant: str
    job_id: str
    generation: int
    part: int | None
    expire_time: datetime


class BadLink(Exception):
    """The token was not signed by any of the keys, or is none at all."""


class LinkKeys:
    """Signs with the first key and accepts all of them, so that keys can be changed: put
    a new one in front, and take the old one out once its URLs have expired."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Raises `ValueError` without keys, or with one that is too short."""
        if not keys or any(len(key) < LEAST_KEY_BYTES for key in keys):
            raise ValueError(f"needs keys of at least {LEAST_KEY_BYTES} bytes")
        self._keys = tuple(keys)

    def sign(self, link: Link) -> str:
        """The token of a link: letters, digits, `-` and `_`."""
        fields = _FIELDS.pack(
            _VERSION,
            (link.expire_time - _EPOCH) // _MICROSECOND,
            link.generation,
            _JOINED if link.part is None else link.part,
            UUID(link.job_id).bytes,
        )
        content = fields + link.tenant.encode()
        return _text(content + _signature(self._keys[0], content))

    def read(self, token: str) -> Link:
        """The link of a token, expired or not. Raises `BadLink`."""
        try:
            data = base64.b64decode(token + "=" * (-len(token) % 4), b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise BadLink from None
        content, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
        # All keys are tried whatever the first ones say, and compared in constant time.
        matches = [
            hmac.compare_digest(signature, _signature(key, content)) for key in self._keys
        ]
        # Base64 has spare bits at the end; only one spelling is the token.
        if not any(matches) or _text(data) != token:
            raise BadLink
        # It is our own from here on.
        version, micros, generation, part, job = _FIELDS.unpack_from(content)
        if version != _VERSION:
            raise BadLink
        return Link(
            tenant=content[_FIELDS.size :].decode(),
            job_id=str(UUID(bytes=job)),
            generation=generation,
            part=None if part == _JOINED else part,
            expire_time=_EPOCH + micros * _MICROSECOND,
        )


def _signature(key: bytes, content: bytes) -> bytes:
    return hmac.new(key, _CONTEXT + content, hashlib.sha256).digest()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
