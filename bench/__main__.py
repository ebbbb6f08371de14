"""`python -m bench all|NAME ... [--json] [--save]` measures and prints."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from bench.machine import CACHE
from bench.report import Result
from bench.saved import save

BENCHES = (
    "export",
    "download",
    "small",
    "unary",
    "beside",
    "memory",
    "store",
    "delivery",
    "sinks",
    "scale",
    "fleet",
    "reap",
    "start",
    "clients",
)


def results(name: str) -> Iterator[Result]:
    """Measure. A bench is imported when it is its turn: what it needs may not be there."""
    measured: Iterator[Result] = importlib.import_module(f"bench.{name}").results()
    return measured


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("names", nargs="+", choices=["all", *BENCHES])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--save", action="store_true", help="keep the figures in bench/results, too"
    )
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in BENCHES if "all" in options.names else options.names:
        found = []
        for result in results(name):
            print(result.line(as_json=options.json), flush=True)
            found.append(result)
            if options.save:  # at once: a bench may be ended in the middle
                save(name, found)


if __name__ == "__main__":
    main()
