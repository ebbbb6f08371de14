"""The sample data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from exportd_server import samples
from exportd_server.errors import ConfigurationError
from exportd_server.sources.base import Query
from exportd_server.sources.catalogue import Dataset, load_catalogue

SIX = {
    "token_transfers": 2000,
    "native_balance_deltas": 1000,
    "decoded_events": 500,
    "hl_fills": 1000,
    "hl_funding": 200,
    "positions": 100,
}


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def read(dataset: Dataset) -> pa.Table:
    query = Query(tuple(column.name for column in dataset.columns))
    with dataset.source.open(query, dataset.source.plan(query).shards[0]) as stream:
        return pa.Table.from_batches(list(stream), stream.schema)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("samples") / "deep" / "data"
    samples.generate(directory, 2000)
    return directory


def test_there_are_six_datasets_of_the_sizes_asked_for(directory: Path) -> None:
    catalogue = load_catalogue(directory / "datasets.toml")
    assert set(catalogue.names()) == set(SIX)
    for name, rows in SIX.items():
        dataset = catalogue.get(name)
        assert dataset is not None
        assert dataset.exportable
        assert dataset.description
        assert dataset.target_column
        assert dataset.time_column
        assert dataset.source.count() == rows
        table = read(dataset)
        assert table.num_rows == rows
        times = table[dataset.time_column]
        assert times.type == pa.timestamp("us", "UTC")
        assert times.to_pylist() == sorted(times.to_pylist())
        assert any(column.null_count for column in table.columns) or name == "hl_funding"


def test_the_values_look_like_what_they_stand_for(directory: Path) -> None:
    catalogue = load_catalogue(directory / "datasets.toml")
    transfers = catalogue.get("token_transfers")
    events = catalogue.get("decoded_events")
    assert transfers is not None
    assert events is not None
    table = read(transfers)
    for name, length in (("from_address", 42), ("transaction_hash", 66)):
        assert set(pc.utf8_length(table[name]).to_pylist()) == {length}
        assert all(value.startswith("0x") for value in table[name].to_pylist())
    assert table.schema.field("amount").type == pa.decimal128(38, 18)
    assert table.schema.field("block_number").type == pa.int64()
    assert table.schema.field("is_contract").type == pa.bool_()
    assert pc.min(table["amount"]).as_py() >= 0
    assert len(set(table["from_address"].to_pylist())) > 100
    assert set(table["network"].to_pylist()) == {"ethereum", "base", "arbitrum", "polygon"}
    memos = set(table["memo"].to_pylist())
    assert {None, "", "two\nlines", 'invoice "7"', "rent, May"} <= memos
    fields = read(events)["decoded_fields"]
    assert pa.types.is_list(fields.type)
    assert [f.name for f in fields.type.value_type] == ["name", "type", "value"]
    assert set(pc.list_value_length(fields).to_pylist()) == {0, 1, 2, 3}


def test_columns_do_not_decide_each_other(directory: Path) -> None:
    dataset = load_catalogue(directory / "datasets.toml").get("token_transfers")
    assert dataset is not None
    table = read(dataset)
    pairs = table.group_by(["network", "token_symbol"]).aggregate([])
    networks, tokens = (
        pc.count_distinct(table[name]).as_py() for name in ("network", "token_symbol")
    )
    assert pairs.num_rows == networks * tokens


def test_the_same_size_and_seed_give_the_same_bytes(
    directory: Path, tmp_path: Path
) -> None:
    samples.generate(tmp_path / "again", 2000)
    assert digests(tmp_path / "again") == digests(directory)
    samples.generate(tmp_path / "other", 2000, seed=2)
    assert digests(tmp_path / "other") != digests(directory)


def test_what_is_there_already_is_left_alone_and_another_size_replaces_it(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "data"
    samples.generate(directory, 100)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    inode = directory.stat().st_ino
    samples.generate(directory, 100)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert directory.stat().st_ino == inode
    samples.generate(directory, 50)
    dataset = load_catalogue(directory / "datasets.toml").get("token_transfers")
    assert dataset is not None
    assert dataset.source.count() == 50
    assert list(tmp_path.iterdir()) == [directory]


def test_a_directory_of_somebody_elses_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError):
        samples.generate(tmp_path, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigurationError):
        samples.generate(tmp_path / "none", 0)


def test_a_run_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(samples, "_catalogue", broken)
    with pytest.raises(OSError, match="disk full"):
        samples.generate(tmp_path / "data", 10)
    assert list(tmp_path.iterdir()) == []


def test_one_row_is_enough(tmp_path: Path) -> None:
    samples.generate(tmp_path, 1)
    catalogue = load_catalogue(tmp_path / "datasets.toml")
    for name in catalogue.names():
        dataset = catalogue.get(name)
        assert dataset is not None
        assert read(dataset).num_rows == 1
