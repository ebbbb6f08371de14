"""A server on the sample data, in the foreground, and three commands to try.

python tools/run.py [--data-dir DIR] [--listen HOST:PORT]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    """Say what to try, then become the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default=".data")
    parser.add_argument("--listen", default="127.0.0.1:50051")
    options = parser.parse_args()
    exportd = os.path.relpath(Path(sys.executable).parent / "exportd")
    server = "" if options.listen == "127.0.0.1:50051" else f" --server {options.listen}"
    print(
        "Once the server listens, try in another terminal:\n\n"
        f"  {exportd}{server} datasets\n"
        f"  {exportd}{server} create token_transfers --format parquet"
        " --download transfers.parquet\n"
        f"  {exportd}{server} list\n\n"
        "Ctrl-C ends it.",
        flush=True,
    )
    command = [
        *(sys.executable, "-m", "exportd_server", "serve"),
        *("--listen", options.listen, "--data-dir", options.data_dir),
        *("--log-style", "console"),
    ]
    os.execv(sys.executable, command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
