"""Deliveries into directories that are swapped for links to elsewhere, all the time.

    python -m tests.security.path_race --seconds 60

Exits with 1 when anything was written outside the directory that is allowed.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from exportd_server.errors import DeliveryFailed
from exportd_server.sinks.base import Part
from exportd_server.sinks.local_file import (
    LocalFileConnection,
    LocalFileRequest,
    LocalFileSinkType,
)
from tests.support.sinks import a_part, an_export, deliver_part

DEPTH = ("a", "b", "c")
DATA = b"id,name\n" + b"1,one\n" * 2000
_DELIVERERS = 4
_PARKED = "parked-"
_PAUSES = 0.02
_LONGEST_PAUSE = 0.01
_AT_FDCWD = -100
_EXCHANGE = 2

Deliver = Callable[[Path, str, Part], Awaitable[None]]
"""Delivers a part below a root, into a path."""


@dataclass
class Figures:
    """What came of it."""

    seconds: float
    swaps: int = 0
    delivered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    outside: list[str] = field(default_factory=list)
    """Files that were written where nothing may be written."""
    broken: list[str] = field(default_factory=list)
    """Files with other bytes than they should have, by their final name."""

    def __str__(self) -> str:
        refused = ", ".join(f"{count} {text}" for text, count in self.refused.items())
        return (
            f"{self.seconds:.0f} s: {self.swaps} swaps, {self.delivered} delivered, "
            f"refused: {refused or 'none'}; {len(self.outside)} files outside, "
            f"{len(self.broken)} broken"
        )


class _Swapper(threading.Thread):
    """Exchanges a directory at some depth for a link, atomically, and back."""

    def __init__(self, root: Path, outside: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.swaps = 0
        self.stop = threading.Event()
        self._random = random.Random(seed)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._pairs: list[tuple[Path, Path]] = []
        directory = root
        for name in DEPTH:
            parked = directory / f"{_PARKED}{name}"
            directory /= name
            directory.mkdir()
            parked.symlink_to(outside)
            self._pairs.append((directory, parked))

    def run(self) -> None:
        while not self.stop.is_set():
            one, other = self._random.choice(self._pairs)
            # Deeper ones are elsewhere while one above is swapped.
            failed = self._libc.renameat2(
                _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE
            )
            self.swaps += not failed
            # From as fast as can be to slow enough that a delivery gets through.
            if self._random.random() < _PAUSES:
                time.sleep(self._random.uniform(0, _LONGEST_PAUSE))


async def through_the_sink(root: Path, path: str, part: Part) -> None:
    """As exportd delivers."""
    sink = await LocalFileSinkType().open(LocalFileConnection(root=root))
    try:
        await sink.deliver(LocalFileRequest(path=path), deliver_part(an_export(), part))
    finally:
        await sink.close()


async def race(
    place: Path,
    seconds: float,
    deliver: Deliver = through_the_sink,
    until: Callable[[Path], bool] = lambda _: False,
) -> Figures:
    """Deliver for some time, or until something is seen outside. `place` is empty."""
    root, outside = place / "root", place / "outside"
    root.mkdir()
    # What a writer that follows links needs to get anywhere.
    (outside / "b" / "c").mkdir(parents=True)
    (outside / "c").mkdir()
    swapper = _Swapper(root, outside, seed=1)
    figures = Figures(seconds)
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds

    async def deliver_on(number: int) -> None:
        sequence = number
        while loop.time() < end and not until(outside):
            sequence += _DELIVERERS
            part = a_part(DATA, sequence=sequence % 400)
            try:
                await deliver(root, "/".join(DEPTH), part)
            except DeliveryFailed as error:
                figures.refused[error.message.partition(": ")[2]] += 1
            except OSError as error:
                figures.refused[str(error.strerror)] += 1
            else:
                figures.delivered += 1

    swapper.start()
    try:
        await asyncio.gather(*(deliver_on(number) for number in range(_DELIVERERS)))
    finally:
        swapper.stop.set()
        swapper.join()
    figures.swaps = swapper.swaps
    figures.outside = _files(outside)
    figures.broken = [name for name in _files(root) if not _is_whole(Path(name))]
    return figures


def _is_whole(path: Path) -> bool:
    return path.name.startswith(".") or path.read_bytes() == DATA


def _files(directory: Path) -> list[str]:
    """What is no directory, without following links."""
    return [
        os.path.join(above, name)  # noqa: PTH118 - as os.walk gives it
        for above, _, names in os.walk(directory)
        for name in names
    ]


def main() -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures = asyncio.run(race(Path(place), options.seconds))
    print(figures)  # noqa: T201 - a command
    return 1 if figures.outside or figures.broken else 0


if __name__ == "__main__":
    sys.exit(main())
