"""CSV: quoting, markers, delimiters, spreadsheets and the readers in use."""

from __future__ import annotations

import csv
import io
import string
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pytest

from exportd_server.encoders.base import (
    Compression,
    CsvDialect,
    CsvOptions,
    Format,
    OutputFormat,
)
from tests.support.tables import HARD_TEXTS, csv_cells, decompress, encode


def csv_of(columns: dict[str, Any], **options: Any) -> str:
    batch = pa.record_batch(columns)
    output = OutputFormat(Format.CSV, csv=CsvOptions(**options))
    return encode(output, batch.schema, [batch]).data.decode()


def rows_of(text: str, **options: Any) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), **options))


def test_only_fields_that_need_quotes_have_them() -> None:
    text = csv_of({"a": ["x y", "a,b", 'say "hi"', "two\nlines", "c\rr", "", None]})
    assert text == ('a\nx y\n"a,b"\n"say ""hi"""\n"two\nlines"\n"c\rr"\n""\n\\N\n')


def test_a_missing_value_and_an_empty_text_differ() -> None:
    columns = {"i": pa.array([1, 2]), "t": pa.array([None, ""], pa.string())}
    assert csv_of(columns) == 'i,t\n1,\n2,""\n'


@pytest.mark.parametrize("marker", ["NULL", "\\N", "NA", "0", "-1", "true", "nan", "x"])
def test_a_value_that_reads_like_the_marker_is_quoted(marker: str) -> None:
    columns = {
        "t": pa.array([marker, None, "", "other"]),
        "i": pa.array([0, -1, None, 1]),
        "b": pa.array([True, None, False, True]),
        "n": pa.array([["0"], None, [], ["1"]], pa.list_(pa.string())),
    }
    lines = csv_of(columns, null_marker=marker).split("\n")
    first, second, third = (next(csv.reader([line])) for line in lines[1:4])
    assert lines[1].startswith(f'"{marker}",')
    assert first == [marker, "0", "true", '["0"]']
    assert second == [marker, "-1", marker, marker]
    assert third == ["", marker, "false", "[]"]
    # Unquoted, the marker means a missing value and nothing else.
    unquoted = [cell for line in lines[1:5] for cell in line.split(",")]
    assert unquoted.count(marker) == 4


def test_duckdb_tells_marker_and_text_apart(tmp_path: Path) -> None:
    columns = {"t": pa.array(["NULL", None, ""]), "i": pa.array([1, None, 3])}
    data = csv_of(columns, null_marker="NULL").encode()
    cells = csv_cells(data, tmp_path / "x.csv", null="NULL")
    assert cells == [("NULL", "1"), (None, None), ("", "3")]


@pytest.mark.parametrize("delimiter", sorted(set(string.printable) - set('"\r\n')))
def test_every_delimiter_keeps_the_cells_apart(delimiter: str) -> None:
    texts = [text or "" for text in HARD_TEXTS]
    columns = {
        f"head{delimiter}er": texts,
        "int": pa.array([-(10**9)] * len(texts)),
        "float": pa.array([-1.5e-300] * len(texts)),
        "nan": pa.array([float("nan"), float("-inf"), float("inf")] * 10),
        "flag": pa.array([True, False] * 15),
        "when": pa.array([0] * len(texts), pa.timestamp("us", "UTC")),
        "list": pa.array([[1, None]] * len(texts), pa.list_(pa.int8())),
    }
    found = rows_of(csv_of(columns, delimiter=delimiter), delimiter=delimiter)
    plain = rows_of(csv_of({name.strip(): v for name, v in columns.items()}))
    assert found[0] == list(columns)
    assert [[c.lower() for c in row] for row in found[1:]] == [
        [c.lower() for c in row] for row in plain[1:]
    ]


def test_a_file_without_header_begins_with_its_rows() -> None:
    batch = pa.record_batch({"a": [1]})
    output = OutputFormat(Format.CSV, csv=CsvOptions(header=False))
    part = encode(output, batch.schema, [batch])
    assert (part.data, part.prefix_bytes) == (b"1\n", 0)
    assert encode(output, batch.schema, []).data == b""


def test_names_of_columns_are_quoted_like_text() -> None:
    names = ["a,b", 'c"d', "e\nf", "", "é", "twice", "twice"]
    arrays = [pa.array([1])] * len(names)
    batch = pa.RecordBatch.from_arrays(arrays, names=names)
    data = encode(OutputFormat(Format.CSV), batch.schema, [batch]).data
    assert rows_of(data.decode()) == [names, ["1"] * len(names)]


def test_one_column_never_makes_an_empty_line() -> None:
    for values in ([None, "", "\\N", "x"], [1, None], [None, [1]], [None, None]):
        array = pa.array(values)
        lines = csv_of({"only": array}).split("\n")
        assert lines.pop() == ""
        assert len(lines) == 1 + len(array)
        assert "" not in lines
    assert csv_of({"only": [None, "", "\\N"]}) == 'only\n\\N\n""\n"\\N"\n'
    assert csv_of({"only": [None, "x"]}, null_marker="-") == "only\n-\nx\n"


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", '=HYPERLINK("x")', " =1", "\n@x"]


