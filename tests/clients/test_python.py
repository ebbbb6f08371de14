"""The Python client, held to what every client is held to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.clients.languages import CLIENTS
from tests.clients.suite import ClientSuite


class PythonClient:
    """Runs by the interpreter of the tests; there is nothing to build."""

    name = "python"
    folder = CLIENTS / "python"
    into_directories = True

    def missing(self) -> str | None:
        return None

    def build(self) -> None:
        pass

    def driver(self) -> Sequence[str]:
        return [sys.executable, str(CLIENTS / "python/driver.py")]

    def example(self) -> Sequence[str]:
        return [sys.executable, str(CLIENTS / "python/example.py")]

    def snippet(self, text: str, directory: Path) -> Sequence[str]:
        program = directory / "snippet.py"
        program.write_text(text)
        return [sys.executable, str(program)]


class TestPython(ClientSuite):
    language = PythonClient()
