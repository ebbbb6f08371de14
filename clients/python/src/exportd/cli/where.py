"""Conditions, times and durations as people type them: `amount>=1.5`, `24h`."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation

from exportd._model import Column, Dataset
from exportd._request import Filter, Operator, Scalar
from exportd.errors import InvalidRequest

_CONDITION = re.compile(
    r"""\s*(?P<column>[^\s=!<>~^]+)\s*
    (?P<operator>(?<=\s)(?:is\s+not\s+null|is\s+null|not\s+in|in)(?=\s|\(|$)|[=!<>~^]+)
    \s*(?P<value>.*)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_WORDS: dict[str, Operator] = {
    "~": "contains",
    "^=": "starts with",
    "=": "=",
    "==": "=",
    "!=": "!=",
    "<": "<",
    "<=": "<=",
    ">": ">",
    ">=": ">=",
    "in": "in",
    "not in": "not in",
    "is null": "is null",
    "is not null": "is not null",
}
_MEANT = {"<>": "!=", "=>": ">=", "=<": "<=", "=~": "~", "~=": "~", "=^": "^="}
"""What somebody who writes an operator of another language has in mind."""

_QUOTED = re.compile(r"""(?:"(?:[^"]|"")*"|'(?:[^']|'')*')""")
_ITEM = re.compile(
    rf"\s*(?P<text>{_QUOTED.pattern}(?=\s*(?:,|\Z))|[^,]*?)\s*(?:,|\Z)", re.DOTALL
)
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d)(:\d\d(?:\.\d+)?)?([Zz]|[+-]\d\d:\d\d)"
)
_INT64 = range(-(2**63), 2**63)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d+)([smhdw])")


def parse_where(text: str, dataset: Dataset) -> Filter:
    """A condition such as `amount>=1.5`, its values typed by the dataset's columns.

    Raises:
        InvalidRequest: It cannot be read, or the value does not fit the column.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise InvalidRequest.of(
            "--where",
            f"cannot read {text!r}; write column, operator, value, for example "
            "'amount>=1.5', 'network in (base, optimism)' or 'memo is null'",
        )
    column = _column(match["column"], dataset)
    operator = _operator(" ".join(match["operator"].lower().split()), text)
    value = match["value"].strip()
    if operator in {"is null", "is not null"}:
        if value:
            raise InvalidRequest.of("--where", f"{operator!r} takes no value: {text!r}")
        return Filter(column.name, operator)
    if operator in {"in", "not in"}:
        if not (value.startswith("(") and value.endswith(")")):
            raise InvalidRequest.of(
                "--where", f"{operator!r} needs values in brackets: {text!r}"
            )
        items = _items(value[1:-1])
        return Filter(column.name, operator, [_value(column, i) for i in items])
    if value.startswith(tuple("=!<>~^")):
        raise InvalidRequest.of(
            "--where", f"{text!r} has two operators; put a value that begins so in quotes"
        )
    return Filter(column.name, operator, _value(column, value))


def parse_moment(option: str, text: str) -> datetime:
    """RFC 3339 with an offset, or a date, which means its midnight in UTC."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        pass
    else:
        return datetime.combine(day, time(), UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest.of(
            option, f"cannot read {text!r}; write 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from None
    if moment.utcoffset() is None:
        raise InvalidRequest.of(
            option, f"{text!r} has no time zone; add Z for UTC, or an offset like +02:00"
        )
    return moment


def parse_duration(option: str, text: str) -> timedelta:
    """`90s`, `15m`, `24h`, `7d`, `2w`, or several in a row: `1d12h`."""
    pieces = _DURATION.findall(text)
    if not pieces or "".join(n + u for n, u in pieces) != text:
        raise InvalidRequest.of(option, f"cannot read {text!r}; write 90s, 24h or 1d12h")
    try:
        return timedelta(seconds=sum(int(n) * _UNITS[u] for n, u in pieces))
    except (OverflowError, ValueError):
        raise InvalidRequest.of(option, f"{text!r} is too long a time") from None


def _column(name: str, dataset: Dataset) -> Column:
    found = next((c for c in dataset.columns if c.name == name), None)
    if found is None:
        known = ", ".join(c.name for c in dataset.columns if c.operators)
        near = difflib.get_close_matches(
            name.lower(), [c.name for c in dataset.columns], n=1
        )
        mend = f"did you mean {near[0]}?" if near else f"there are {known}"
        raise InvalidRequest.of("--where", f"{dataset.name} has no column {name!r}; {mend}")
    return found


def _operator(sign: str, text: str) -> Operator:
    if sign not in _WORDS:
        mend = f"write {_MEANT[sign]}" if sign in _MEANT else f"use {', '.join(_WORDS)}"
        raise InvalidRequest.of(
            "--where",
            f"unknown operator {sign!r} in {text!r}; {mend}, and put a value that begins "
            "with such a sign in quotes",
        )
    return _WORDS[sign]


def _items(text: str) -> Sequence[str]:
    """What stands between the commas; a comma in quotes is part of a value."""
    if not text.strip():
        return []
    items = []
    position = 0
    while match := _ITEM.match(text, position):
        items.append(match["text"])
        position = match.end()
        if not match[0].endswith(","):
            break
    return items


def _unquoted(text: str) -> str:
    """The value without its quotes. An opening quote must close at the value's end: a
    value that keeps half of them would match no row, and nobody would know why."""
    if text.startswith(('"', "'")):
        if not _QUOTED.fullmatch(text):
            raise _unclosed(text)
        return text[1:-1].replace(text[0] * 2, text[0])
    if text.count('"') % 2:
        raise _unclosed(text)
    return text


def _unclosed(text: str) -> InvalidRequest:
    return InvalidRequest.of(
        "--where",
        f"the quotes of {text} are not closed; a value with quotes in it is written "
        '"like ""this"""',
    )


def _value(column: Column, text: str) -> Scalar:
    text = _unquoted(text)
    read, looks = _KINDS.get(column.kind, (str, "text"))
    try:
        value = read(text)
    except (ValueError, InvalidOperation):
        raise InvalidRequest.of(
            "--where", f"{column.name} ({column.type}) takes a {looks}, not {text!r}"
        ) from None
    if column.kind == "INTEGER" and value not in _INT64:
        raise InvalidRequest.of(
            "--where", f"{text} is too large for {column.name} ({column.type})"
        )
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise ValueError
    return text.lower() == "true"


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.lower().removeprefix("0x"))


def _time_of_day(text: str) -> str:
    time.fromisoformat(text)
    return text


def _moment(text: str) -> str:
    """Stays text: a datetime would lose nanoseconds. A date is its midnight in UTC."""
    with contextlib.suppress(ValueError):
        return f"{date.fromisoformat(text).isoformat()}T00:00:00Z"
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError
    day, clock, seconds, offset = match.groups()
    text = f"{day}T{clock}{seconds or ':00'}{offset.upper()}"
    datetime.fromisoformat(text)
    return text


_KINDS: Mapping[str, tuple[Callable[[str], Scalar], str]] = {
    "BOOLEAN": (_boolean, "true or false"),
    "INTEGER": (int, "whole number"),
    "FLOAT": (float, "number"),
    "DECIMAL": (Decimal, "decimal number"),
    "BINARY": (_bytes, "hexadecimal value such as 0xc0ffee"),
    "DATE": (date.fromisoformat, "date such as 2026-01-31"),
    "TIME": (_time_of_day, "time of day such as 13:45:00"),
    "TIMESTAMP": (_moment, "date, or time with an offset such as 2026-01-31T12:00:00Z"),
}
"""How a value of each kind is read, and what it looks like. Others are text."""
