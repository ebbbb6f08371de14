"""The seam of the generators: what is made from `proto/` and kept in the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"


class Generator(Protocol):
    """Makes the files of one directory from the contract.

    What it runs is pinned by version and hash, so the same contract gives the same bytes
    on every machine; once its tools are installed it needs no network.
    """

    name: str
    """What `tools/generate.py` calls it."""

    committed: Path
    """A directory in the tree that holds nothing but what is generated, or one file."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine ("go is not installed"); None when it can."""
        ...

    def generate(self, target: Path) -> None:
        """Write what `committed` should be to `target`, which does not exist yet but
        whose parent does. Raises `subprocess.CalledProcessError`."""
        ...


def contract() -> list[Path]:
    """The contract's own files."""
    return sorted(PROTO.glob("exportd/v1/*.proto"))
