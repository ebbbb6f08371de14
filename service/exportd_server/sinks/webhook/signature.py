"""Signatures as the Standard Webhooks specification 1.0.0 has them (symmetric, `v1`)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from datetime import datetime

from exportd_server.encoders.base import Buffer

PREFIX = "whsec_"
LEAST_BYTES = 24
MOST_BYTES = 64
MOST_KEYS = 4


def read_key(text: str) -> bytes:
    """The bytes of a signing key. Raises `ValueError`, which never repeats any of it."""
    problem = (
        f"is no signing key; write {PREFIX} and the base64 of {LEAST_BYTES} to "
        f"{MOST_BYTES} random bytes"
    )
    if not text.startswith(PREFIX):
        raise ValueError(problem)
    try:
        key = base64.b64decode(text[len(PREFIX) :], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(problem) from None
    if not LEAST_BYTES <= len(key) <= MOST_BYTES:
        raise ValueError(problem)
    return key


class Signer:
    """Signs one message with each of the keys. What is signed is
    `ID.TIMESTAMP.PAYLOAD`; the payload is given piece by piece."""

    def __init__(self, keys: Sequence[bytes], message_id: str, moment: datetime) -> None:
        """The id must not have a dot, lest it could be taken for another message's."""
        if not keys or not message_id or "." in message_id:
            raise ValueError("needs a key, and an id without dots")
        self._id = message_id
        self._timestamp = str(int(moment.timestamp()))
        begin = f"{message_id}.{self._timestamp}.".encode()
        self._hmacs = [hmac.new(key, begin, hashlib.sha256) for key in keys]

    def update(self, data: Buffer, /) -> None:
        """Sign more of the payload, too."""
        for mac in self._hmacs:
            mac.update(data)

    def headers(self) -> dict[str, str]:
        """The three headers of the specification, once the whole payload was given."""
        signatures = (base64.b64encode(mac.digest()).decode() for mac in self._hmacs)
        return {
            "webhook-id": self._id,
            "webhook-timestamp": self._timestamp,
            "webhook-signature": " ".join(f"v1,{text}" for text in signatures),
        }
