"""Keeps the rows of a batch that can be written apart from those that cannot.

The usual batch costs one attempt. Only one that fails is searched: first column by
column for values that are not of their type, then by halves for what the format refuses.
"""

from __future__ import annotations

import base64
import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from exportd_server.encoders.values import is_bytes, is_text
from exportd_server.errors import ValueNotEncodable
from exportd_server.sources.loose import LooseBatch

VALUE_BYTES = 1024
"""Most bytes of one value that are told."""

ROW_BYTES = 32_768
"""Once the values of a row have so many bytes, no more of them are told."""

Stage = Callable[[pa.RecordBatch], Callable[[], None]]
"""An encoder's `stage`."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be written, by its place in the batch, and why."""

    row: int
    error: ValueNotEncodable


@dataclass(frozen=True, slots=True)
class Sifted:
    """A batch taken apart: `write` writes its `rows` good ones."""

    write: Callable[[], None]
    rows: int
    refused: tuple[Refused, ...]


def sift(batch: LooseBatch, stage: Stage, found: Callable[[int], None]) -> Sifted:
    """Take a batch apart; nothing is written yet.

    `found` hears again and again how many rows were refused so far, and ends the search
    by raising. Raises `ValueNotEncodable` when it is no row's fault.
    """

    def attempt(rows: LooseBatch) -> Callable[[], None]:
        return stage(rows.fit())

    try:
        return Sifted(attempt(batch), batch.num_rows, ())
    except ValueNotEncodable:
        # A column of the wrong type fails without any row.
        attempt(batch.take([]))
    errors = batch.misfits(found)
    left = [row for row in range(batch.num_rows) if row not in errors]
    for row, error in _search(batch, left, attempt):
        errors[row] = error
        found(len(errors))
    good = [row for row in left if row not in errors]
    return Sifted(
        attempt(batch.take(good)),
        len(good),
        tuple(Refused(row, errors[row]) for row in sorted(errors)),
    )


def _search(
    batch: LooseBatch, rows: list[int], attempt: Callable[[LooseBatch], object]
) -> Iterator[tuple[int, ValueNotEncodable]]:
    """Those of some rows that cannot be written, in order."""
    if not rows:
        return
    try:
        attempt(batch.take(rows))
    except ValueNotEncodable as error:
        if len(rows) == 1:
            yield rows[0], error
            return
    else:
        return
    half = len(rows) // 2
    yield from _search(batch, rows[:half], attempt)
    yield from _search(batch, rows[half:], attempt)


def line(batch: LooseBatch, refused: Refused, shard: int, ordinal: int) -> bytes:
    """A refused row as one line of JSON; docs/formats.md tells its members. `ordinal` is
    its place in the shard."""
    error = refused.error
    values, base64_, truncated = _values(batch.values(refused.row))
    record = {
        "shard": shard,
        "row": ordinal,
        "column": error.metadata.get("column"),
        "reason": error.reason.value,
        "message": error.message,
        "values": values,
        "base64": base64_,
        "truncated": truncated,
    }
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _values(row: dict[str, pa.Scalar]) -> tuple[dict[str, str | None], list[str], bool]:
    """The texts of a row's values, which of them are base64, and whether anything was
    cut short or left out."""
    texts: dict[str, str | None] = {}
    encoded: list[str] = []
    truncated = False
    room = ROW_BYTES
    for name, scalar in row.items():
        if room <= 0:
            return texts, encoded, True
        texts[name] = None
        if scalar.is_valid:
            data, is_text = _bytes(scalar)
            cut = data[:VALUE_BYTES]
            truncated = truncated or len(cut) < len(data)
            text = _decoded(cut, final=len(cut) == len(data)) if is_text else None
            if text is None:
                text = base64.b64encode(cut).decode("ascii")
                encoded.append(name)
            texts[name] = text
            room -= len(cut)
        room -= len(name)
    return texts, encoded, truncated


def _decoded(data: bytes, *, final: bool) -> str | None:
    """Text, unless it is none; a character that was cut in two at the end is no mistake
    of the value's."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=final)
    except UnicodeDecodeError:
        return None


def _bytes(scalar: pa.Scalar) -> tuple[bytes, bool]:
    """A value in bytes, no more of a long one than shows that it is longer than is told;
    and whether they ought to be text."""
    kind = scalar.type
    if is_text(kind) or is_bytes(kind):
        buffer = scalar.as_buffer()
        length = min(buffer.size, VALUE_BYTES + 1)
        return buffer.slice(0, length).to_pybytes(), is_text(kind)
    try:
        value = scalar.as_py()
        if isinstance(value, list | dict):
            value = json.dumps(value, default=str, ensure_ascii=False)
        return str(value).encode(), True
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        # No calendar has it, or it is not UTF-8 inside: what is in memory, then.
        return str(getattr(scalar, "value", kind)).encode(), True
