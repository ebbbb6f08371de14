"""The audit of what is locked fails unless somebody answered, and nothing was found but
what is let through with a reason, for a while."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tools.audit import IGNORED, main, read_ignored

TODAY = datetime.now(UTC).date()
FINE: dict[str, Any] = {"name": "fine", "version": "1.0", "vulns": []}
UNKNOWN: dict[str, Any] = {"name": "odd", "skip_reason": "Dependency not found"}
WEAK: dict[str, Any] = {
    "name": "weak",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}],
}


class Index:
    """Stands for pip-audit and the index that it asks."""

    def __init__(self, folder: Path) -> None:
        self._module = folder / "pip_audit.py"
        self._ignored = folder / "advisories.toml"
        self._ignored.touch()

    def says(self, *packages: dict[str, Any], code: int = 0) -> None:
        answer = json.dumps({"dependencies": packages, "fixes": []})
        self._module.write_text(f"import sys\nprint({answer!r})\nsys.exit({code})\n")

    def fails(self, text: str, code: int) -> None:
        said = f"import sys\nsys.stderr.write({text!r})\nsys.exit({code})\n"
        self._module.write_text(said)

    def ignoring(self, expires: date | str, **fields: str) -> None:
        entry = {
            "id": '"PYSEC-1"',
            "reason": '"no caller reaches it"',
            "date": str(TODAY - timedelta(days=3)),
            "expires": str(expires),
            **fields,
        }
        lines = [f"{key} = {value}" for key, value in entry.items() if value]
        self._ignored.write_text("\n".join(["[[ignored]]", *lines]))

    def audit(self, *arguments: str) -> int:
        return main(["--ignored", str(self._ignored), *arguments])


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    # Found before the installed one.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Index(tmp_path)


def test_an_index_that_answers_and_finds_nothing_passes(index: Index) -> None:
    index.says(FINE)
    assert index.audit() == 0


@pytest.mark.parametrize("arguments", [(), ("--unanswered-ok",)])
def test_a_weakness_fails(
    index: Index, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    index.says(FINE, WEAK, code=1)
    assert index.audit(*arguments) == 1
    assert "weak 1.0: PYSEC-1, mended in 1.1" in capsys.readouterr().out


def test_an_index_without_answers_fails_unless_that_is_said(
    index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    for away in (False, True):
        if away:
            index.fails("ERROR:pip_audit._cli:connection refused", 1)
        else:
            index.says(UNKNOWN, UNKNOWN)
        assert index.audit() == 1
        assert index.audit("--unanswered-ok") == 0
        assert capsys.readouterr().out.count("NOT AUDITED") == 2


def test_an_index_that_answers_for_some_has_to_answer_for_all(index: Index) -> None:
    index.says(FINE, UNKNOWN)
    assert index.audit("--unanswered-ok") == 1


@pytest.mark.parametrize(
    ("text", "code"), [("usage: pip-audit", 2), ("No module named pip_audit", 1)]
)
def test_a_tool_that_does_not_run_is_no_silent_index(
    index: Index, text: str, code: int
) -> None:
    index.fails(text, code)
    assert index.audit("--unanswered-ok") == 1


def test_no_packages_at_all_are_no_answer(index: Index) -> None:
    index.says()
    assert index.audit("--unanswered-ok") == 1


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_a_weakness_with_a_reason_is_let_through(index: Index, name: str) -> None:
    index.says(FINE, WEAK, code=1)
    index.ignoring(TODAY + timedelta(days=30), id=f'"{name}"')
    assert index.audit() == 0


def test_a_weakness_is_let_through_until_its_day_comes(
    index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    index.says(FINE, WEAK, code=1)
    index.ignoring(TODAY)
    assert index.audit() == 1
    told = capsys.readouterr().out
    assert "expired" in told
    assert "weak 1.0: PYSEC-1" in told


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"reason": ""}, "needs reason"),
        ({"reason": '" "'}, "needs reason"),
        ({"date": ""}, "needs date"),
        ({"date": '"2026-01-01"'}, "needs date"),
        ({"date": "2026-01-01T00:00:00Z"}, "needs date"),
        ({"expires": ""}, "needs expires"),
        ({"expires": "9999-01-01"}, "183 days"),
        ({"date": "9999-01-01"}, "to come"),
        ({"id": ""}, "needs id"),
        ({"note": '"x"'}, "note is not known"),
    ],
)
def test_an_entry_out_of_form_fails(
    index: Index,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, str],
    told: str,
    answered: bool,
) -> None:
    index.says(*([WEAK] if answered else [UNKNOWN]))
    index.ignoring(**{"expires": str(TODAY + timedelta(days=30)), **fields})
    assert index.audit("--unanswered-ok") == 1
    assert told in capsys.readouterr().out


def test_an_entry_that_nothing_needs_any_more_fails(index: Index) -> None:
    index.says(FINE)
    index.ignoring(TODAY + timedelta(days=30))
    assert index.audit() == 1


@pytest.mark.parametrize("text", ["[[", "ignored = 3", "ignored = [3]", "[[ignore]]\n"])
def test_a_file_out_of_form_is_told(text: str) -> None:
    ids, faults = read_ignored(text, TODAY)
    assert not ids
    assert faults


def test_an_entry_that_is_there_twice_is_told() -> None:
    entry = '[[ignored]]\nid = "a"\nreason = "r"\ndate = 2026-01-01\nexpires = 2026-02-01\n'
    assert read_ignored(entry, date(2026, 1, 2)) == ({"a"}, [])
    _, faults = read_ignored(2 * entry, date(2026, 1, 2))
    assert faults == ["a: is there twice"]


def test_the_file_of_ignored_advisories_is_in_form() -> None:
    _, faults = read_ignored(IGNORED.read_text(encoding="utf-8"), TODAY)
    assert not faults


def test_make_audits_strictly_when_it_is_told_to() -> None:
    def plan(*arguments: str) -> str:
        made = subprocess.run(
            ["make", "--dry-run", "check", *arguments],
            cwd=IGNORED.parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        (line,) = (each for each in made.stdout.splitlines() if "tools/audit.py" in each)
        return line.strip()

    assert plan().endswith("tools/audit.py --unanswered-ok")
    assert plan("ADVISORIES=").endswith("tools/audit.py")
