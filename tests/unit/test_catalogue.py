"""The catalogue file: what it says, and what becomes of each mistake in it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exportd_server.errors import ConfigurationError, SourceFailed
from exportd_server.sources.base import FilterOperator, Query, Shard
from exportd_server.sources.catalogue import Catalogue, load_catalogue
from tests.support.postgres import PostgresServer

SECRET = "s3cr3t!"
DATASET = '[datasets.t]\nparquet = "t.parquet"\n'
SQLITE = '[connections.c]\nurl = "sqlite:///t.db"\n[datasets.t]\nconnection = "c"\n'
DEAD = f'[connections.c]\nurl = "postgresql://u:{SECRET}@127.0.0.1:1/x"\n'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    pq.write_table(
        pa.table(
            {
                "id": [1, 2],
                "who": ["a", "b"],
                "amount": pa.array([1, 2], pa.decimal128(10, 2)),
                "at": pa.array([0, 1], pa.timestamp("us", "UTC")),
                "day": pa.array([0, 1], pa.date32()),
            }
        ),
        tmp_path / "t.parquet",
    )
    (tmp_path / "t.csv").write_text("id;who\n1;x\n")
    (tmp_path / "t.jsonl").write_text('{"id": 1}\n')
    with closing(sqlite3.connect(tmp_path / "t.db")) as database:
        database.execute('CREATE TABLE t (id INTEGER, "odd.name" TEXT, at TIMESTAMP)')
        database.execute('CREATE TABLE "my.table" (x INTEGER)')
        database.execute("INSERT INTO t VALUES (1, 'x', '2020-01-01 00:00:00')")
        database.commit()
    return tmp_path


def load(directory: Path, text: str) -> Catalogue:
    path = directory / "datasets.toml"
    path.write_text(text, encoding="utf-8")
    return load_catalogue(path)


def test_datasets_are_found_by_name(directory: Path) -> None:
    catalogue = load(directory, DATASET + '[datasets.a]\ncsv = "t.csv"\n')
    assert catalogue.names() == ["a", "t"]
    assert catalogue.get("none") is None
    dataset = catalogue.get("t")
    assert dataset is not None
    assert [column.name for column in dataset.columns] == [
        "id",
        "who",
        "amount",
        "at",
        "day",
    ]
    assert dataset.exportable
    assert (dataset.target_column, dataset.network_column, dataset.time_column) == (
        None,
    ) * 3
    assert (dataset.max_rows, dataset.max_bytes) == (None, None)
    catalogue.close()


def test_everything_that_can_be_said_of_a_dataset_is_heard(directory: Path) -> None:
    catalogue = load(
        directory,
        DATASET
        + """
