"""A table whose rows belong to several tenants, held by every kind of source, and what
each tenant may see of it, worked out without the service."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.holders import to_csv
from tests.support.postgres import PostgresServer

KEY = "0123456789abcdef0123456789abcdef-a test's"
KEY_VARIABLE = "EXPORTD_TEST_MASK_KEY"
KINDS = ("parquet", "csv", "json", "sqlite", "postgres", "postgres_query")

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("owner", pa.string()),
        ("owner_no", pa.int64()),
        ("email", pa.string()),
        ("account", pa.int64()),
        ("phone", pa.string()),
        ("score", pa.float64()),
        ("born", pa.timestamp("us", "UTC")),
        ("secret", pa.string()),
        ("note", pa.string()),
    ]
)
_OWNERS = ("acme", "beta", "ACME", None, "acme ", "7", "", "acme", "acm_")
_NUMBERS = (7, 42, None, 0, -7, 7)
_PHONES = (
    "",
    "1",
    "1234567",
    "12345678",
    "+49 30 1234567",
    "日本語のテキスト",
    "it's \\",
    None,
)
_ACCOUNTS = (0, -1, 1234567, 12345678, -9876543210, 2**63 - 1, None, 7)


def make_rows(count: int = 90) -> list[dict[str, Any]]:
    """The rows, in the order of their ids."""
    return [
        {
            "id": number,
            "owner": _OWNERS[number % len(_OWNERS)],
            "owner_no": _NUMBERS[number % len(_NUMBERS)],
            "email": None if number % 11 == 3 else f"näme{number % 20}@example.com",
            "account": _ACCOUNTS[number % len(_ACCOUNTS)],
            "phone": _PHONES[number * 3 % len(_PHONES)],
            "score": number + 0.25,
            "born": datetime(2001, 2, 3, tzinfo=UTC) + timedelta(days=number),
            "secret": f"secret-{number}",
            # Long, so that a database has blocks to cut.
            "note": f"{number} " * 120,
        }
        for number in range(count)
    ]


ROWS = make_rows()
SHOWN = ("id", "email", "account", "phone", "score", "born", "note")

RIGHTS = """
tenants = ["acme", "beta", "ghost"]
tenant_column = "owner"
hidden = ["owner", "owner_no", "secret"]
mask_key = "${%(variable)s}"
[datasets.rows.mask]
email = "hash"
account = "hash"
phone = "last4"
score = "null"
born = "null"
"""

NUMBERED = """
columns = ["id", "account"]
tenant_column = "owner_no"
[datasets.numbered.mask]
account = "last4"
"""


def settle(path: Path) -> None:
    """Make a file look as if it had been written a while ago."""
    moment = datetime(2021, 1, 1, tzinfo=UTC).timestamp()
    os.utime(path, (moment, moment))


def hashed(value: Any, key: str = KEY) -> str | None:
    """What the mask `hash` makes of a value."""
    if value is None:
        return None
    return hmac.new(key.encode(), str(value).encode(), hashlib.sha256).hexdigest()


def last4(value: Any) -> str | None:
    """What the mask `last4` makes of a value."""
    if value is None:
        return None
    text = str(value)
    return "*" * len(text) if len(text) < 8 else "*" * (len(text) - 4) + text[-4:]


def seen(tenant: str) -> list[dict[str, Any]]:
    """What a tenant is to see of `rows`."""
    return [
        {
            "id": row["id"],
            "email": hashed(row["email"]),
            "account": hashed(row["account"]),
            "phone": last4(row["phone"]),
            "score": None,
            "born": None,
            "note": row["note"],
        }
        for row in ROWS
        if row["owner"] == tenant
    ]


def seen_by_number(number: int) -> list[dict[str, Any]]:
    """What the tenant with that number for a name is to see of `numbered`."""
    return [
        {"id": row["id"], "account": last4(row["account"])}
        for row in ROWS
        if row["owner_no"] == number
    ]


@dataclass(frozen=True)
class Held:
    """One kind of source: what the catalogue says of where the rows are, before and
    within the dataset's table and after it, with `{name}` for the dataset's name."""

    head: str
    origin: str
    types: str

    def catalogue(self, **datasets: str) -> str:
        """A catalogue with these datasets, each with keys of its own."""
        text = self.head
        for name, keys in datasets.items():
            variables = {"variable": KEY_VARIABLE}
            text += f"\n[datasets.{name}]\n{self.origin}\n{keys % variables}\n"
            text += self.types.replace("{name}", name)
        return text


_TYPED = {"born": "timestamp"}
_TEXTS = {
    **_TYPED,
    "owner": "string",
    "owner_no": "int64",
    "email": "string",
    "account": "int64",
    "phone": "string",
    "score": "double",
}


def _types(types: dict[str, str]) -> str:
    return "".join(
        f'[datasets.{{name}}.column.{column}]\ntype = "{kind}"\n'
        for column, kind in types.items()
    )


def hold(
    kind: str, directory: Path, server: PostgresServer | None = None, database: str = ""
) -> Held:
    """Put the rows where a source of that kind finds them."""
    thirds = [ROWS[start : start + 30] for start in range(0, len(ROWS), 30)]
    match kind:
        case "parquet":
            for number, part in enumerate(thirds):
                table = pa.Table.from_pylist(part, SCHEMA)
                pq.write_table(table, directory / f"{number}.parquet", row_group_size=7)
            return Held("", 'parquet = "*.parquet"', "")
        case "csv":
            for number, part in enumerate(thirds):
                text = to_csv(part, tuple(SCHEMA.names), header=True)
                (directory / f"{number}.csv").write_text(text, newline="")
            return Held("", 'csv = "*.csv"', _types(_TEXTS))
        case "json":
            for number, part in enumerate(thirds):
                lines = [json.dumps(row, default=str) + "\n" for row in part]
                (directory / f"{number}.jsonl").write_text("".join(lines))
            return Held("", 'json = "*.jsonl"', _types(_TEXTS))
        case "sqlite":
            _fill_sqlite(directory / "rows.db")
            head = '[connections.lite]\nurl = "sqlite:///rows.db"\n'
            return Held(head, 'connection = "lite"\ntable = "rows"', _types(_TYPED))
    assert server is not None
    body = to_csv(ROWS, tuple(SCHEMA.names), header=False)
    server.sql(
        "CREATE TABLE rows (id bigint, owner varchar(20) NULL, owner_no int, email text,"
        " account bigint NOT NULL DEFAULT 0, phone text, score double precision,"
        " born timestamptz, secret text, note text);\n"
        "ALTER TABLE rows ALTER account DROP NOT NULL;\n"
        f"COPY rows FROM STDIN (FORMAT csv);\n{body}\\.\nANALYZE rows;\n",
        database=database,
    )
    head = f'[connections.pg]\nurl = "{server.url(database)}"\n'
    origin = 'connection = "pg"\ntable = "rows"'
    if kind == "postgres_query":
        origin = (
            'connection = "pg"\nquery = "SELECT * FROM rows WHERE id >= 0"\n'
            'partition_key = "id"'
        )
    return Held(head, origin, "")


def _fill_sqlite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "CREATE TABLE rows (id INTEGER, owner TEXT COLLATE NOCASE, owner_no INTEGER,"
            " email TEXT, account INTEGER, phone TEXT, score REAL, born TIMESTAMP,"
            " secret TEXT, note TEXT)"
        )
        values = [
            [
                value.replace(tzinfo=None).isoformat(" ")
                if isinstance(value, datetime)
                else value
                for value in row.values()
            ]
            for row in ROWS
        ]
        marks = ", ".join("?" * len(SCHEMA))
        database.executemany(f"INSERT INTO rows VALUES ({marks})", values)
        database.commit()
