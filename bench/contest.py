"""Contestants measured in turns: A B A B, so that what the machine does meanwhile falls on
each of them alike.

A contestant is a callable that does the work once, checks what came of it, and returns a
`Run`. The first round fills caches and is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import Result, larger_is_better, smaller_is_better

ROUNDS = 5

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run took. `cpu` and `peak` are of all processes that did the work for the
    contestant, which is told by whoever measures; None where nobody measured."""

    seconds: float
    cpu: float | None = None
    """User and system seconds."""
    peak: float | None = None
    """Peak resident memory in MiB."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A peer that is not on this machine."""

    reason: str


Contestant = Callable[[], Run]
"""Does the work once, and fails where what came of it is not right."""


def contest(contestants: Mapping[str, Contestant], rounds: int = ROUNDS) -> dict[str, Run]:
    """Medians of so many rounds, of each figure by itself."""
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            run = contestant()
            if number:
                runs[name].append(run)
            print(f"  {name}: {run}", file=sys.stderr, flush=True)
    return {name: _median(each) for name, each in runs.items()}


def _median(runs: Sequence[Run]) -> Run:
    def of(values: list[float | None]) -> float | None:
        told = [value for value in values if value is not None]
        return statistics.median(told) if told else None

    return Run(
        statistics.median(run.seconds for run in runs),
        of([run.cpu for run in runs]),
        of([run.peak for run in runs]),
    )


def beside(
    name: str,
    ours: Run,
    peer: str,
    theirs: Run,
    *,
    amount: float,
    unit: str,
    goal: float | None = None,
) -> list[Result]:
    """Results of one pair: how much a second (`amount` in each run, `unit` of a second's
    worth), CPU seconds and peak memory. `goal` is the least ratio of the first."""
    found = [
        larger_is_better(
            name,
            amount / ours.seconds,
            unit,
            peer=peer,
            peer_value=amount / theirs.seconds,
            goal="" if goal is None else f"ratio >= {goal}",
        )
    ]
    for what, figure, value, other in (
        ("CPU", "CPU s", ours.cpu, theirs.cpu),
        ("peak memory", "MiB", ours.peak, theirs.peak),
    ):
        if value is not None and other is not None:
            found.append(
                smaller_is_better(
                    f"{name}, {what}", value, figure, peer=peer, peer_value=other, goal=""
                )
            )
    return found


def command(argv: Sequence[str], *, stdout: Path | None = None, **environ: str) -> Run:
    """Run a command to its end in a process of its own: its seconds from start to exit, its
    CPU and its peak memory. Raises `RuntimeError` with what it said if it failed."""
    told, telling = os.pipe()
    with (stdout or Path(os.devnull)).open("wb") as out, open(told, "rb") as answer:  # noqa: PTH123 - a descriptor
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, str(telling), *argv],
            stdout=out,
            stderr=subprocess.PIPE,
            pass_fds=[telling],
            env={**os.environ, **environ},
        )
        os.close(telling)
        _, said = process.communicate()
        figures = answer.read()
    if process.returncode:
        raise RuntimeError(f"{argv[0]}: {said.decode(errors='replace')[-2000:]}")
    return Run(**json.loads(figures))


_LAUNCH = """
import json, os, sys, time
telling = int(sys.argv[1])
os.set_inheritable(telling, False)
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - started
cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
os.write(telling, json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}).encode())
sys.exit(os.waitstatus_to_exitcode(status))
"""
# Started by a small one: the kernel counts the memory of whoever starts a process as the
# peak of that process, too.


def cpu_seconds(pid: int) -> float:
    """What a live process has used so far, its ended children included."""
    fields = (
        Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    )
    return sum(map(int, fields[11:15])) / _TICKS


def peak_mib(pid: int) -> float:
    """Peak resident memory of a live process since it began or since `forget_peak`."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return (
        int(next(x.split()[1] for x in status.splitlines() if x.startswith("VmHWM"))) / 1024
    )


def forget_peak(pid: int) -> None:
    """Have the kernel count the peak of a process from here on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
