"""README's table of figures, from what bench/results keeps: `python -m bench.table
[--check]`. Figures that have a goal are in it; all others are in the files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.__main__ import BENCHES
from bench.report import Result, figure
from bench.saved import saved

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- measured: python -m bench.table -->\n", "<!-- end of measured -->\n"


def table() -> str:
    """The table, and of which machine it tells."""
    lines = [
        "| | exportd | beside it | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    machines = []
    for name in BENCHES:
        try:
            machine, results = saved(name)
        except FileNotFoundError:
            continue
        machines.append(
            f"{machine['cores']} cores ({machine['processor']}), "
            f"{machine['memory_gib']} GiB, {machine['system']}, "
            f"Python {machine['python']}, {machine['date']}"
        )
        scale = machine.get("scale", 1)
        lines += _rows(results, "" if scale == 1 else f" (at {scale:g} of the size)")
    said = "; ".join(dict.fromkeys(machines))
    return "\n".join([*lines, "", f"Measured on {said}.", ""])


def _rows(results: list[Result], note: str) -> Iterator[str]:
    for result in results:
        if not result.goal:
            continue
        beside = ratio = ""
        if result.peer_value is not None:
            beside = f"{result.peer}: {figure(result.peer_value)}"
        if result.ratio is not None:
            ratio = f"{result.ratio:.2f}"
        ours = f"{figure(result.value)} {result.unit}"
        yield f"| {result.name}{note} | {ours} | {beside} | {ratio} | {result.goal} |"


def main() -> None:
    """Write it into the README, or say that it differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.table")
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    current = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if check and current != text:
        sys.exit("README.md: its table of figures is old; run `python -m bench.table`")
    if not check:
        README.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    main()
