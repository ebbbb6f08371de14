"""Exports a dataset, follows it, downloads the file and verifies it.

    python example.py [DATASET] [FILE]

takes `EXPORTD_SERVER` (localhost:50051), `EXPORTD_TOKEN` and `EXPORTD_CA_CERT`, a PEM
file, from the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import exportd


def main() -> None:
    """Export and download."""
    dataset = sys.argv[1] if len(sys.argv) > 1 else "positions"
    path = sys.argv[2] if len(sys.argv) > 2 else f"{dataset}.csv"
    roots = os.environ.get("EXPORTD_CA_CERT")
    with exportd.Client(
        os.environ.get("EXPORTD_SERVER", "localhost:50051"),
        tls=exportd.tls_from_files(Path(roots)) if roots else False,
        token=os.environ.get("EXPORTD_TOKEN"),
    ) as client:
        job = client.export(dataset, format="csv")
        for info in job.watch():
            print(f"{info.state}: {info.progress.rows} rows")  # noqa: T201 - an example
        done = job.wait().download(path)
        print(f"{done.path}: {done.size} bytes, verified by {done.verified_by}")  # noqa: T201


if __name__ == "__main__":
    main()
