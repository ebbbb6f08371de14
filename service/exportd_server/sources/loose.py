"""Batches whose values are not known yet to be of their columns' types.

For exports that leave out the rows that cannot be carried: there a value that does not
fit must not end the stream, and what it was is to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from exportd_server.errors import ValueNotEncodable
from exportd_server.sources.batches import fitted, not_fitting


def _as_it_is(array: pa.Array, kind: pa.DataType) -> pa.Array:
    del kind
    return array


def _unheard(count: int) -> None:
    del count


@dataclass(frozen=True, slots=True)
class Shape:
    """How a source's own batches become batches of `schema`, whose columns stand in them
    one after another from the place `first` on.

    `misfits` tells, by name, the place of the text of what could not be read as the
    column's type at all; it is missing where nothing went wrong. `typed` turns a column
    into its type where a cast would not, or raises an error of Arrow's.
    """

    schema: pa.Schema
    first: int = 0
    misfits: Mapping[str, int] = field(default_factory=dict)
    check_text: bool = False
    typed: Callable[[pa.Array, pa.DataType], pa.Array] = _as_it_is


class LooseBatch:
    """Rows as the source gave them."""

    def __init__(self, raw: pa.RecordBatch, shape: Shape) -> None:
        self._raw = raw
        self._shape = shape

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return int(self._raw.num_rows)

    @property
    def nbytes(self) -> int:
        """Their size in memory."""
        return int(self._raw.nbytes)

    def slice(self, offset: int, length: int | None = None) -> LooseBatch:
        """Some rows in a run, uncopied."""
        return LooseBatch(self._raw.slice(offset, length), self._shape)

    def take(self, rows: Sequence[int]) -> LooseBatch:
        """Some rows, copied: nothing of the others is left, not even inside of lists,
        where the values of a slice's neighbours would be looked at too."""
        taken = self._raw.take(pa.array(rows, pa.int64()))
        return LooseBatch(taken, self._shape)

    def fit(self) -> pa.RecordBatch:
        """The rows under the declared schema; raises `ValueNotEncodable`."""
        shape = self._shape
        columns = []
        for index, each in enumerate(shape.schema):
            if self._told(each.name):
                raise not_fitting(each.name)
            column = self._raw.column(shape.first + index)
            columns.append(self._fitted(column, each))
        return pa.RecordBatch.from_arrays(columns, schema=shape.schema)

    def misfits(
        self, heard: Callable[[int], None] = _unheard
    ) -> dict[int, ValueNotEncodable]:
        """The rows that `fit` would raise for, each with its error. `heard` is told again
        and again how many were found, and ends the search by raising."""
        found: dict[int, ValueNotEncodable] = {}
        for index, each in enumerate(self._shape.schema):
            for row in self._told(each.name):
                found.setdefault(row, not_fitting(each.name))
            heard(len(found))
            column = self._raw.column(self._shape.first + index)
            for row, error in self._search(column, each, 0):
                found.setdefault(row, error)
                heard(len(found))
        return found

    def values(self, row: int) -> dict[str, pa.Scalar]:
        """What is known of one row's values, as they came."""
        shown = {}
        for index, each in enumerate(self._shape.schema):
            value = self._raw.column(self._shape.first + index)[row]
            place = self._shape.misfits.get(each.name)
            if place is not None and self._raw.column(place)[row].is_valid:
                value = self._raw.column(place)[row]
            shown[each.name] = value
        return shown

    def _told(self, name: str) -> list[int]:
        """The rows whose value of a column the source itself could not read."""
        place = self._shape.misfits.get(name)
        if place is None:
            return []
        rows: list[int] = pc.indices_nonzero(self._raw.column(place).is_valid()).to_pylist()
        return rows

    def _fitted(self, array: pa.Array, declared: pa.Field) -> pa.Array:
        try:
            array = self._shape.typed(array, declared.type)
        except pa.ArrowException as error:
            raise not_fitting(declared.name) from error
        return fitted(array, declared, check_text=self._shape.check_text)

    def _search(
        self, array: pa.Array, declared: pa.Field, first: int
    ) -> Iterator[tuple[int, ValueNotEncodable]]:
        """The rows whose value in a column, which begins at row `first`, is not of the
        declared type."""
        try:
            self._fitted(array, declared)
        except ValueNotEncodable as error:
            if not len(array):
                # No row at all: the column is at fault, and the stream is not as declared.
                raise
            if len(array) == 1:
                yield first, error
                return
        else:
            return
        half = len(array) // 2
        yield from self._search(array.slice(0, half), declared, first)
        yield from self._search(array.slice(half), declared, first + half)
