"""Columns of which callers see something else than their values.

`null` and `last4` are SQL, so that the values themselves never leave the source. `hash`
is a keyed one, made of each batch as soon as it has been read: no statement carries the
key, because databases log statements and show them to others.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
from sqlglot import exp

from exportd_server.sources import query as sql
from exportd_server.sources.base import ColumnKind
from exportd_server.sources.query import Dialect, Field

MASKED_KINDS = (ColumnKind.STRING, ColumnKind.INTEGER)
"""Kinds of columns that `hash` and `last4` take: those whose text is the same whatever
holds them."""

_SHOWN = 4
_LONG_ENOUGH = 8
_AT_ONCE = 512
"""Values hashed before other threads get their turn. Without that, the event loop would
come 5 ms late each time; it costs no CPU that could be measured."""

_BLOCK = 64
"""Bytes that SHA-256 takes at a time: what HMAC pads its key to (RFC 2104)."""

_TOLD = "(masked)"
"""What is told of a masked value that could not be read."""


class Mask(enum.StrEnum):
    """What becomes of a value. A missing one stays missing."""

    NULL = "null"
    HASH = "hash"
    LAST4 = "last4"


class Masks:
    """The masks of a source, by column, and the key of its hashes."""

    def __init__(self, kinds: Mapping[str, Mask] | None = None, key: str = "") -> None:
        self._kinds = dict(kinds or {})
        self._hash = _Hmac(key.encode())
        self._key = key

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    @property
    def stamp(self) -> str:
        """Differs where values would be masked otherwise, by another key too, of which
        it tells nothing. Empty without masks."""
        if not self._kinds:
            return ""
        kinds = " ".join(f"{name}={kind}" for name, kind in sorted(self._kinds.items()))
        return hmac.digest(self._key.encode(), f"masks: {kinds}".encode(), "sha256").hex()

    def over(self, dialect: Dialect, fields: Mapping[str, Field]) -> dict[str, Field]:
        """The fields as they are read under the masks."""
        return {
            name: _masked(dialect, field, self._kinds[name])
            if name in self._kinds
            else field
            for name, field in fields.items()
        }

    def hashed(self, names: Sequence[str], arrays: Sequence[pa.Array]) -> list[pa.Array]:
        """The columns of these names, hashed where that is their mask."""
        return [
            self._hash(array) if self._kinds.get(name) is Mask.HASH else array
            for name, array in zip(names, arrays, strict=True)
        ]

    def hashed_batch(
        self, batch: pa.RecordBatch, names: Sequence[str], first: int = 0
    ) -> pa.RecordBatch:
        """A batch with columns of these names from the place `first` on, and others."""
        if Mask.HASH not in map(self._kinds.get, names):
            return batch
        last = first + len(names)
        columns = [
            *batch.columns[:first],
            *self.hashed(names, batch.columns[first:last]),
            *batch.columns[last:],
        ]
        return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _masked(dialect: Dialect, field: Field, mask: Mask) -> Field:
    column = replace(field.column, masked=True)
    if mask is Mask.NULL:
        # Keeps the value's type, and no engine looks at what cannot come to pass.
        nothing = exp.Case().when(exp.false(), field.value.copy())
        return field.masked(replace(column, nullable=True), nothing)

    def shown(value: exp.Expr) -> exp.Expr:
        if field.column.kind is ColumnKind.INTEGER:
            value = sql.cast(value.copy(), "TEXT")
        return value.copy() if mask is Mask.HASH else _last4(dialect, value)

    loose = misfit = None
    if field.loose is not None:
        loose = shown(field.loose)
    if field.misfit is not None:
        there = exp.Not(this=exp.Is(this=exp.paren(field.misfit), expression=exp.Null()))
        misfit = exp.Case().when(there, exp.Literal.string(_TOLD))
    column = replace(column, type=pa.string())
    return field.masked(column, shown(field.value), loose=loose, misfit=misfit)


def _last4(dialect: Dialect, text: exp.Expr) -> exp.Expr:
    length = sql.function("length", text.copy())
    hidden = exp.Sub(this=length.copy(), expression=exp.Literal.number(_SHOWN))
    start = exp.Sub(this=length.copy(), expression=exp.Literal.number(_SHOWN - 1))
    short = exp.LT(this=length.copy(), expression=exp.Literal.number(_LONG_ENOUGH))
    tail = sql.function("substr", text.copy(), start)
    return (
        exp.Case()
        .when(short, dialect.stars(length))
        .else_(exp.DPipe(this=dialect.stars(hidden), expression=tail, safe=True))
    )


class _Hmac:
    """HMAC-SHA256 of texts, in lower-case hexadecimal."""

    def __init__(self, key: bytes) -> None:
        if len(key) > _BLOCK:
            key = hashlib.sha256(key).digest()
        key = key.ljust(_BLOCK, b"\0")
        # Begun once: a copy of it costs half of what `hmac` takes for each value.
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in key))

    def __call__(self, texts: pa.Array) -> pa.Array:
        # What is no UTF-8 has bytes all the same. Each value is hashed once.
        distinct = texts.cast(pa.binary()).dictionary_encode()
        hashes = pa.array(self._each(distinct.dictionary), pa.string())
        return hashes.take(distinct.indices)

    def _each(self, values: pa.Array) -> Iterator[str]:
        begin, finish = self._inner.copy, self._outer.copy
        for start in range(0, len(values), _AT_ONCE):
            for value in values.slice(start, _AT_ONCE).to_pylist():
                inner = begin()
                inner.update(value)
                outer = finish()
                outer.update(inner.digest())
                yield outer.hexdigest()
            time.sleep(0)
