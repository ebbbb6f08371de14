"""The seam of the clients: how a test builds one and drives it."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.support.server import ROOT

BUILD_TIMEOUT = 900
RUN_TIMEOUT = 90


class Language(Protocol):
    """A client in one language.

    Its driver is a program that does one thing with it and prints JSON, a line each:

        get JOB                                {"state"}
        watch JOB                              {"state"} for each message
        download JOB PATH [--part N] [--overwrite]
                                               {"path", "bytes", "sha256", "verified_by"}
        create DATASET FORMAT                  {"job_id"}

    It exits with 1 after `{"error": {"code", "reason", "message", "type"}}`, where the
    code is gRPC's and the reason exportd's; both are empty for an error of this machine.
    It takes `EXPORTD_SERVER`, `EXPORTD_TOKEN` and `EXPORTD_CA_CERT` from the environment.
    """

    name: str
    folder: Path
    into_directories: bool
    """Whether parts that do not join become files in a directory, instead of an error."""

    def missing(self) -> str | None:
        """What this machine lacks to build it; None when it has all."""
        ...

    def build(self) -> None:
        """Build the library, the example and the driver."""
        ...

    def check(self) -> None:
        """Run the client's own linters and unit tests."""
        ...

    def driver(self) -> Sequence[str]:
        """The command of the driver."""
        ...

    def example(self) -> Sequence[str]:
        """The command of the example, which takes the driver's environment."""
        ...

    def snippet(self, text: str, directory: Path) -> Sequence[str]:
        """Put the page's example into a program in that directory; the command that
        runs it."""
        ...


@dataclass
class Driven:
    """What a driver said, and how it ended."""

    lines: list[dict[str, Any]]
    code: int

    @property
    def result(self) -> dict[str, Any]:
        """The only answer of a call that went well."""
        assert self.code == 0, self.lines
        (line,) = self.lines
        return line

    @property
    def error(self) -> dict[str, str]:
        """The error of one that did not."""
        assert self.code == 1, self.lines
        error = self.lines[-1]["error"]
        assert isinstance(error, dict)
        return error


@dataclass
class Driver:
    """Runs a language's driver against one server."""

    language: Language
    environment: Mapping[str, str]
    wrapper: Sequence[str] = ()
    _running: list[Run] = field(default_factory=list)

    def start(self, *arguments: str) -> Run:
        """Start it; its lines come as it prints them."""
        run = Run([*self.wrapper, *self.language.driver(), *arguments], self.environment)
        self._running.append(run)
        return run

    def run(self, *arguments: str) -> Driven:
        """Run it to its end."""
        return self.start(*arguments).wait()

    def end(self) -> None:
        """Kill what still runs."""
        for run in self._running:
            run.kill()


class Run:
    """A driver that runs."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._said: list[dict[str, Any]] = []
        self._complained: list[str] = []
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._listen, self._complain)
        ]
        for thread in self._threads:
            thread.start()

    def line(self) -> dict[str, Any]:
        """Its next line."""
        line = self._lines.get(timeout=RUN_TIMEOUT)
        assert line is not None, f"it ended: {''.join(self._complained)[-2000:]}"
        self._said.append(line)
        return line

    def wait(self) -> Driven:
        """Wait until it ends."""
        try:
            code = self._process.wait(RUN_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it does not end: {self._said}") from None
        for thread in self._threads:
            thread.join(10)
        while (line := self._lines.get()) is not None:
            self._said.append(line)
        assert code in {0, 1}, f"exit code {code}: {''.join(self._complained)[-2000:]}"
        return Driven(self._said, code)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def _complain(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self._complained.append(line)


def example_of(page: Path) -> str:
    """The example of a client's page: the block of code after `<!-- example -->`."""
    found = re.search(
        r"^<!-- example -->\n+```\w*\n(.*?)^```",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None, f"{page} has no example"
    return found[1]


def lacking(*programs: str) -> str | None:
    """Which of these programs are not installed; None when all are."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def make(folder: Path, target: str) -> None:
    """Run a target of a client's own Makefile."""
    done = subprocess.run(
        ["make", "-C", str(folder), target],
        check=False,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT,
    )
    assert done.returncode == 0, (
        f"make {target}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )


CLIENTS = ROOT / "clients"
