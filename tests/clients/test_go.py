"""The Go client, held to what every client is held to."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.clients.languages import CLIENTS, lacking, make
from tests.clients.suite import ClientSuite

FOLDER = CLIENTS / "go"


class GoClient:
    """Runs what its Makefile builds."""

    name = "go"
    folder = FOLDER
    into_directories = False

    def missing(self) -> str | None:
        return lacking("go", "make")

    def build(self) -> None:
        make(FOLDER, "build")

    def check(self) -> None:
        make(FOLDER, "lint")
        make(FOLDER, "test")

    def driver(self) -> Sequence[str]:
        return [str(FOLDER / "build/driver")]

    def example(self) -> Sequence[str]:
        return [str(FOLDER / "build/example")]

    def snippet(self, text: str, directory: Path) -> Sequence[str]:
        (directory / "main.go").write_text(text)
        for arguments in (
            ["mod", "init", "example"],
            ["mod", "edit", "-replace", f"exportd.internal/go={FOLDER}"],
            ["mod", "tidy"],
            ["build", "-o", "program", "."],
        ):
            done = subprocess.run(
                ["go", *arguments],
                check=False,
                capture_output=True,
                text=True,
                cwd=directory,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
        return [str(directory / "program")]


class TestGo(ClientSuite):
    language = GoClient()
