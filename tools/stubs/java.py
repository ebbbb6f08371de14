"""The Java stubs, by protoc and the plug-in that `clients/java/pom.xml` pins."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.stubs.base import Generator

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
MODULE = ROOT / "clients/java"

# As Maven's artifacts name them.
SYSTEMS = {"Linux": "linux", "Darwin": "osx"}
MACHINES = {"x86_64": "x86_64", "aarch64": "aarch_64", "arm64": "aarch_64"}


class Java:
    """Messages and services of `exportd.v1`; the `google.rpc` ones come from a library."""

    name = "java"
    committed = MODULE / "src/generated/java"

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        if _classifier() is None:
            return f"no protoc is published for {platform.system()} {platform.machine()}"
        return next(
            (f"{tool} is not installed" for tool in ("java", "mvn") if not _found(tool)),
            None,
        )

    def generate(self, target: Path) -> None:
        """Write what `committed` should hold below `target`.

        The first run on a machine fetches the binaries into Maven's cache; Maven holds
        them against the checksums that they were published with.
        """
        target.mkdir(parents=True, exist_ok=True)
        classifier = _classifier()
        with tempfile.TemporaryDirectory() as directory:
            tools = Path(directory)
            subprocess.run(
                [
                    *("mvn", "--batch-mode", "--quiet", "--strict-checksums"),
                    *("--file", MODULE / "pom.xml", "dependency:copy@generators"),
                    f"-Dgenerators.platform={classifier}",
                    f"-Dgenerators.directory={tools}",
                ],
                check=True,
            )
            protoc = tools / f"protoc-{classifier}.exe"
            plugin = tools / f"protoc-gen-grpc-java-{classifier}.exe"
            for tool in (protoc, plugin):
                tool.chmod(0o755)
            with zipfile.ZipFile(tools / "protobuf-java.jar") as library:
                common = [n for n in library.namelist() if n.endswith(".proto")]
                library.extractall(tools / "include", common)
            subprocess.run(
                [
                    *(protoc, f"-I{PROTO}", f"-I{tools / 'include'}"),
                    f"--plugin=protoc-gen-grpc-java={plugin}",
                    *(f"--java_out={target}", f"--grpc-java_out=@generated=omit:{target}"),
                    *sorted(PROTO.glob("exportd/v1/*.proto")),
                ],
                check=True,
            )


def _found(tool: str) -> bool:
    return shutil.which(tool) is not None


def _classifier() -> str | None:
    """This machine's, or None when nothing is published for it."""
    system, machine = SYSTEMS.get(platform.system()), MACHINES.get(platform.machine())
    return f"{system}-{machine}" if system and machine else None


GENERATOR: Generator = Java()