def test_the_safe_dialect_disarms_text_and_leaves_numbers() -> None:
    huge = pa.array([Decimal("-0.5")] * len(FORMULAS), pa.decimal256(60, 1))
    columns = {
        "=head": FORMULAS,
        "number": pa.array([-1.5] * len(FORMULAS)),
        "whole": pa.array([-1] * len(FORMULAS)),
        "huge": huge,
        "coded": huge.dictionary_encode(),
        "lasting": pa.array([-1] * len(FORMULAS), pa.duration("s")),
        "bytes": pa.array([b"\xf8"] * len(FORMULAS)),
    }
    safe = rows_of(csv_of(columns, dialect=CsvDialect.SPREADSHEET_SAFE))
    assert safe[0] == ["'=head", *list(columns)[1:]]
    assert [row[0] for row in safe[1:]] == [f"'{text}" for text in FORMULAS]
    assert safe[1][1:] == ["-1.5", "-1", "-0.5", "-0.5", "'-PT1.000000S", "'+A=="]
    raw = rows_of(csv_of(columns))
    assert [row[0] for row in raw[1:]] == FORMULAS


def test_the_safe_dialect_changes_no_harmless_text() -> None:
    texts = ["a=1", " 1=", "'x", "", None, "0", "ok\n=1", "[-1]"]
    columns = {"t": texts, "i": pa.array(range(len(texts)))}
    assert csv_of(columns, dialect=CsvDialect.SPREADSHEET_SAFE) == csv_of(columns)


def typed() -> pa.Table:
    return pa.table(
        {
            "whole": pa.array([2**63 - 1, None, -(2**63)]),
            "number": pa.array([0.1, float("inf"), None]),
            "flag": pa.array([True, None, False]),
            "text": pa.array(['quote " and\nline', None, ""]),
            "when": pa.array([1, None, -1], pa.timestamp("us", "UTC")),
            "naive": pa.array([1, None, -1], pa.timestamp("us")),
            "day": pa.array([0, None, 20_000], pa.date32()),
            "clock": pa.array([0, None, 86_399_999_999], pa.time64("us")),
        }
    )


@pytest.fixture(params=list(Compression))
def typed_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    output = OutputFormat(Format.CSV, request.param)
    table = typed()
    path = tmp_path / f"typed.{output.extension}"
    path.write_bytes(encode(output, table.schema, table.to_batches()).data)
    return path


def test_duckdb_reads_the_types_back(typed_file: Path) -> None:
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        database.execute(
            "CREATE TABLE t (whole BIGINT, number DOUBLE, flag BOOLEAN, text VARCHAR, "
            '"when" TIMESTAMPTZ, naive TIMESTAMP, day DATE, clock TIME)'
        )
        database.execute(f"COPY t FROM '{typed_file}' (HEADER, ALLOW_QUOTED_NULLS false)")
        found = database.sql(
            'SELECT * REPLACE (epoch_us("when") AS "when", epoch_us(naive) AS naive, '
            "epoch_us(day) // 86400000000 AS day) FROM t"
        ).fetchall()
    columns = [
        column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
        for column in typed().columns
    ]
    columns[6] = columns[6].cast(pa.int32())
    expected = list(zip(*(column.to_pylist() for column in columns), strict=True))
    assert found == expected


def test_polars_reads_the_types_back(typed_file: Path) -> None:
    frame = pl.read_csv(typed_file, try_parse_dates=True)
    expected = pl.DataFrame(typed())
    for name in expected.columns:
        assert frame[name].to_list() == expected[name].to_list(), name


def test_pandas_and_pyarrow_read_the_numbers_and_texts_back(typed_file: Path) -> None:
    # Pandas reads zstd by a library of its own alone.
    data = typed_file.read_bytes()
    zstd = typed_file.suffix == ".zst"
    frame = pd.read_csv(
        io.BytesIO(decompress(data, Compression.ZSTD)) if zstd else typed_file,
        dtype={"whole": "Int64"},
        keep_default_na=False,
        na_values={"whole": "", "number": ""},
    )
    assert frame["whole"].isna().tolist() == [False, True, False]
    assert frame["whole"].dropna().tolist() == [2**63 - 1, -(2**63)]
    assert frame["number"].dropna().tolist() == [0.1, float("inf")]
    assert frame["text"].tolist() == ['quote " and\nline', "", ""]
    table = arrow_csv.read_csv(
        typed_file,
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            column_types={"when": pa.timestamp("us", "UTC")},
        ),
    )
    for name in ("whole", "number", "flag", "text", "when", "day"):
        assert table[name].to_pylist() == typed()[name].to_pylist(), name
