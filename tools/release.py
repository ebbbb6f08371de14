"""Keeps what was released of the contract, and holds today's against it.

    python -m tools.release --check     can released clients use today's contract?
    python -m tools.release             keep this version's contract and client

Each released version has a directory in `tests/compatibility`: the compiled contract,
which `buf breaking` compares with, and the wheel of the Python client, which the tests
run against today's server. They lie in the tree, so that a checkout without tags has
them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ROOT / "tests/compatibility"
CONTRACT = "contract.binpb"
BUF = Path(sys.executable).with_name("buf")


def releases() -> list[Path]:
    """The directories of the released versions, oldest first."""
    found = [p for p in RELEASES.iterdir() if re.fullmatch(r"v\d+\.\d+\.\d+", p.name)]
    return sorted(found, key=lambda p: [int(n) for n in p.name[1:].split(".")])


def check() -> int:
    """Hold the contract against the last release; returns the exit code."""
    kept = releases()
    if not kept:
        print(f"{RELEASES.relative_to(ROOT)} has no release to compare with")
        return 1
    last = kept[-1] / CONTRACT
    return subprocess.run(
        [BUF, "breaking", "proto", "--against", last], check=False, cwd=ROOT
    ).returncode


def keep() -> int:
    """Keep the contract and the client of the version that the client has now."""
    project = tomllib.loads((ROOT / "clients/python/pyproject.toml").read_text())
    place = RELEASES / f"v{project['project']['version']}"
    if place.exists():
        print(f"{place.relative_to(ROOT)} is there: what was released stays as it is")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary)
        subprocess.run(
            [BUF, "build", "proto", "--exclude-source-info", "-o", built / CONTRACT],
            check=True,
            cwd=ROOT,
        )
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"),
                *("--quiet", "--no-deps", "--no-build-isolation"),
                *("--wheel-dir", built, ROOT / "clients/python"),
            ],
            check=True,
        )
        place.mkdir()
        for path in built.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
            print((place / path.name).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(check() if sys.argv[1:] == ["--check"] else keep())
