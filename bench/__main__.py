"""`python -m bench all|NAME ... [--json]` measures and prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from bench import beside, clients, fleet, memory, reap, s3, sinks, small
from bench.machine import CACHE
from bench.report import Result

BENCHES: dict[str, Callable[[], Iterator[Result]]] = {
    "small": small.results,
    "beside": beside.results,
    "memory": memory.results,
    "fleet": fleet.results,
    "s3": s3.results,
    "reap": reap.results,
    "sinks": sinks.results,
    "clients": clients.results,
}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("names", nargs="+", choices=["all", *BENCHES])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    names = list(BENCHES) if "all" in options.names else options.names
    for name in names:
        for result in BENCHES[name]():
            print(result.line(as_json=options.json), flush=True)


if __name__ == "__main__":
    main()
