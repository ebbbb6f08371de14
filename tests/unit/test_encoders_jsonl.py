"""JSON Lines: every field in every record, and nothing that JSON has not."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from exportd_server.encoders.base import Compression, Format, OutputFormat
from exportd_server.errors import ValueNotEncodable
from tests.support.tables import HARD_TEXTS, encode, query


def lines_of(columns: dict[str, Any]) -> list[str]:
    batch = pa.record_batch(columns)
    text = encode(OutputFormat(Format.JSONL), batch.schema, [batch]).data.decode()
    return text.split("\n")[:-1]


def test_a_record_carries_every_field_missing_ones_included() -> None:
    nested = pa.struct([("x", pa.int64()), ("y", pa.list_(pa.string()))])
    lines = lines_of(
        {
            "i": pa.array([1, None]),
            "t": pa.array([None, ""], pa.string()),
            "n": pa.array([{"x": None, "y": ["a", None]}, None], nested),
        }
    )
    assert lines == [
        '{"i":1,"t":null,"n":{"x":null,"y":["a",null]}}',
        '{"i":null,"t":"","n":null}',
    ]


def test_numbers_are_numbers_and_decimals_are_exact_texts() -> None:
    (line,) = lines_of(
        {
            "big": pa.array([-(2**63)]),
            "bigger": pa.array([2**64 - 1], pa.uint64()),
            "money": pa.array([Decimal("1.10")], pa.decimal128(38, 18)),
            "float": pa.array([0.1]),
            "flag": pa.array([True]),
        }
    )
    assert line == (
        '{"big":-9223372036854775808,"bigger":18446744073709551615,'
        '"money":"1.100000000000000000","float":0.1,"flag":true}'
    )


def test_what_is_no_number_in_json_is_a_text() -> None:
    values = [1.5, float("nan"), float("inf"), float("-inf"), None]
    expected = [1.5, "NaN", "Infinity", "-Infinity", None]
    for kind in (pa.float64(), pa.float32(), pa.float16()):
        lines = lines_of({"a": pa.array(range(5)), "f": pa.array(values, kind)})
        assert [json.loads(line)["f"] for line in lines] == expected
        lines = lines_of({"l": pa.array([values], pa.list_(kind))})
        assert [json.loads(line)["l"] for line in lines] == [expected]


def test_a_record_is_the_same_whether_or_not_its_neighbours_are_finite() -> None:
    plain = {"a": [1, 2], "t": ['"', None], "b": [True, None]}
    calm = lines_of({**plain, "f": pa.array([1e300, 2.0]), "z": [-0.0, 5e-324]})
    wild = lines_of({**plain, "f": pa.array([1e300, float("nan")]), "z": [-0.0, 5e-324]})
    assert calm[0] == wild[0]
    assert list(json.loads(wild[1])) == ["a", "t", "b", "f", "z"]


def test_maps_by_text_are_objects_and_other_maps_are_pairs() -> None:
    by_text = pa.array([[("b", 1), ("a", None)], [], None], pa.map_(pa.string(), pa.int8()))
    by_whole = pa.array([[(2, "x")], [], None], pa.map_(pa.int64(), pa.string()))
    assert lines_of({"t": by_text, "w": by_whole}) == [
        '{"t":{"b":1,"a":null},"w":[{"key":2,"value":"x"}]}',
        '{"t":{},"w":[]}',
        '{"t":null,"w":null}',
    ]


@pytest.mark.parametrize("form", [Format.JSONL, Format.CSV])
def test_a_map_with_a_key_twice_is_an_error_with_its_column(form: Format) -> None:
    kind = pa.map_(pa.string(), pa.int64())
    same = pa.record_batch({"m": pa.array([[("k", 1)], [("k", 2)]], kind)})
    encode(OutputFormat(form), same.schema, [same])
    twice = pa.record_batch({"m": pa.array([[("k", 1), ("k", 2)]], kind)})
    with pytest.raises(ValueNotEncodable) as caught:
        encode(OutputFormat(form), twice.schema, [twice])
    assert caught.value.metadata == {"column": "m"}


def test_names_are_escaped_everywhere() -> None:
    names = ['quo"te', "back\\slash", "line\nend", "é\u2028", ""]
    odd = {name: pa.array([float("nan")]) for name in names}
    even = {f"{name}.": pa.array([1]) for name in names}
    inner = pa.array([dict.fromkeys(names, 1.5)])
    (line,) = lines_of({**odd, **even, "inner": inner})
    assert list(json.loads(line)) == [*odd, *even, "inner"]
    assert list(json.loads(line)["inner"]) == names


def test_no_text_breaks_a_line_or_another_reader(tmp_path: Path) -> None:
    texts = [*HARD_TEXTS, "\x00", "\x85", "\u2028"]
    path = tmp_path / "texts.jsonl"
    batch = pa.record_batch({"i": range(len(texts)), "t": texts})
    path.write_bytes(encode(OutputFormat(Format.JSONL), batch.schema, [batch]).data)
    raw = path.read_bytes()
    assert raw.count(b"\n") == len(texts)
    assert [json.loads(line)["t"] for line in raw.split(b"\n")[:-1]] == texts
    assert pl.read_ndjson(path)["t"].to_list() == texts
    by_duckdb = query(
        f"SELECT t FROM read_json('{path}', format='newline_delimited', "
        "columns={i: 'BIGINT', t: 'VARCHAR'}) ORDER BY i"
    )
    assert [row[0] for row in by_duckdb] == texts


@pytest.mark.parametrize("compression", list(Compression))
def test_duckdb_and_polars_read_the_types_back(
    compression: Compression, tmp_path: Path
) -> None:
    table = pa.table(
        {
            "whole": pa.array([2**63 - 1, None, -(2**63)]),
            "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
            "number": pa.array([0.1, None, -1.7976931348623157e308]),
            "money": pa.array([Decimal("1e-18"), None, Decimal(1)], pa.decimal128(38, 18)),
            "when": pa.array([1, None, -1], pa.timestamp("us", "UTC")),
            "list": pa.array([[1, None], None, []], pa.list_(pa.int64())),
        }
    )
    output = OutputFormat(Format.JSONL, compression)
    path = tmp_path / f"typed.{output.extension}"
    path.write_bytes(encode(output, table.schema, table.to_batches()).data)
    found = query(
        'SELECT whole, unsigned, number, money, epoch_us("when"), list FROM '
        f"read_json('{path}', format='newline_delimited', columns={{whole: 'BIGINT', "
        "unsigned: 'UBIGINT', number: 'DOUBLE', money: 'DECIMAL(38,18)', "
        "\"when\": 'TIMESTAMP', list: 'BIGINT[]'})"
    )
    columns = [
        c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in table.columns
    ]
    assert found == list(zip(*(c.to_pylist() for c in columns), strict=True))
    frame = pl.read_ndjson(path, schema_overrides={"unsigned": pl.UInt64})
    for name in ("whole", "unsigned", "number", "list"):
        assert frame[name].to_list() == table[name].to_pylist(), name
