"""Secrets of callers, encrypted before they are kept, and what is kept to know a request
again by that has them in it."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_SEALING = b"exportd: secrets of sinks"
_KNOWING = b"exportd: fingerprints of requests"


class Unreadable(Exception):
    """What was sealed cannot be opened: its key is not among those that are known."""


class Sealer:
    """Encrypts and authenticates short texts (Fernet: AES-128-CBC and HMAC-SHA256). The
    first key seals, and each of them opens, so that keys can be rotated: put the new one
    first, and drop the old one once nothing is kept under it. A key has at least 32
    random bytes."""

    def __init__(self, keys: Sequence[bytes], purpose: bytes = _SEALING) -> None:
        """What is sealed for one purpose does not open for another."""
        if not keys:
            raise ValueError("at least one key")
        derived = (base64.urlsafe_b64encode(_derived(key, purpose)) for key in keys)
        self._fernet = MultiFernet([Fernet(key) for key in derived])

    def seal(self, text: str) -> str:
        """The text, encrypted: printable ASCII."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """The text back. Raises `Unreadable`."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise Unreadable("sealed under a key that is not known") from None


class Fingerprints:
    """Tells whether two payloads are the same without keeping them. They are keyed
    (HMAC-SHA256): from a plain hash of a payload whose other parts are known, a short
    secret in it is found by trying. The first key makes those that are kept. Without any
    key, where no secrets are taken, the hash is plain."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = [_derived(key, _KNOWING) for key in keys]

    def of(self, payload: bytes) -> tuple[str, ...]:
        """The payload's fingerprint, and after it those that may be kept of the same
        payload: under the other keys, and plain, from before there were any."""
        keyed = [hmac.digest(key, payload, "sha256").hex() for key in self._keys]
        return (*keyed, hashlib.sha256(payload).hexdigest())


def _derived(key: bytes, purpose: bytes) -> bytes:
    # A key of its own, whatever else the operator uses the same text for.
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose).derive(key)
