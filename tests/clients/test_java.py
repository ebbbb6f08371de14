"""The Java client, held to what every client is held to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tests.clients.languages import CLIENTS, lacking, make
from tests.clients.suite import ClientSuite

FOLDER = CLIENTS / "java"


class JavaClient:
    """Runs what its Makefile builds."""

    name = "java"
    folder = FOLDER
    into_directories = False

    def missing(self) -> str | None:
        return lacking("java", "javac", "mvn", "make")

    def build(self) -> None:
        make(FOLDER, "build")

    def check(self) -> None:
        make(FOLDER, "lint")
        make(FOLDER, "test")

    def driver(self) -> Sequence[str]:
        return ["java", f"@{FOLDER / 'target/driver.args'}"]

    def example(self) -> Sequence[str]:
        return ["java", f"@{FOLDER / 'target/example.args'}"]

    def snippet(self, text: str, directory: Path) -> Sequence[str]:
        program = directory / "Positions.java"
        program.write_text(text)
        found = re.search(r'-cp "([^"]+)"', (FOLDER / "target/example.args").read_text())
        assert found is not None
        return ["java", "-cp", found[1], str(program)]


class TestJava(ClientSuite):
    language = JavaClient()
