"""Columns of any Arrow type as JSON text, whole columns at a time.

Polars writes JSON fast and right, but for what JSON itself lacks (NaN and infinity,
which it turns into null) and for maps. Those are pieced together here from the texts of
their parts; everything else goes through Polars in one call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from exportd_server.encoders.values import (
    is_list,
    is_text,
    join,
    list_offsets,
    map_entries,
    polars_frame,
    simple,
    string_array,
    unwrapped,
)
from exportd_server.platform.lazy import LazyModule

if TYPE_CHECKING:
    import polars as pl
else:
    pl = LazyModule("polars")

_NULL = "null"


def json_text(array: pa.Array) -> pa.Array:
    """Each value as JSON text without line ends; a missing value as `null`."""
    array = simple(array)
    kind = array.type
    if written_by_polars(array):
        return _members(["v"], [array], strip='"v":')
    if pat.is_floating(kind):
        return _float(array)
    if pat.is_map(kind):
        return _map(array)
    if pat.is_struct(kind):
        names = [field.name for field in kind]
        parts = list(map(Member, names, array.flatten()))
        text = join("{", members(parts), "}") if parts else "{}"
        return pc.if_else(array.is_valid(), text, _NULL)
    return _in_list(array, json_text(array.flatten()), "[", "]")


class Member:
    """A column as a member of one JSON object a row."""

    def __init__(self, name: str, array: pa.Array) -> None:
        self.name = name
        self.array = simple(array)
        self.by_polars = written_by_polars(self.array)
        if not self.by_polars:
            self.array = join(key(name), json_text(self.array))


def members(parts: Sequence[Member]) -> pa.Array:
    """The members of one JSON object a row, without its braces; at least one."""
    pieces = []
    for by_polars, run in groupby(parts, key=lambda part: part.by_polars):
        if by_polars:
            together = list(run)
            pieces.append(
                _members([part.name for part in together], [p.array for p in together])
            )
        else:
            pieces.extend(part.array for part in run)
    return pc.binary_join_element_wise(*pieces, ",")


def key(name: str) -> str:
    """A member's name and the colon after it."""
    return json.dumps(name, ensure_ascii=False) + ":"


def written_by_polars(array: pa.Array) -> bool:
    """Whether Polars writes every value of a `simple` array losslessly."""
    return _known(array.type) and _finite(array)


def _known(kind: pa.DataType) -> bool:
    if pat.is_list(kind) or pat.is_large_list(kind):
        # The other layouts are unknown to Polars, or misread when they are sliced.
        return _known(kind.value_type)
    if pat.is_struct(kind):
        return kind.num_fields > 0 and all(_known(field.type) for field in kind)
    return bool(
        pat.is_boolean(kind)
        or pat.is_integer(kind)
        or pat.is_floating(kind)
        or is_text(kind)
        or pat.is_null(kind)
        or (pat.is_decimal128(kind) and kind.scale >= 0)
    )


def _finite(array: pa.Array) -> bool:
    kind = array.type
    if pat.is_floating(kind):
        if pat.is_float16(kind):
            array = array.cast(pa.float32())
        return pc.all(pc.is_finite(array)).as_py() is not False
    if is_list(kind):
        return _finite(array.flatten()) if _has_floats(kind) else True
    if pat.is_struct(kind):
        return all(map(_finite, array.flatten())) if _has_floats(kind) else True
    return True


def _has_floats(kind: pa.DataType) -> bool:
    if is_list(kind):
        return _has_floats(kind.value_type)
    if pat.is_struct(kind):
        return any(_has_floats(field.type) for field in kind)
    return bool(pat.is_floating(kind))


def _members(
    names: Sequence[str], arrays: Sequence[pa.Array], *, strip: str = ""
) -> pa.Array:
    frame = polars_frame(names, arrays)
    text = pl.struct(pl.all()).struct.json_encode()
    text = text.str.strip_prefix("{" + strip).str.strip_suffix("}")
    return string_array(frame.select(text).to_series())


def _float(array: pa.Array) -> pa.Array:
    """JSON has no such numbers: they become the texts that the JSON mapping of protobuf
    and most other tools use."""
    if pat.is_float16(array.type):
        array = array.cast(pa.float32())
    finite = pc.is_finite(array)
    number = json_text(pc.if_else(finite, array, pa.scalar(None, array.type)))
    infinity = pc.if_else(pc.less(array, 0), '"-Infinity"', '"Infinity"')
    word = pc.if_else(pc.is_nan(array), '"NaN"', infinity)
    return pc.if_else(pc.fill_null(finite, fill_value=True), number, word)


def _map(array: pa.Array) -> pa.Array:
    kind = array.type
    entries = map_entries(array)
    keys, values = entries.flatten().flatten()
    if not is_text(unwrapped(kind.key_type)):
        return json_text(entries)
    keys = json_text(keys)
    rows = pl.Series(pc.list_parent_indices(entries))
    if pl.DataFrame({"row": rows, "key": pl.Series(keys)}).is_duplicated().any():
        raise pa.ArrowInvalid("a map has a key twice")
    return _in_list(entries, join(keys, ":", json_text(values)), "{", "}")


def _in_list(array: pa.Array, texts: pa.Array, opening: str, closing: str) -> pa.Array:
    """The texts of all the items, in order, as one text for each list."""
    joined = pc.binary_join(pa.ListArray.from_arrays(list_offsets(array), texts), ",")
    return pc.if_else(array.is_valid(), join(opening, joined, closing), _NULL)
