"""TypeScript stubs: ts-proto, pinned by the client's package-lock.json.

It runs as a plug-in of the protoc that comes with grpcio-tools. `error_details.proto`,
which the server's errors use and the contract does not import, comes with
googleapis-common-protos.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from tools.stubs.base import PROTO, ROOT, Generator, contract

_CLIENT = ROOT / "clients/typescript"
_PLUGIN = _CLIENT / "node_modules/.bin/protoc-gen-ts_proto"

_OPTIONS = (
    # Stubs of grpc-js, and a description of the service that says what is idempotent.
    "outputServices=grpc-js",
    "outputServices=generic-definitions",
    "forceLong=bigint",  # a number would round what is above 2**53
    "oneof=unions-value",
    "removeEnumPrefix=true",
    "unrecognizedEnum=false",
    "outputJsonMethods=false",
    "useExactTypes=false",
    "useDate=false",  # a Date has milliseconds, the contract has nanoseconds
    "exportCommonSymbols=false",  # so that one module can export them all
    "importSuffix=.js",  # as ES modules want it
    "annotateFilesWithVersion=false",  # the lock file has them
)


class TypeScriptStubs:
    """The messages, the service, and `google.rpc`, by ts-proto."""

    name = "typescript"
    committed = _CLIENT / "src/gen"

    def missing(self) -> str | None:
        """It needs node, and what the lock file names."""
        if shutil.which("node") is None:
            return "node is not installed"
        if not _PLUGIN.exists():
            return "ts-proto is not installed: run npm ci in clients/typescript"
        return None

    def generate(self, target: Path) -> None:
        """Write one module for each proto, in the directories of their packages."""
        commons = Path(str(files("google.rpc") / "error_details.proto")).parents[2]
        target.mkdir()
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"-I{PROTO}",
                f"-I{commons}",
                f"--plugin=protoc-gen-ts_proto={_PLUGIN}",
                f"--ts_proto_out={target}",
                f"--ts_proto_opt={','.join(_OPTIONS)}",
                *map(str, contract()),
                "google/rpc/error_details.proto",
            ],
            check=True,
        )


GENERATOR: Generator = TypeScriptStubs()
