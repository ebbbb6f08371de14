"""Conditions, times and durations as people type them: `amount>=1.5`, `24h`."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation

from exportd._model import Column, Dataset
from exportd._request import Filter, Operator, Scalar
from exportd.errors import InvalidRequest

_CONDITION = re.compile(
    r"""\s*(?P<column>[^\s=!<>~^]+)\s*
    (?P<operator>(?<=\s)(?:is\s+not\s+null|is\s+null|not\s+in|in)(?=\s|\(|$)|!=|<=|>=|\^=|=|<|>|~)
    \s*(?P<value>.*)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_WORDS: dict[str, Operator] = {
    "~": "contains",
    "^=": "starts with",
    "=": "=",
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
    operator = _WORDS[" ".join(match["operator"].lower().split())]
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
        items = next(csv.reader([value[1:-1]], skipinitialspace=True), [])
        return Filter(column.name, operator, [_value(column, i.strip()) for i in items])
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
    return timedelta(seconds=sum(int(n) * _UNITS[u] for n, u in pieces))


def _column(name: str, dataset: Dataset) -> Column:
    found = next((c for c in dataset.columns if c.name == name), None)
    if found is None:
        known = ", ".join(c.name for c in dataset.columns if c.operators)
        raise InvalidRequest.of(
            "--where", f"{dataset.name} has no column {name!r}; there are {known}"
        )
    return found


def _value(column: Column, text: str) -> Scalar:
    quoted = len(text) >= 2 and text[0] == text[-1] == '"'
    if quoted:
        text = text[1:-1].replace('""', '"')
    read, looks = _KINDS.get(column.kind, (str, "text"))
    try:
        return read(text)
    except (ValueError, InvalidOperation):
        raise InvalidRequest.of(
            "--where", f"{column.name} ({column.type}) takes a {looks}, not {text!r}"
        ) from None


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
    """Stays text: a datetime would lose nanoseconds."""
    if datetime.fromisoformat(text).utcoffset() is None:
        raise ValueError
    return text


_KINDS: Mapping[str, tuple[Callable[[str], Scalar], str]] = {
    "BOOLEAN": (_boolean, "true or false"),
    "INTEGER": (int, "whole number"),
    "FLOAT": (float, "number"),
    "DECIMAL": (Decimal, "decimal number"),
    "BINARY": (_bytes, "hexadecimal value such as 0xc0ffee"),
    "DATE": (date.fromisoformat, "date such as 2026-01-31"),
    "TIME": (_time_of_day, "time of day such as 13:45:00"),
    "TIMESTAMP": (_moment, "time with an offset such as 2026-01-31T12:00:00Z"),
}
"""How a value of each kind is read, and what it looks like. Others are text."""
