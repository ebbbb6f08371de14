"""What is exported: files that stay the same, and a table that never does.

Every state of the table that somebody may see has a number, which stands in the table
itself, and the mutator knows each state's contents by a hash. So an export is not only
checked for what any state obeys (the sum of all accounts, and that they come in pairs):
it must be the very state whose number it carries.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from exportd.v1 import dataset_pb2, job_pb2
from tests.torture.history import History

LAKE = "lake"
BANK = "bank"
LAKE_ROWS = 40_000
BANK_ROWS = 24_000
SHARD_ROWS = 8_000
"""Makes five shards of the files and three of the table."""

_GROUP_ROWS = 4_000
_FILES = 2
_SCHEMAS = {
    LAKE: pa.schema(
        [
            ("id", pa.int64()),
            ("account", pa.string()),
            ("cents", pa.int64()),
            ("note", pa.string()),
        ]
    ),
    BANK: pa.schema(
        [
            ("id", pa.int64()),
            ("pair", pa.int64()),
            ("cents", pa.int64()),
            ("filler", pa.string()),
        ]
    ),
}
_NOTES = ("", None, "plain", 'quo"te', "com,ma", "new\nline", "ünï→", " edge ", "null")
_FILLER = "x" * 90


def write_lake(directory: Path, chosen: random.Random) -> pa.Table:
    """Write the files; returns their rows."""
    directory.mkdir(parents=True)
    table = pa.table(
        {
            "id": range(LAKE_ROWS),
            "account": [f"0x{chosen.getrandbits(160):040x}" for _ in range(LAKE_ROWS)],
            "cents": [chosen.randrange(-(2**62), 2**62) for _ in range(LAKE_ROWS)],
            "note": [chosen.choice(_NOTES) for _ in range(LAKE_ROWS)],
        },
        schema=_SCHEMAS[LAKE],
    )
    size = LAKE_ROWS // _FILES
    for number in range(_FILES):
        piece = table.slice(number * size, size)
        path = directory / f"{number}.parquet"
        pq.write_table(piece, path, row_group_size=_GROUP_ROWS)
    return table


def write_catalogue(directory: Path, bank_url: str) -> Path:
    """Write the catalogue of both datasets; returns its path."""
    path = directory / "datasets.toml"
    path.write_text(
        f'[connections.main]\nurl = "{bank_url}"\n'
        f'[datasets.{LAKE}]\nparquet = "lake/*.parquet"\n'
        f'[datasets.{BANK}]\nconnection = "main"\ntable = "accounts"\n'
    )
    return path


def rows_of(request: job_pb2.CreateExportRequest, files: list[bytes]) -> pa.Table:
    """Read an output back, each file of it by itself."""
    schema = _SCHEMAS[request.dataset]
    return pa.concat_tables(_table(request, schema, data) for data in files)


def _table(
    request: job_pb2.CreateExportRequest, schema: pa.Schema, data: bytes
) -> pa.Table:
    codec = {job_pb2.COMPRESSION_GZIP: "gzip", job_pb2.COMPRESSION_ZSTD: "zstd"}
    compression = codec.get(request.compression)
    if compression:
        data = pa.input_stream(pa.py_buffer(data), compression=compression).read()
    stream = pa.BufferReader(data)
    match request.format:
        case dataset_pb2.FORMAT_CSV:
            return pa.csv.read_csv(
                stream,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    column_types=schema,
                    null_values=[""],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
        case dataset_pb2.FORMAT_JSONL:
            return pa.json.read_json(
                stream,
                read_options=pa.json.ReadOptions(block_size=16 * 2**20),
                parse_options=pa.json.ParseOptions(explicit_schema=schema),
            )
        case dataset_pb2.FORMAT_PARQUET:
            return pq.read_table(stream).cast(schema)
        case _:
            return pa.ipc.open_stream(stream).read_all().cast(schema)


def lake_fault(expected: pa.Table, found: pa.Table) -> str | None:
    """What is wrong with an export of the files; None when nothing is."""
    if found.equals(expected):
        return None
    numbers = Counter(found["id"].to_pylist())
    missing = [number for number in range(LAKE_ROWS) if number not in numbers]
    twice = [number for number, count in numbers.items() if count > 1]
    if missing or twice or len(found) != len(expected):
        return (
            f"{len(found)} rows, {len(missing)} missing from {missing[:3]}, "
            f"{len(twice)} more than once from {sorted(twice)[:3]}"
        )
    if found.sort_by("id").equals(expected):
        return "the rows are not in the order of the files"
    return "rows with other values than the files have"


class Bank:
    """The table, and the one who changes it all the time."""

    def __init__(self, url: str, history: History, seed: int) -> None:
        self.url = url
        self._history = history
        self._random = random.Random(f"bank {seed}")
        self._rows = {
            number: ((number + 1) // 2, self._random.randrange(1_000_000))
            for number in range(1, BANK_ROWS + 1)
        }
        self._next = BANK_ROWS + 1
        self._changes: dict[int, tuple[int, int] | None] = {}
        self._hash = sum(hash((n, *row)) for n, row in self._rows.items())
        self.total = sum(cents for _, cents in self._rows.values())
        self.version = 0
        self.states = {0: (self._hash, len(self._rows))}

    async def create(self) -> None:
        """Make the table."""
        async with await psycopg.AsyncConnection.connect(
            self.url, autocommit=True
        ) as connection:
            await connection.execute(
                "CREATE TABLE accounts (id bigint PRIMARY KEY, pair bigint NOT NULL, "
                "cents bigint NOT NULL, filler text NOT NULL)"
            )
            async with (
                connection.cursor() as cursor,
                cursor.copy("COPY accounts FROM STDIN") as copy,
            ):
                await copy.write_row((0, 0, 0, _FILLER))
                for number, (pair, cents) in self._rows.items():
                    await copy.write_row((number, pair, cents, _FILLER))
            await connection.execute("ANALYZE accounts")

    async def mutate(self) -> None:
        """Change it until cancelled, whatever happens to the server."""
        while True:
            with suppress(psycopg.Error, OSError):
                async with await psycopg.AsyncConnection.connect(
                    self.url, autocommit=True, connect_timeout=5
                ) as connection:
                    await self._catch_up(connection)
                    while True:
                        await self._change(connection)
                        await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)

    async def _catch_up(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Find out whether the change that was under way has happened."""
        # Waits for whoever is at it still.
        cursor = await connection.execute(
            "SELECT cents FROM accounts WHERE id = 0 FOR UPDATE"
        )
        found = await cursor.fetchone()
        assert found is not None
        if found[0] == self.version + 1:
            self.apply()
        elif found[0] != self.version:
            self._history.violation(
                "the table lost a change", found=found[0], version=self.version
            )

    async def _change(self, connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute("; ".join(["BEGIN", *self.prepare(), "COMMIT"]))
        self.apply()

    def prepare(self) -> list[str]:
        """Choose the next change and note the state it leads to; returns its
        statements."""
        self._changes = self._choose()
        version = self.version + 1
        self.states[version] = self._hash_after(self._changes)
        statements = [f"UPDATE accounts SET cents = {version} WHERE id = 0"]
        for number, row in self._changes.items():
            if row is None:
                statements.append(f"DELETE FROM accounts WHERE id = {number}")
            elif number in self._rows:
                statements.append(
                    f"UPDATE accounts SET cents = {row[1]} WHERE id = {number}"
                )
            else:
                statements.append(
                    f"INSERT INTO accounts VALUES ({number}, {row[0]}, {row[1]}, "
                    f"'{_FILLER}')"
                )
        return statements

    def _choose(self) -> dict[int, tuple[int, int] | None]:
        """New values of some rows; None: the row goes."""
        chosen = self._random
        first, second, third = chosen.sample(list(self._rows), 3)
        amount = chosen.randrange(1, 1_000_000)
        kind = chosen.randrange(10)
        if kind < 8:
            return {first: self._plus(first, -amount), second: self._plus(second, amount)}
        if kind == 8:
            pair = self._next
            return {self._next: (pair, amount), self._next + 1: (pair, -amount)}
        pair = self._rows[first][0]
        gone = [n for n, row in self._rows.items() if row[0] == pair]
        if third in gone:
            return {first: self._rows[first]}
        rest = sum(self._rows[number][1] for number in gone)
        return {**dict.fromkeys(gone), third: self._plus(third, rest)}

    def _plus(self, number: int, amount: int) -> tuple[int, int]:
        pair, cents = self._rows[number]
        return pair, cents + amount

    def _hash_after(self, changes: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
        value, count = self._hash, len(self._rows)
        for number, row in changes.items():
            before = self._rows.get(number)
            if before is not None:
                value -= hash((number, *before))
                count -= 1
            if row is not None:
                value += hash((number, *row))
                count += 1
        return value, count

    def apply(self) -> None:
        """What was prepared has happened."""
        self._hash, _ = self.states[self.version + 1]
        for number, row in self._changes.items():
            if row is None:
                del self._rows[number]
            else:
                self._rows[number] = row
                self._next = max(self._next, number + 1)
        self.version += 1

    def table(self) -> pa.Table:
        """What an export of the state as it is now holds."""
        rows = [(0, 0, self.version), *((n, *row) for n, row in self._rows.items())]
        numbers, pairs, cents = zip(*rows, strict=True)
        return pa.table(
            [list(numbers), list(pairs), list(cents), [_FILLER] * len(rows)],
            schema=_SCHEMAS[BANK],
        )

    def fault(self, found: pa.Table) -> str | None:
        """What is wrong with an export of the table; None when it is one state of it."""
        numbers, pairs, cents = (
            found[name].to_pylist() for name in ("id", "pair", "cents")
        )
        rows = list(zip(numbers, pairs, cents, strict=True))
        versions = [row[2] for row in rows if row[0] == 0]
        rows = [row for row in rows if row[0] != 0]
        wrong = []
        if len(set(numbers)) != len(numbers):
            wrong.append(f"{len(numbers) - len(set(numbers))} rows more than once")
        single = sum(count != 2 for count in Counter(row[1] for row in rows).values())
        if single:
            wrong.append(f"{single} broken pairs")
        total = sum(row[2] for row in rows)
        if total != self.total:
            wrong.append(f"the sum is {total} and must be {self.total}")
        if len(versions) != 1:
            wrong.append(f"{len(versions)} numbers of its state")
        else:
            value = sum(hash(row) for row in rows)
            if self.states.get(versions[0]) != (value, len(rows)):
                wrong.append(f"not the state {versions[0]} that it says it is")
        return "; ".join(wrong) or None
