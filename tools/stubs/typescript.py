"""TypeScript stubs: ts-proto, pinned by the client's package-lock.json.

It runs as a plug-in of the protoc that comes with grpcio-tools. npm installs it where it
is not there, or not as locked. `error_details.proto`, which the server's errors use and
the contract does not import, comes with googleapis-common-protos.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from tools.stubs.base import PROTO, ROOT, Generator, contract

_CLIENT = ROOT / "clients/typescript"
_PLUGIN = _CLIENT / "node_modules/.bin/protoc-gen-ts_proto"
_LOCK = _CLIENT / "package-lock.json"
_INSTALLED = _CLIENT / "node_modules/.package-lock.json"

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
        """It needs node and npm."""
        absent = (tool for tool in ("node", "npm") if shutil.which(tool) is None)
        return next((f"{tool} is not installed" for tool in absent), None)

    def generate(self, target: Path) -> None:
        """Write one module for each proto, in the directories of their packages.

        The first run on a machine fetches the plug-in; the lock file holds its hash.
        """
        _install()
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


def _install() -> None:
    """Install what the lock file names, unless ts-proto is there as it names it."""
    with _alone():  # npm begins by removing what another run may just have installed
        if not _PLUGIN.exists() or _ts_proto(_INSTALLED) != _ts_proto(_LOCK):
            subprocess.run(
                ["npm", "ci", "--no-audit", "--no-fund"], cwd=_CLIENT, check=True
            )


def _ts_proto(lock: Path) -> object:
    """What a lock file says of ts-proto: its version and hash; None when it is silent."""
    try:
        packages = json.loads(lock.read_text(encoding="utf-8"))["packages"]
        return packages.get("node_modules/ts-proto")
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait for other runs that install. The lock is on the directory: it leaves no file."""
    directory = os.open(_CLIENT, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


GENERATOR: Generator = TypeScriptStubs()
