"""The figures of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.checker import Recovery

KILLS = ("kill worker", "kill api")


@dataclass
class Report:
    """What a run measured, and what it found wrong."""

    seed: int
    repeat: str
    seconds: float = 0.0
    states: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    claims: int = 0
    takeovers: int = 0
    leases_lost: int = 0
    restarts: int = 0
    verified: int = 0
    delivered: int = 0
    deliveries: int = 0
    delivery_attempts: int = 0
    rows: int = 0
    bytes: int = 0
    retries: int = 0
    cancelled: int = 0
    recovery: Recovery = field(default_factory=lambda: Recovery([], [], 0))
    violations: list[str] = field(default_factory=list)
    kept: Path | None = None
    """Where history and logs are, when something was wrong."""

    def lines(self) -> list[str]:
        """The table."""
        clean, all_ = self.recovery.clean, self.recovery.all
        rate = sum(self.states.values()) / self.seconds if self.seconds else 0.0
        table = [
            ("jobs", _counted(self.states)),
            ("failed because of", _counted(self.failures)),
            ("faults", _counted(self.faults)),
            ("claims", f"{self.claims}, of them takeovers {self.takeovers}"),
            ("leases lost, and noticed", f"{self.leases_lost}"),
            ("generations restarted", f"{self.restarts}"),
            (
                "outputs proven",
                f"{self.verified}: {self.rows} rows, {self.bytes / 2**20:.0f} MiB",
            ),
            (
                "deliveries proven",
                (
                    f"{self.deliveries} of {self.delivered} jobs, tried "
                    f"{self.delivery_attempts} times"
                ),
            ),
            (
                "calls repeated",
                f"{self.retries}; answered CANCELLED and not UNAVAILABLE: {self.cancelled}",
            ),
            (
                "recovery after kill -9",
                f"{_spread(clean)} of {len(clean)}; {self.recovery.moot} moot",
            ),
            (
                "  with database trouble",
                f"{_spread(all_)} of {len(all_)}",
            ),
            ("throughput", f"{rate:.2f} jobs/s over {self.seconds:.0f} s"),
            ("violations", f"{len(self.violations)}"),
        ]
        lines = [f"{name:<26}{value}" for name, value in table]
        lines += [f"  VIOLATION {text}" for text in self.violations]
        if self.kept is not None:
            lines.append(f"history and logs are in {self.kept}")
        lines.append(f"repeat it with: {self.repeat}")
        return lines


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counter.items())) or "none"


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)

    def quantile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return f"p50 {quantile(0.5):.2f} s, p99 {quantile(0.99):.2f} s"
