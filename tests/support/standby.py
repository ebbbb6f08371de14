"""A hot standby of a PostgreSQL, for what must work, or fail well, during recovery."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.postgres import PostgresServer


class _Standby(PostgresServer):
    def __init__(self, primary: PostgresServer, directory: Path) -> None:
        # Everything as the primary has it, save where it is.
        vars(self).update(vars(primary))
        self._data = directory / "data"
        self._log = directory / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        where = ["-D", str(self._data), "-d", primary.url()]
        self._run("pg_basebackup", *options, *where)


@contextlib.contextmanager
def standby_of(primary: PostgresServer) -> Iterator[PostgresServer]:
    """A server that follows the primary and takes reading sessions."""
    directory = Path(tempfile.mkdtemp(prefix="exportd-standby-"))
    directory.chmod(0o777)  # the account that the server runs as may be another one
    try:
        standby = _Standby(primary, directory)
        standby.start()
        try:
            yield standby
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                standby.stop("immediate")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
