"""Secrets that the service makes for itself and keeps."""

from __future__ import annotations

import secrets
from pathlib import Path

from exportd_server.platform.files import Directory

KEY_BYTES = 32


def kept_key(directory: Path, name: str) -> bytes:
    """A random key in a file that only its owner may read, made when it is missing; one
    process at a time. Blocks. Raises `OSError`, and `ValueError` for a file that is no
    such key or that others may read."""
    path = directory / name
    with Directory.at(directory) as folder:
        if not folder.has(name):
            folder.replace(name, secrets.token_bytes(KEY_BYTES))
        with folder.open(name) as file:
            key = file.read_at(0, KEY_BYTES + 1)
        if len(key) != KEY_BYTES:
            raise ValueError(f"{path} is no key; delete it, and a new one is made")
        if path.stat(follow_symlinks=False).st_mode & 0o077:
            raise ValueError(
                f"{path} may be read by others; delete it, and a new one is made"
            )
    return key
