"""What happened, in order: every call, answer and fault, and what was found wrong."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any


class History:
    """Writes JSON lines. Moments are seconds of the monotonic clock since the start."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8")
        self._begun = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.cancelled = 0
        """Calls that a server answered with CANCELLED when it ended."""

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    def note(self, kind: str, **what: Any) -> None:
        """Write one line; `kind` is also counted."""
        self.counts[kind] += 1
        self.cancelled += what.get("code") == "CANCELLED"
        line = {"t": round(self.now(), 4), "kind": kind, **what}
        self._stream.write(json.dumps(line, default=str) + "\n")

    def violation(self, text: str, **what: Any) -> None:
        """Something that must never be."""
        detail = " ".join(f"{name}={value}" for name, value in what.items())
        self.violations.append(f"[{self.now():8.3f}] {text} {detail}".rstrip())
        self.note("violation", text=text, **what)
        self._stream.flush()

    def close(self) -> None:
        """Have everything on disk."""
        self._stream.close()
