"""Generates the Python stubs from `proto/`, or checks that they are current.

    python tools/generate.py [--check]

The generators come pinned with the locked development requirements, and nothing is
fetched.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
STUBS = ROOT / "clients/python/src/exportd/v1"


def generate(target: Path) -> None:
    """Write the package `exportd.v1` below `target`."""
    protos = sorted(PROTO.glob("exportd/v1/*.proto"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTO}",
            f"--python_out={target}",
            f"--mypy_out=quiet:{target}",
            f"--grpc_python_out={target}",
            f"--mypy_grpc_out=quiet:{target}",
            *map(str, protos),
        ],
        check=True,
        # The mypy plugins stand beside this interpreter.
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
    )
    package = target / "exportd/v1"
    for proto in protos:
        if "\nservice " not in proto.read_text():
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):
                (package / f"{proto.stem}{suffix}").unlink(missing_ok=True)
    (package / "__init__.py").write_text("")


def main() -> int:
    """Generate or check; returns the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / "exportd/v1"
        generate(Path(temporary))
        if sys.argv[1:] != ["--check"]:
            shutil.rmtree(STUBS, ignore_errors=True)
            shutil.copytree(fresh, STUBS)
            return 0
        names = {path.name for path in (*fresh.iterdir(), *STUBS.glob("*.py*"))}
        _, different, missing = filecmp.cmpfiles(fresh, STUBS, names, shallow=False)
        for name in sorted((*different, *missing)):
            print(f"{STUBS.relative_to(ROOT) / name} is not current: run make gen")
        return 1 if different or missing else 0


if __name__ == "__main__":
    sys.exit(main())
