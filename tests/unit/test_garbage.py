"""What is there for good is none of the collector's business."""

from __future__ import annotations

import subprocess
import sys

import pytest


def told(program: str) -> str:
    """What a fresh interpreter prints: this one's collector is the tests' own."""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_start_collects_nothing_and_leaves_what_it_made_alone() -> None:
    program = (
        "import gc, sys\n"
        "began = []\n"
        "gc.callbacks.append(lambda phase, info: began.append(info['generation']))\n"
        "sys.argv = ['exportd-server', '--version']\n"
        "from exportd_server import __main__\n"
        "began.clear()\n"
        "try: __main__.main()\n"
        "except SystemExit: pass\n"
        "print('exportd_server.cli' in sys.modules, gc.isenabled(),"
        " gc.get_freeze_count() > 20_000, len(began))"
    )
    *settled, collections = told(program).splitlines()[-1].split()
    assert settled == ["True", "True", "True"]
    # Of the youngest, by the command itself; the imports alone would be some fifty.
    assert int(collections) <= 5


def test_what_comes_later_is_collected() -> None:
    program = (
        "import gc, weakref\n"
        "from exportd_server.platform.garbage import uncollected\n"
        "class Cycle:\n"
        "    def __init__(self): self.itself = self\n"
        "with uncollected(): kept = weakref.ref(Cycle())\n"
        "late = weakref.ref(Cycle())\n"
        "gc.collect()\n"
        "print(kept() is None, late() is None)"
    )
    assert told(program) == "False True"


def test_the_end_of_a_process_takes_all_of_it_apart() -> None:
    """What is left of modules in C is complained of."""
    program = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "from exportd_server.platform.garbage import uncollected\n"
        "with uncollected(): pass\n"
        "assert gc.get_freeze_count()"
    )
    assert told(program) == "0"


@pytest.mark.parametrize("module", ["exportd_server", "exportd_server.cli"])
def test_the_command_is_a_module_too(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "version" in done.stdout