description = "All of it"
columns = ["at", "who", "id"]
hidden = ["id"]
target_column = "who"
time_column = "at"
max_rows = 5
max_bytes = 6
[datasets.t.column.at]
description = "When"
type = "timestamp[us]"
[datasets.t.column.who]
filterable = true
""",
    )
    dataset = catalogue.get("t")
    assert dataset is not None
    assert dataset.description == "All of it"
    assert [column.name for column in dataset.columns] == ["at", "who"]
    assert dataset.columns[0].description == "When"
    assert dataset.columns[0].type == pa.timestamp("us")
    assert (dataset.target_column, dataset.time_column) == ("who", "at")
    assert (dataset.max_rows, dataset.max_bytes) == (5, 6)


def test_a_column_may_be_closed_to_filters(directory: Path) -> None:
    catalogue = load(directory, DATASET + "[datasets.t.column.who]\nfilterable = false\n")
    dataset = catalogue.get("t")
    assert dataset is not None
    by_name = {column.name: column for column in dataset.columns}
    assert by_name["who"].operators == ()
    assert FilterOperator.EQUAL in by_name["id"].operators


def test_a_dataset_that_is_not_exportable_is_listed_and_never_looked_at(
    directory: Path,
) -> None:
    catalogue = load(
        directory,
        DEAD + "[datasets.t]\nexportable = false\n"
        'description = "Not yours"\nconnection = "c"\ntable = "t"\n',
    )
    dataset = catalogue.get("t")
    assert dataset is not None
    assert not dataset.exportable
    assert dataset.description == "Not yours"
    assert dataset.columns == dataset.source.columns() == ()
    assert dataset.source.count() is None
    with pytest.raises(SourceFailed):
        dataset.source.plan(Query(("id",)))
    with pytest.raises(SourceFailed):
        dataset.source.open(Query(("id",)), Shard(0))


def test_secrets_come_from_the_environment(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_FILE", "t.db")
    catalogue = load(
        directory,
        '[connections.c]\nurl = "sqlite:///${DB_FILE}"\n'
        '[datasets.t]\nconnection = "c"\ntable = "t"\n',
    )
    assert catalogue.names() == ["t"]


def test_a_path_may_be_absolute(directory: Path) -> None:
    text = f'[connections.c]\nurl = "sqlite:///{directory}/t.db"\n'
    assert load(
        directory, text + '[datasets.t]\nconnection = "c"\ntable = "t"\n'
    ).names() == ["t"]
    assert load(
        directory, f'[datasets.t]\nparquet = "{directory}/*.parquet"\n'
    ).names() == ["t"]


def test_a_table_with_a_dot_in_its_name_is_quoted(directory: Path) -> None:
    dataset = load(directory, SQLITE + "table = '\"my.table\"'\n").get("t")
    assert dataset is not None
    assert [column.name for column in dataset.columns] == ["x"]


def test_a_delimiter_is_heard(directory: Path) -> None:
    dataset = load(directory, '[datasets.t]\ncsv = "t.csv"\ncsv_delimiter = ";"\n').get("t")
    assert dataset is not None
    assert [column.name for column in dataset.columns] == ["id", "who"]


MISTAKES = [
    ("", "datasets: is empty"),
    ("[datasets", "is not TOML: ", "end of document"),
    ('a = 1\n[datasets.t]\nparquet = "x" "y"', "is not TOML: ", "line 3"),
    (
        '[dataset.t]\nparquet = "t.parquet"',
        "dataset: unknown key; did you mean 'datasets'?",
    ),
    (
        '[datasets.t]\nparqet = "t.parquet"',
        "datasets.t.parqet: unknown key; did you mean 'parquet'?",
    ),
    (
        DATASET + "[datasets.t.column.who]\ndescripton = 'x'",
        "datasets.t.column.who.descripton: unknown key; did you mean 'description'?",
    ),
    ('[connections.c]\nurll = "x"', "connections.c.url"),
    ("[connections.c]\n" + DATASET, "connections.c.url: is missing; add it"),
    ('[datasets."Bad Name"]\nparquet = "t.parquet"', "datasets.Bad Name: ", "a-z"),
    ("[datasets.t]\nparquet = 5", "datasets.t.parquet: must be a valid string"),
    ('[datasets.t]\nparquet = ""', "datasets.t.parquet: "),
    (DATASET + "max_rows = 0", "datasets.t.max_rows: ", "greater than or equal to 1"),
    (DATASET + 'max_rows = "5"', "datasets.t.max_rows: must be a valid integer"),
    (DATASET + "exportable = 1", "datasets.t.exportable: must be a valid boolean"),
    ("[datasets.t]", "datasets.t: needs exactly one of parquet, csv, json, table, query"),
    (DATASET + 'csv = "t.csv"', "datasets.t: needs exactly one", "it has parquet and csv"),
    (SQLITE + 'table = "t"\nquery = "SELECT 1"', "it has table and query"),
    ('[datasets.t]\ntable = "t"', "datasets.t: table needs connection"),
    (DATASET + 'connection = "c"', "datasets.t.connection: does not go with parquet"),
    (DATASET + 'csv_delimiter = ";"', "datasets.t.csv_delimiter: goes with csv only"),
    (
        SQLITE.replace('"c"', '"cc"') + 'table = "t"',
        "datasets.t.connection: there is no [connections.cc]; did you mean 'c'?",
    ),
    ('[datasets.t]\nparquet = "*.orc"', "datasets.t.parquet: no file matches ", "*.orc"),
    ('[datasets.t]\nparquet = "t.csv"', "datasets.t: its files cannot be read: "),
    (
        SQLITE.replace("t.db", "none.db") + 'table = "t"',
        "connections.c.url: there is no file",
    ),
    (SQLITE + 'table = "nope"', "datasets.t: connection 'c' cannot read it: "),
    (SQLITE + 'table = "a b"', "datasets.t.table: 'a b' is no table name"),
    (
        SQLITE + 'table = "main.t"',
        "datasets.t.table: 'main.t' is no table name; write NAME",
    ),
    (
        SQLITE + 'query = "SELEC 1"',
        "datasets.t: connection 'c' cannot read it: ",
        "syntax error",
    ),
    (SQLITE + 'query = "SELECT * FROM t; DROP TABLE t"', "datasets.t: connection 'c'"),
    (
        DEAD + '[datasets.t]\nconnection = "c"\ntable = "t"',
        "datasets.t: connection 'c' cannot",
    ),
    (
        '[connections.c]\nurl = "mysql://x"\n' + DATASET,
        "connections.c.url: must begin with",
    ),
    ('[connections.c]\nurl = "sqlite://t.db"\n' + DATASET, "connections.c.url: must begin"),
    (
        '[connections.c]\nurl = "postgresql://u@h:port/x"\n' + DATASET,
        "connections.c.url: is no URL",
    ),
    (
        '[connections.c]\nurl = "postgresql://${NO_SUCH_VARIABLE}"\n' + DATASET,
        "connections.c.url: environment variable NO_SUCH_VARIABLE is not set",
    ),
    (
        '[connections.c]\nurl = "sqlite:///t.db"\nstatement_timeout_seconds = 5\n'
        + DATASET,
        "connections.c.statement_timeout_seconds: applies to postgresql:// only",
    ),
    (
        '[connections.c]\nurl = "postgresql://h"\nstatement_timeout_seconds = 0\n'
        + DATASET,
        "connections.c.statement_timeout_seconds: ",
    ),
    (
        '[connections.c]\nurl = "sqlite:///t.db"\ndriver = "x.so"\n' + DATASET,
        "connections.c.driver: applies to postgresql:// only",
    ),
    (
        '[connections.c]\nurl = "postgresql://h"\ndriver = "x.so"\n' + DATASET,
        "x.so; name the shared library of an ADBC driver for PostgreSQL",
    ),
    (
        DATASET + 'target_column = "whom"',
        "datasets.t.target_column: the dataset shows no column 'whom'; did you mean 'who'?",
    ),
    (DATASET + 'hidden = ["who"]\ntarget_column = "who"', "shows no column 'who'"),
    (DATASET + 'target_column = "amount"', "datasets.t.target_column: 'amount' is decimal"),
    (DATASET + 'network_column = "at"', "must be STRING or INTEGER"),
    (DATASET + 'time_column = "day"', "'day' is date32[day], and must be TIMESTAMP"),
    (
        DATASET + 'target_column = "who"\n[datasets.t.column.who]\nfilterable = false',
        "datasets.t.target_column: 'who' must be filterable",
    ),
    (
        DATASET + 'partition_key = "id"',
        "datasets.t.partition_key: goes with a postgresql:// connection only; leave it out",
    ),
    (SQLITE + 'table = "t"\npartition_key = "id"', "datasets.t.partition_key: goes with"),
    (DATASET + "partition_key = 5", "datasets.t.partition_key: must be a valid string"),
    (DATASET + 'columns = ["id", "xyz"]', "datasets.t.columns: there is no column 'xyz'"),
    (DATASET + 'columns = ["id", "id"]', "datasets.t.columns: 'id' is named twice"),
    (DATASET + 'hidden = ["idd"]', "datasets.t.hidden: there is no column 'idd'; did you"),
    (DATASET + 'columns = ["id"]\nhidden = ["id"]', "datasets.t: shows no column"),
    (DATASET + "[datasets.t.column.whoo]", "datasets.t.column: there is no column 'whoo'"),
    (
        DATASET + '[datasets.t.column.who]\ntype = "varchar"',
        "datasets.t.column.who.type: 'varchar' is none of bool",
    ),
    (
        DATASET + '[datasets.t.column.who]\ntype = "decimal(39, 2)"',
        "datasets.t.column.who.type: 'decimal(39, 2)' is none of",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m[1][:48] for m in MISTAKES])
def test_a_mistake_is_one_line_with_the_file_the_key_and_the_mend(
    directory: Path, mistake: tuple[str, ...]
) -> None:
    text, *expected = mistake
    with pytest.raises(ConfigurationError) as refused:
        load(directory, text)
    line = str(refused.value)
    assert line.startswith(f"{directory}/datasets.toml: ")
    assert "\n" not in line
    for piece in expected:
        assert piece in line
    assert SECRET not in line


def test_a_partition_key_is_a_column_that_can_be_cut(
    directory: Path, postgres: PostgresServer, postgres_database: str
) -> None:
    columns = "id bigint, day date, at timestamptz, plain timestamp, who text, w float8"
    postgres.sql(f"CREATE TABLE t ({columns})", database=postgres_database)
    text = f'[connections.c]\nurl = "{postgres.url(postgres_database)}"\n'
    text += '[datasets.t]\nconnection = "c"\ntable = "t"\n'
    for name in ("id", "day", "at", "plain"):
        assert load(directory, f'{text}hidden = ["day"]\npartition_key = "{name}"').get("t")
    declared = '\n[datasets.t.column.who]\ntype = "int64"'
    assert load(directory, f'{text}partition_key = "who"{declared}').get("t")
    for name, problem in {
        "whom": "there is no column 'whom'; did you mean 'who'?",
        "who": "'who' is string, and must be INTEGER or DATE or TIMESTAMP; set its type in "
        "[datasets.t.column.who] or choose another column",
        "w": "'w' is double, and must be INTEGER or DATE or TIMESTAMP",
    }.items():
        with pytest.raises(ConfigurationError) as refused:
            load(directory, f'{text}partition_key = "{name}"')
        assert f"datasets.t.partition_key: {problem}" in str(refused.value)


def test_a_file_that_is_not_there_is_a_mistake_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_catalogue(tmp_path / "none.toml")
    assert str(refused.value) == f"{tmp_path}/none.toml: there is no such file"
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigurationError) as refused:
        load_catalogue(tmp_path / "latin.toml")
    assert "is not UTF-8" in str(refused.value)
    with pytest.raises(ConfigurationError):
        load_catalogue(tmp_path)
