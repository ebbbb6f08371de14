"""`python -m tests.torture` hurts a fleet and proves that it lost nothing."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
import sys

from tests.support.postgres import running_postgres
from tests.torture import poison, runner
from tests.torture.options import Options

SEEDS = (1, 2)
"""Run every time, beside one by chance."""


def main() -> int:
    """Run; 0 when nothing was wrong, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="of faults, over all seeds"
    )
    parser.add_argument("--kills", type=int, default=200, help="kill -9, over all seeds")
    parser.add_argument(
        "--seed",
        type=int,
        action="append",
        help="may be repeated; default: 1, 2 and one by chance",
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--apis", type=int, default=2)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--lease", type=float, default=2.0, help="seconds")
    parser.add_argument(
        "--allow-failed", type=float, default=0.0, help="share of jobs that may fail"
    )
    parser.add_argument(
        "--cold", action="store_true", help="start each process as its own command"
    )
    parser.add_argument("--keep", action="store_true", help="keep history and logs")
    parser.add_argument("--no-poison", action="store_true", help="leave that phase out")
    given = parser.parse_args()
    # Either way everything that was started is ended in order.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    seeds = given.seed or [*SEEDS, secrets.randbelow(10**9)]
    failed = False
    for seed in seeds:
        options = Options(
            seed=seed,
            seconds=given.seconds / len(seeds),
            kills=round(given.kills / len(seeds)),
            workers=given.workers,
            apis=given.apis,
            clients=given.clients,
            lease=given.lease,
            allow_failed=given.allow_failed,
            cold=given.cold,
            keep=given.keep,
        )
        _say(f"seed {seed}: {options.seconds:g} s, {options.kills} kills")
        with running_postgres(durable=True) as postgres:
            report = asyncio.run(runner.run(options, postgres))
        _say("\n".join(report.lines()))
        failed = failed or bool(report.violations)
    if not given.no_poison:
        with running_postgres(durable=True) as postgres:
            history = asyncio.run(poison.run(postgres, seeds[0]))
        _say(f"poison: {history.counts['ended']} deaths, violations {history.violations}")
        failed = failed or bool(history.violations)
    return int(failed)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
