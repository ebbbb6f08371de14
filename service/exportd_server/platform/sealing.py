"""Secrets of callers, encrypted before they are kept."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_PURPOSE = b"exportd: secrets of sinks"


class Unreadable(Exception):
    """What was sealed cannot be opened: its key is not among those that are known."""


class Sealer:
    """Encrypts and authenticates short texts (Fernet: AES-128-CBC and HMAC-SHA256). The
    first key seals, and each of them opens, so that keys can be rotated: put the new one
    first, and drop the old one once nothing is kept under it. A key has at least 32
    random bytes."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys:
            raise ValueError("at least one key")
        self._fernet = MultiFernet([Fernet(_derived(key)) for key in keys])

    def seal(self, text: str) -> str:
        """The text, encrypted: printable ASCII."""
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """The text back. Raises `Unreadable`."""
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise Unreadable("sealed under a key that is not known") from None


def _derived(key: bytes) -> bytes:
    # A key of its own, whatever else the operator uses the same text for.
    derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=_PURPOSE).derive(key)
    return base64.urlsafe_b64encode(derived)
