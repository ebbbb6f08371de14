"""A real server over TLS with an API key, for the clients."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import exportd
from exportd import Client
from exportd_server.identity.base import Scope
from tests.clients.languages import Driver, Language
from tests.support.identity import Authority, api_key
from tests.support.samples import write_samples
from tests.support.server import Process, server_process

ROWS = 40_000

SLOW = """
[connections.counting]
url = "sqlite:///{database}"

[datasets.slow]
connection = "counting"
query = '''
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 40000000)
SELECT i FROM n
'''
"""
"""A dataset whose export takes longer than any client takes to start."""


@dataclass
class Service:
    """A server with TLS and keys, that can be killed and started again."""

    directory: Path
    authority: Authority
    token: str
    options: tuple[str, ...]
    environment: dict[str, str]
    process: Process
    stack: ExitStack

    @property
    def port(self) -> int:
        return self.process.port

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    def kill(self) -> None:
        self.process.kill()

    def start(self, *more: str) -> None:
        """Start it again, on the port it had."""
        listen = ("--listen", f"127.0.0.1:{self.process.port}")
        self.process = self.stack.enter_context(
            server_process(
                self.data_dir, *self.options, *listen, *more, env=self.environment
            )
        )

    def client(self) -> Client:
        return Client(
            f"localhost:{self.port}",
            tls=exportd.tls_from_files(self.authority.cert_file),
            token=self.token,
        )

    def driving(self, language: Language, port: int | None = None) -> Driver:
        return Driver(
            language,
            {
                "EXPORTD_SERVER": f"localhost:{port or self.port}",
                "EXPORTD_TOKEN": self.token,
                "EXPORTD_CA_CERT": str(self.authority.cert_file),
            },
        )

    def export(self, dataset: str = "token_transfers", **options: object) -> exportd.Job:
        with self.client() as client:
            return client.export(dataset, **options).wait(timeout=60)  # type: ignore[arg-type]  # checked by the callee


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    catalogue = write_samples(tmp_path_factory.mktemp("samples") / "data", ROWS)
    database = catalogue.with_name("empty.db")
    sqlite3.connect(database).close()
    with catalogue.open("a") as file:
        file.write(SLOW.format(database=database))
    return catalogue


@pytest.fixture(scope="class")
def lasting(tmp_path_factory: pytest.TempPathFactory, samples: Path) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    authority = Authority(directory / "ca")
    shown = authority.pair("server", dns=["localhost"], ips=["127.0.0.1"])
    data_dir = directory / "data"
    data_dir.mkdir()
    token, _ = asyncio.run(api_key(data_dir, scopes=(Scope.READ, Scope.WRITE)))
    options = ("--catalogue", str(samples))
    environment = {
        "EXPORTD_IDENTITY__API_KEYS": "true",
        "EXPORTD_TLS__CERT_FILE": str(shown.cert_file),
        "EXPORTD_TLS__KEY_FILE": str(shown.key_file),
    }
    with ExitStack() as stack:
        process = stack.enter_context(server_process(data_dir, *options, env=environment))
        yield Service(directory, authority, token, options, environment, process, stack)


@pytest.fixture
def service(lasting: Service) -> Service:
    """One server for all tests of a class, up again after a test that killed it."""
    if not lasting.process.running:
        lasting.start()
    return lasting


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A name in an empty directory."""
    (tmp_path / "got").mkdir()
    return tmp_path / "got" / "output"


@pytest.fixture(scope="class")
def built(request: pytest.FixtureRequest) -> None:
    """The class's language is built, once; its tests are skipped where it is not
    installed."""
    language: Language = request.cls.language
    if reason := language.missing():
        pytest.skip(f"{language.name}: {reason}")
    language.build()
