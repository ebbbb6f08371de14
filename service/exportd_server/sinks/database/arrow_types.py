"""Types in Arrow's notation, as an export tells them of its columns."""

from __future__ import annotations

import re

_WRAPPED = re.compile(r"dictionary<values=|run_end_encoded<run_ends: \w+, values: ")
_KINDS = (
    (r"bool", "BOOLEAN"),
    (r"u?int\d+", "INTEGER"),
    (r"halffloat|float|double", "FLOAT"),
    (r"decimal\d+\(.*\)", "DECIMAL"),
    (r"(large_|)string(_view|)", "STRING"),
    (r"(large_|)binary(_view|)|fixed_size_binary\[\d+\]", "BINARY"),
    (r"date\d+\[.*\]", "DATE"),
    (r"time\d+\[.*\]", "TIME"),
    (r"timestamp\[.*\]", "TIMESTAMP"),
    (r"duration\[.*\]", "DURATION"),
)


def plain_type(arrow: str) -> str:
    """The type of the values inside of dictionaries and runs, in Arrow's notation."""
    found = _WRAPPED.match(arrow)
    if found is None:
        return arrow
    inner, depth = arrow[found.end() :], 0
    for position, mark in enumerate(inner):
        if mark in "<([":
            depth += 1
        elif mark in ">)]":
            if not depth:
                return plain_type(inner[:position])
            depth -= 1
        elif mark == "," and not depth:
            return plain_type(inner[:position])
    return plain_type(inner)


def plain_kind(kind: str, arrow: str) -> str:
    """The kind of the values of a `plain_type`: dictionaries and runs have a kind of
    their own, whatever is inside."""
    for pattern, name in _KINDS:
        if re.fullmatch(pattern, arrow):
            return name
    return kind
