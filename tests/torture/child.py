"""What runs in a process of the fleet: the server's own command, on a clock that can be
shifted, or a program that embeds the server with a dataset that kills.

The shifted clock is what Python code of this process reads as the time of day:
`time.time` and `time.time_ns`, and with them the server's `SystemClock`. Moments that C
code reads by itself (`datetime.now`, libraries) and the database server's clock are not
shifted.
"""

from __future__ import annotations

import asyncio
import faulthandler
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

CLOCK = "TORTURE_CLOCK"
"""Environment variable with the path of a file that holds the shift in seconds."""
POISONED = "poisoned"
"""First argument of the program that embeds; the second is `serve` or `worker`."""
_SHIFT = struct.Struct("d")


def set_shift(path: Path, seconds: float) -> None:
    """Shift the clock of the process that has this file, at once. The file stays the
    same one, because that process has it mapped."""
    with path.open("r+b" if path.exists() else "w+b") as stream:
        stream.write(_SHIFT.pack(seconds))


def _shift_clock(path: Path) -> None:
    with path.open("rb") as stream:
        shared = mmap.mmap(stream.fileno(), _SHIFT.size, access=mmap.ACCESS_READ)
    now, now_ns = time.time, time.time_ns

    def shift() -> float:
        return float(_SHIFT.unpack_from(shared)[0])

    time.__dict__["time"] = lambda: now() + shift()
    time.__dict__["time_ns"] = lambda: now_ns() + int(shift() * 1e9)


def main(arguments: Sequence[str]) -> None:
    """Run it; ends the process."""
    # Says where it was when a library brings the process down.
    faulthandler.enable()
    clock = os.environ.get(CLOCK)
    if clock:
        _shift_clock(Path(clock))
    if arguments[0] == POISONED:
        asyncio.run(_poisoned(serves=arguments[1] == "serve"))
        return
    from exportd_server import cli  # noqa: PLC0415 - once the clock is in place

    cli.main(list(arguments), prog_name="exportd-server")


async def _poisoned(*, serves: bool) -> None:
    from exportd_server.app import serving, working  # noqa: PLC0415 - as above
    from exportd_server.platform.logging import configure_logging  # noqa: PLC0415
    from exportd_server.settings import load_settings  # noqa: PLC0415
    from exportd_server.sources.base import (  # noqa: PLC0415
        BatchStream,
        Column,
        Plan,
        Query,
        Shard,
        Source,
    )
    from exportd_server.sources.catalogue import (  # noqa: PLC0415
        Catalogue,
        load_catalogue,
    )

    @dataclass(frozen=True)
    class Poison:
        """A source like another one, but whoever opens it dies."""

        like: Source

        def columns(self) -> tuple[Column, ...]:
            return self.like.columns()

        def count(self) -> int | None:
            return self.like.count()

        def plan(self, query: Query, *, shard_rows: int | None = None) -> Plan:
            return self.like.plan(query, shard_rows=shard_rows)

        def open(self, query: Query, shard: Shard, *, skip_rows: int = 0) -> BatchStream:
            _die()

    settings = load_settings(None, {"workers": not serves})
    configure_logging(settings.log.level, settings.log.style)
    assert settings.catalogue is not None
    given = load_catalogue(settings.catalogue)
    datasets = {name: given.get(name) for name in given.names()}
    known = {name: dataset for name, dataset in datasets.items() if dataset is not None}
    known["poison"] = replace(
        known["lake"], name="poison", source=Poison(known["lake"].source)
    )
    catalogue = Catalogue(known)
    loop = asyncio.get_running_loop()
    if serves:
        async with serving(settings, catalogue=catalogue) as running:
            loop.add_signal_handler(signal.SIGTERM, running.stop.set)
            _up()
            await running.stop.wait()
    else:
        async with working(settings, catalogue=catalogue) as stop:
            loop.add_signal_handler(signal.SIGTERM, stop.set)
            _up()
            await stop.wait()


def _up() -> None:
    sys.stdout.write("up\n")
    sys.stdout.flush()


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main(sys.argv[1:])
