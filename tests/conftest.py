"""Fixtures that every kind of test may ask for."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.flights import flights, flights_postgres, flights_sqlite
from tests.support.gate import GateSource
from tests.support.ledger import ledger_database
from tests.support.postgres import postgres, postgres_database, postgres_url
from tests.support.readers import downloads
from tests.support.samples import SAMPLE_ROWS, write_samples
from tests.support.seaweed import s3_options, seaweed

# Many tests start processes; without compiled modules each of them compiles exportd anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A machine that is busy is no fault of what is tested.
settings.register_profile("exportd", deadline=None)
settings.load_profile("exportd")

__all__ = [
    "downloads",
    "flights",
    "flights_postgres",
    "flights_sqlite",
    "ledger_database",
    "postgres",
    "postgres_database",
    "postgres_url",
    "s3_options",
    "seaweed",
]


@pytest.fixture(scope="session")
def sample_catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample data, small, and the path of its catalogue."""
    return write_samples(tmp_path_factory.mktemp("samples") / "data", SAMPLE_ROWS)


@pytest.fixture
def gate() -> GateSource:
    """A source whose batches come when the test says so."""
    return GateSource()


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: to have the garbage collector look through
    it again and again costs a fifth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let it be freed as usual."""
    gc.unfreeze()
