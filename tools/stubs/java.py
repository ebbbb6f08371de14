"""The Java stubs, by protoc and the plug-in that `clients/java/pom.xml` pins."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from tools.stubs.base import PROTO, ROOT, Generator, contract

MODULE = ROOT / "clients/java"

PLATFORM = "linux-x86_64"
"""The one that the plug-in's binaries are published for, as Maven's artifacts name it."""

HASHES = {
    f"protoc-{PLATFORM}.exe": (
        "f6ee22d65361338459208da8bff801c9ca689741cba9187b34990dd45198f864"
    ),
    f"protoc-gen-grpc-java-{PLATFORM}.exe": (
        "a19ae74aa4cb03e1d01269562ac6165ec32a848a7bebd032aea9a0b9569718ba"
    ),
    "protobuf-java.jar": "0773e72eaf375e1285df330575bfec5bda5da674d544d0e142a17f89c8f754da",
}
"""SHA-256 of what is run and read: Maven has no lock that could hold it."""


class Java:
    """Messages and services of `exportd.v1`; the `google.rpc` ones come from a library."""

    name = "java"
    committed = MODULE / "src/generated/java"

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        here = f"{platform.system()}-{platform.machine()}".lower()
        if here != PLATFORM:
            return f"its binaries are pinned for {PLATFORM}, and this is {here}"
        return next(
            (
                f"{tool} is not installed"
                for tool in ("java", "mvn")
                if shutil.which(tool) is None
            ),
            None,
        )

    def generate(self, target: Path) -> None:
        """Write what `committed` should hold below `target`.

        The first run on a machine fetches the binaries into Maven's cache. Raises
        `ValueError` when they are not those that are pinned.
        """
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            tools = Path(directory)
            subprocess.run(
                [
                    *("mvn", "--batch-mode", "--quiet", "--strict-checksums"),
                    *("--file", MODULE / "pom.xml", "dependency:copy@generators"),
                    f"-Dgenerators.platform={PLATFORM}",
                    f"-Dgenerators.directory={tools}",
                ],
                check=True,
            )
            for name, wanted in HASHES.items():
                with (tools / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != wanted:
                    raise ValueError(f"{name} has SHA-256 {found}, not the pinned {wanted}")
            protoc = tools / f"protoc-{PLATFORM}.exe"
            plugin = tools / f"protoc-gen-grpc-java-{PLATFORM}.exe"
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
                    *contract(),
                ],
                check=True,
            )


GENERATOR: Generator = Java()
