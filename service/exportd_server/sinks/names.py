"""Paths that callers name: below a directory, or below a prefix of a bucket."""

from __future__ import annotations

import re

from exportd_server.sinks.base import BadSinkRequest

MOST_NAMES = 16
MOST_BYTES = 512
"""S3 takes 1024 bytes in a key, and the operator's prefix and the file's name go in,
too."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def path_names(field: str, path: str) -> tuple[str, ...]:
    """The names of a path, which are joined by single slashes; none for an empty one.

    A name begins with a letter or a digit, so that none is `.` or `..`, hidden, or taken
    for an option by a command. Raises `BadSinkRequest`.
    """
    if not path:
        return ()
    names = tuple(path.split("/"))
    if any(not _NAME.match(name) for name in names):
        raise BadSinkRequest(
            field,
            "is no path that can be used; join names by single slashes, without one at "
            "the start or the end, each of at most 128 letters, digits, dots, underscores "
            "and hyphens, beginning with a letter or digit",
        )
    if len(names) > MOST_NAMES or len(path) > MOST_BYTES:
        raise BadSinkRequest(
            field,
            f"is too long; use at most {MOST_NAMES} names and {MOST_BYTES} characters",
        )
    return names
