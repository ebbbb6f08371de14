"""What a process would write past its log stands in it, one JSON object a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

START = """
import asyncio, gc, sys, threading, warnings
from exportd_server.platform.logging import configure_logging, log_everything
configure_logging("info", "json")
log_everything()
"""

WARNING = """
warnings.warn("two\\nlines", stacklevel=1)
"""
UNCAUGHT = """
raise ValueError("two\\nlines")
"""
THREAD = """
def work():
    raise ValueError("two\\nlines")
thread = threading.Thread(target=work, name="a thread")
thread.start()
thread.join()
"""
LOOP = """
async def work():
    def late():
        raise ValueError("two\\nlines")
    asyncio.get_running_loop().call_soon(late)
    await asyncio.sleep(0)
asyncio.run(work())
"""
TASK = """
async def work():
    async def fails():
        raise ValueError("two\\nlines")
    asyncio.create_task(fails())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
asyncio.run(work())
"""
IGNORED = """
class Odd:
    def __del__(self):
        raise ValueError("two\\nlines")
Odd()
"""
LIBRARY = """
import logging
logging.getLogger("a.library").warning("two\\nlines")
"""


def run(code: str, **variables: str) -> tuple[int, str, list[dict[str, Any]]]:
    """A process of its own: its exit code, its output, and what it logged."""
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    return done.returncode, done.stdout, lines


@pytest.mark.parametrize(
    ("code", "level", "event", "exit_code"),
    [
        (WARNING, "warning", "UserWarning: two\nlines", 0),
        (UNCAUGHT, "critical", "uncaught exception", 1),
        (THREAD, "error", "uncaught exception in a thread", 0),
        (LOOP, "error", "Exception in callback", 0),
        (TASK, "error", "Task exception was never retrieved", 0),
        (IGNORED, "error", "ignored exception", 0),
        (LIBRARY, "warning", "two\nlines", 0),
    ],
    ids=["warning", "uncaught", "thread", "callback", "task", "ignored", "library"],
)
def test_it_is_one_line_of_json(code: str, level: str, event: str, exit_code: int) -> None:
    ended, _, [line] = run(code)
    assert ended == exit_code
    assert line["level"] == level
    assert event in line["event"]
    assert line["timestamp"]
    if level in {"error", "critical"}:
        assert line["exception"][0]["exc_type"] == "ValueError"
        assert line["exception"][0]["exc_value"] == "two\nlines"


def test_an_interrupted_thread_that_exits_says_nothing() -> None:
    assert run(THREAD.replace('ValueError("two\\nlines")', "SystemExit"))[2] == []


def test_grpc_writes_no_lines_of_its_own_unless_the_operator_wants_them() -> None:
    told = """
import os
print(os.environ["GRPC_VERBOSITY"])
"""
    assert run(told)[1].strip() == os.environ.get("GRPC_VERBOSITY", "NONE")
    assert run(told, GRPC_VERBOSITY="ERROR")[1].strip() == "ERROR"


def test_grpc_is_not_loaded_before_the_command_has_chosen() -> None:
    code = """
import exportd_server.cli
print("grpc" in sys.modules)
"""
    assert run(code)[1].strip() == "False"
