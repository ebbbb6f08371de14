"""What a run is to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """One run. Times in seconds.

    Attributes:
        seed: Decides which faults come when, and what the clients ask for. How the
            processes race each other it does not decide.
        seconds: How long faults are injected and jobs created; the checks come after.
        kills: `kill -9` of workers and API processes, spread over that time.
        workers: Processes that only work.
        apis: Processes that serve; the first of them works as well.
        clients: Loops that each see one job through after the other.
        lease: Of the fleet's workers.
        allow_failed: Share of the jobs that may fail for a reason the faults explain.
        cold: Start each process as its own command. That costs seconds of CPU instead of
            a few tenths, which must then not be all that the machine does.
        keep: Keep history and logs although nothing was wrong.
    """

    seed: int
    seconds: float = 200.0
    kills: int = 70
    workers: int = 3
    apis: int = 2
    clients: int = 6
    lease: float = 2.0
    allow_failed: float = 0.0
    cold: bool = False
    keep: bool = False
