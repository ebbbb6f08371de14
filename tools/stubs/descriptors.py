"""Compiles the contract with its comments: what the server's reflection answers from."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

from tools.stubs.base import PROTO, ROOT, Generator, contract


class Descriptors:
    """A `google.protobuf.FileDescriptorSet` of the contract's own files."""

    name = "descriptors"
    committed = ROOT / "service/exportd_server/api/contract.binpb"

    def missing(self) -> str | None:
        """Nothing, wherever the checks run."""
        return None

    def generate(self, target: Path) -> None:
        """Write the file."""
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}"),
                *("--include_source_info", f"--descriptor_set_out={target}"),
                *map(str, contract()),
            ],
            check=True,
        )


def descriptors() -> descriptor_pb2.FileDescriptorSet:
    """The contract, compiled."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "contract.binpb"
        GENERATOR.generate(target)
        return descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes())


GENERATOR: Generator = Descriptors()
