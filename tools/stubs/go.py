"""The Go stubs, by the plug-ins of protoc that `clients/go/go.mod` pins as tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.stubs.base import PROTO, ROOT, Generator, contract

MODULE = ROOT / "clients/go"
PACKAGE = "exportd.internal/go/exportd/v1"
PLUGINS = (
    "google.golang.org/protobuf/cmd/protoc-gen-go",
    "google.golang.org/grpc/cmd/protoc-gen-go-grpc",
)


class Go:
    """Messages and services of `exportd.v1`; the `google.rpc` ones come from a module."""

    name = "go"
    committed = MODULE / "exportd/v1"

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        return None if shutil.which("go") else "go is not installed"

    def generate(self, target: Path) -> None:
        """Write what `committed` should hold below `target`.

        The first run on a machine fetches the plug-ins; `go.sum` holds their hashes.
        """
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(
                ["go", "build", "-C", MODULE, "-mod=readonly", "-o", directory, *PLUGINS],
                check=True,
            )
            subprocess.run(
                [
                    *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"),
                    *(f"--plugin={Path(directory) / Path(p).name}" for p in PLUGINS),
                    *(f"--go_out={target}", f"--go_opt=module={PACKAGE}"),
                    *(f"--go-grpc_out={target}", f"--go-grpc_opt=module={PACKAGE}"),
                    *map(str, contract()),
                ],
                check=True,
            )


GENERATOR: Generator = Go()
