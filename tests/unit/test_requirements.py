"""requirements.toml tells the truth: every requirement stands in it, and every test it
names exists."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
MAP = tomllib.loads((TESTS / "requirements.toml").read_text(encoding="utf-8"))
GROUPS = {"E": 11, "S": 11, "D": 10, "P": 10, "L": 9, "Q": 2}
IDS = [f"{group}{n}" for group, count in GROUPS.items() for n in range(1, count + 1)]


@cache
def defined(path: Path) -> set[str]:
    """Test functions of a file, and `Class::method` of its classes."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}::{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            # A Hypothesis state machine becomes a test case by assignment.
            names.add(node.targets[0].id)
    return names


def test_every_requirement_stands_in_the_map() -> None:
    assert list(MAP) == IDS


@pytest.mark.parametrize("requirement", IDS)
def test_a_requirement_is_shown_by_tests_that_exist(requirement: str) -> None:
    entry = MAP[requirement]
    assert set(entry) <= {"text", "tests", "open"}
    assert entry["text"]
    # Either tests show it, or it says what is still missing; both, when it is partly
    # there.
    assert entry.get("tests") or entry.get("open")
    for node in entry.get("tests", []):
        file, _, name = node.partition("::")
        assert name, node
        assert name in defined(TESTS / file), node
        assert re.search(r"(^|::)(test_|Test)", name), f"{node} is no test"
