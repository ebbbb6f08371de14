"""The main job, shown: serve, export, watch, download, verify, and stop.

    python tools/demo.py [--data-dir DIR] [--rows N]

Everything goes over real gRPC on loopback, through the same commands a user has.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crc32c import crc32c

SHOWN_ROWS = 5


@contextlib.contextmanager
def server(data_dir: Path, rows: int) -> Iterator[str]:
    """Run a server; gives its address. Its log goes to a file in its directory."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "server.log"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "exportd_server", "serve"),
                *("--listen", "127.0.0.1:0", "--data-dir", str(data_dir)),
                *("--sample-rows", str(rows)),
                *("--log-level", "warning", "--log-style", "console"),
            ],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
    try:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        address = process.stdout.readline().strip()
        if not address:
            sys.exit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
        yield address
        process.terminate()
        if process.wait(30) != 0:
            sys.exit(f"the server ended with exit code {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def exportd(address: str, *arguments: str) -> str:
    """Run the client command; its progress goes to the terminal."""
    command = [sys.executable, "-m", "exportd.cli", "--server", address, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def verify(file: Path, manifest: dict[str, Any]) -> str:
    """Compare a file with the manifest, independently of the client; says with what."""
    crc, sha, size = 0, hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            crc, size = crc32c(chunk, crc), size + len(chunk)
            sha.update(chunk)
    if (size, crc) != (int(manifest["bytes"]), manifest["crc32c"]):
        sys.exit(f"{file} does not match its manifest")
    # With several parts the client has compared the SHA-256 of each.
    if len(manifest["parts"]) > 1:
        return f"CRC32C {crc:08x} of the whole, SHA-256 of each part"
    if sha.digest() != base64.b64decode(manifest["sha256"]):
        sys.exit(f"{file} does not match its SHA-256")
    return f"CRC32C {crc:08x} and SHA-256 {sha.hexdigest()[:16]}..."


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path(".data"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    started = time.monotonic()
    target = options.data_dir / "demo" / "token_transfers.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (options.data_dir / "samples").exists():
        print(f"Generating sample data: {options.rows:,} token transfers …", flush=True)
    with server(options.data_dir, options.rows) as address:
        print(f"A server listens on {address}. Its datasets:\n", flush=True)
        print(exportd(address, "datasets"))
        print("Exporting token_transfers as CSV:", flush=True)
        created = json.loads(
            exportd(address, "create", "token_transfers", "--format", "csv", "--json")
        )
        job_id = created["job_id"]
        exportd(address, "watch", job_id)
        exportd(address, "download", job_id, str(target), "--force")
        job = json.loads(exportd(address, "get", job_id, "--json"))
        checked = verify(target, job["manifest"])
    rows = int(job["manifest"]["rows"])
    size = target.stat().st_size / 2**20
    print(f"\nFirst rows of {target}:\n")
    with target.open(encoding="utf-8") as stream:
        for _, line in zip(range(SHOWN_ROWS + 1), stream, strict=False):
            print("  " + line[:150].rstrip("\n") + ("…" if len(line) > 150 else ""))
    print(
        f"\n{rows:,} rows, {size:,.0f} MiB, verified: {checked}\n"
        f"The file: {target.resolve()}\n"
        f"Done in {time.monotonic() - started:.1f} s, and the server has stopped."
    )


if __name__ == "__main__":
    main()
