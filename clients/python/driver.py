"""Does one thing with the client and prints JSON: what the tests of the clients run.

python driver.py get JOB | watch JOB | create DATASET FORMAT
python driver.py download JOB PATH [--part N] [--overwrite]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exportd


def main() -> int:
    """Do it; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["get", "watch", "create", "download"])
    parser.add_argument("subject")
    parser.add_argument("object", nargs="?", default="")
    parser.add_argument("--part", type=int)
    parser.add_argument("--overwrite", action="store_true")
    asked = parser.parse_args()
    try:
        for line in answers(asked):
            say(line)
    except exportd.ExportdError as error:
        code = error.code.name if error.code is not None else ""
        say({"error": told(error, code=code, reason=error.reason, message=str(error))})
        return 1
    return 0


def answers(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to print."""
    roots = os.environ.get("EXPORTD_CA_CERT")
    with exportd.Client(
        os.environ["EXPORTD_SERVER"],
        tls=exportd.tls_from_files(Path(roots)) if roots else False,
        token=os.environ.get("EXPORTD_TOKEN"),
    ) as client:
        if asked.verb == "create":
            name = asked.object.removeprefix("FORMAT_").lower()
            yield {"job_id": client.export(asked.subject, format=name).id}
            return
        job = client.job(asked.subject)
        if asked.verb == "get":
            yield {"state": f"JOB_STATE_{job.state.name}"}
        elif asked.verb == "watch":
            for info in job.watch():
                yield {"state": f"JOB_STATE_{info.state.name}"}
        else:
            begun = time.monotonic()
            done = job.download(asked.object, part=asked.part, overwrite=asked.overwrite)
            yield {
                "path": str(done.path),
                "bytes": done.size,
                "sha256": done.sha256 or "",
                "verified_by": done.verified_by,
                "seconds": time.monotonic() - begun,
            }


def told(error: Exception, **facts: str | None) -> dict[str, str]:
    """An error, as JSON has it."""
    kind = f"{type(error).__module__}.{type(error).__name__}"
    return {"type": kind, **{name: value or "" for name, value in facts.items()}}


def say(line: dict[str, Any]) -> None:
    """Print a line at once."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
