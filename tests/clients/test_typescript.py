"""The TypeScript client, held to what every client is held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.clients.languages import CLIENTS, lacking, make
from tests.clients.suite import ClientSuite

FOLDER = CLIENTS / "typescript"


class TypeScriptClient:
    """Runs what its Makefile builds."""

    name = "typescript"
    folder = FOLDER
    into_directories = False

    def missing(self) -> str | None:
        return lacking("node", "npm", "make")

    def build(self) -> None:
        make(FOLDER, "build")

    def check(self) -> None:
        make(FOLDER, "lint")
        make(FOLDER, "test")

    def driver(self) -> Sequence[str]:
        return ["node", str(FOLDER / "build/driver/main.js")]

    def example(self) -> Sequence[str]:
        return ["node", str(FOLDER / "build/example/main.js")]

    def snippet(self, text: str, directory: Path) -> Sequence[str]:
        modules = directory / "node_modules"
        modules.mkdir()
        (modules / "exportd").symlink_to(FOLDER, target_is_directory=True)
        program = directory / "snippet.mjs"
        program.write_text(text)
        return ["node", str(program)]


class TestTypeScript(ClientSuite):
    language = TypeScriptClient()
