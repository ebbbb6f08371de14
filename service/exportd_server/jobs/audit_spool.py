"""Audit records of the command line, on their way to the embedded ledger.

That ledger belongs to the server's process, so a command cannot append to it. It leaves
its records in a file, which the server takes up; they are there if it does not run, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from exportd_server.errors import LedgerUnavailable
from exportd_server.jobs.audit import AuditRecord
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.platform import metrics

log = structlog.get_logger(__name__)

NAME = "audit-spool.jsonl"
LOOK_SECONDS = 2.0
"""How often a server looks for records that a command has left."""

_RECORD = TypeAdapter(AuditRecord)


class AuditSpool:
    """The file in a directory: one record a line."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME

    async def append(self, record: AuditRecord) -> None:
        """Leave a record; durable when this returns. Raises `OSError`."""
        await asyncio.to_thread(self._append, _RECORD.dump_json(record) + b"\n")

    async def run(self, ledger: Ledger) -> None:
        """Move what is left there into the ledger, for ever."""
        while True:
            try:
                await self.move(ledger)
            except (OSError, LedgerUnavailable) as error:
                log.warning("audit records of commands wait", cause=repr(error))
            except Exception:
                log.exception("audit records of commands wait")
            await asyncio.sleep(LOOK_SECONDS)

    async def move(self, ledger: Ledger) -> None:
        """Move what is left there into the ledger. If that is cut short the records are
        in both places, and moving them again changes nothing. Raises `OSError` and
        `LedgerUnavailable`."""
        content = await asyncio.to_thread(self._read)
        # A line that is not complete is still being written, or never will be.
        whole = content[: content.rfind(b"\n") + 1]
        records = [record for line in whole.splitlines() for record in _parsed(line)]
        if records:
            await ledger.append_audit(records)
        if whole:
            await asyncio.to_thread(self._drop, len(whole))

    # --- in threads

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(os.O_CREAT) as file:
            end = os.fstat(file).st_size
            if end and os.pread(file, 1, end - 1) != b"\n":
                # What a command that was killed began stays apart.
                line = b"\n" + line
            try:
                _write(file, line)
                os.fsync(file)
            except OSError:
                os.ftruncate(file, end)
                raise

    def _read(self) -> bytes:
        if not self._path.exists():
            return b""
        with self._locked() as file:
            return os.pread(file, os.fstat(file).st_size, 0)

    def _drop(self, length: int) -> None:
        """Take away what was read; more may have come since."""
        with self._locked() as file:
            rest = os.pread(file, os.fstat(file).st_size, length)
            os.ftruncate(file, 0)
            _write(file, rest)
            os.fsync(file)

    @contextlib.contextmanager
    def _locked(self, flags: int = 0) -> Iterator[int]:
        # Not through a link: the superuser may be the one who writes.
        flags |= os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self._path, flags, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"{self._path} is no plain file")
            if os.geteuid() == 0:
                # The server, which runs as the directory's owner, must be able to read it.
                owner = self._path.parent.stat()
                os.fchown(file, owner.st_uid, owner.st_gid)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _parsed(line: bytes) -> Iterator[AuditRecord]:
    if not line:
        return
    try:
        yield _RECORD.validate_json(line)
    except ValidationError:
        metrics.audit_dropped.labels("refused").inc()
        log.error("an audit record of a command cannot be read")  # noqa: TRY400 - its text is not for logs
