"""How a measurement is told: one line for people, one JSON object for machines."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """One figure beside its peer's. `ratio` is how far ahead exportd is: above 1 is
    better, whatever the unit. `goal` is in the unit of `value`."""

    name: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    goal: str = ""

    def line(self, *, as_json: bool) -> str:
        """The figure as text."""
        if as_json:
            return json.dumps(dataclasses.asdict(self))
        text = f"{self.name:<44} {figure(self.value):>10} {self.unit}"
        if self.peer_value is not None:
            text += f"   {self.peer}: {figure(self.peer_value)}"
        if self.ratio is not None:
            text += f"   ratio {self.ratio:.2f}"
        if self.goal:
            text += f"   goal {self.goal}"
        return text


def figure(value: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def smaller_is_better(
    name: str, value: float, unit: str, *, peer: str, peer_value: float, goal: str
) -> Result:
    """A figure of time or memory beside its peer's."""
    return Result(name, value, unit, peer, peer_value, peer_value / value, goal)


def larger_is_better(
    name: str, value: float, unit: str, *, peer: str, peer_value: float, goal: str
) -> Result:
    """A figure of throughput beside its peer's."""
    return Result(name, value, unit, peer, peer_value, value / peer_value, goal)
