"""Generates the Python stubs, with their types."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.stubs.base import PROTO, ROOT, Generator, contract


class PythonStubs:
    """By the tools of the locked development requirements."""

    name = "python"
    committed = ROOT / "clients/python/src/exportd/v1"

    def missing(self) -> str | None:
        """Nothing, wherever the checks run."""
        return None

    def generate(self, target: Path) -> None:
        """Write the package `exportd.v1`."""
        with tempfile.TemporaryDirectory() as temporary:
            _generate(Path(temporary))
            shutil.copytree(Path(temporary) / "exportd/v1", target)


def _generate(target: Path) -> None:
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
            *map(str, contract()),
        ],
        check=True,
        # The mypy plugins stand beside this interpreter.
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
    )
    package = target / "exportd/v1"
    for proto in contract():
        if "\nservice " not in proto.read_text():
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):
                (package / f"{proto.stem}{suffix}").unlink(missing_ok=True)
    (package / "__init__.py").write_text("")


GENERATOR: Generator = PythonStubs()
