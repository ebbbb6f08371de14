"""The commands around the code do what they say, and the pages say what is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.audit import LOCKS, lock_faults
from tools.configuration import TARGET, page

ROOT = Path(__file__).resolve().parents[2]


def test_one_command_makes_every_check() -> None:
    plan = subprocess.run(
        ["make", "--dry-run", "check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for tool in (
        "ruff format --check",
        "ruff check",
        "mypy",
        "basedpyright",
        "lint-imports",
        "buf lint",
        "tools.generate --check",
        "tools.release --check",
        "tools/api_reference.py --check",
        "tools/configuration.py --check",
        "tools/metrics.py --check",
        "tools/audit.py",
        "tools/licences.py --check",
    ):
        assert tool in plan, tool
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "make check" in ci
    assert "make test" in ci
    assert "make clients" in ci


def test_the_configuration_page_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == page()


def test_the_locks_are_complete_and_name_no_place() -> None:
    for lock in LOCKS:
        assert lock_faults(lock.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("--index-url x\n", "names an index"),
        ("a @ ftp://x/a.whl\n", "holds an address"),
        ("a>=1 --hash=sha256:00\n", "unpinned"),
        ("a==1\n", "without hashes"),
    ],
)
def test_a_faulty_lock_is_told(text: str, fault: str) -> None:
    assert any(fault in found for found in lock_faults(text))
