"""Audits the locked requirements: complete hashes, no addresses, no known weaknesses.

    python tools/audit.py [--unanswered-ok] [--ignored FILE]

Known weaknesses are asked of the package index by pip-audit. One that is found fails,
unless `requirements/advisories.toml` lets it through:

    [[ignored]]
    id = "PYSEC-2026-1"
    reason = "only its server is weak, and nothing here starts it"
    date = 2026-11-01
    expires = 2027-02-01

An entry without all of these fails, one whose day has come, one for longer than half a
year, and one that nothing needs any more.

Not every index answers such questions; a mirror may not. Then nothing was audited, and
that fails, too, unless `--unanswered-ok` says by name that it is known. It is for an index
that answers nothing at all: an answer for some packages and not for others fails always.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = tuple(ROOT / f"requirements/{name}.txt" for name in ("runtime", "dev", "fuzz"))
IGNORED = ROOT / "requirements/advisories.toml"
LONGEST_DAYS = 183
_USAGE = 2
"""How pip-audit ends when it is called with what it does not know."""


def lock_faults(text: str) -> list[str]:
    """What is wrong with the text of a lock file."""
    faults = []
    if re.search(r"^\s*(-i|--(extra-)?index-url|--find-links|-f)\b", text, re.MULTILINE):
        faults.append("names an index")
    if "://" in text:
        faults.append("holds an address")
    logical = text.replace("\\\n", " ").splitlines()
    for line in logical:
        requirement = line.split("#")[0].strip()
        if not requirement:
            continue
        if not re.match(r"[A-Za-z0-9._-]+(\[[^]]*])?==\S+", requirement):
            faults.append(f"has an unpinned line: {requirement[:60]}")
        elif "--hash=sha256:" not in requirement:
            faults.append(f"has a line without hashes: {requirement[:60]}")
    return faults


# --- what is let through


def read_ignored(text: str, today: date) -> tuple[set[str], list[str]]:
    """The ids that a file of ignored advisories lets through, and what is wrong with it."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return set(), [f"is not TOML: {error}"]
    entries = document.pop("ignored", [])
    faults = [f"{key} is not known; entries stand under [[ignored]]" for key in document]
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        return set(), [*faults, "ignored must be tables: [[ignored]]"]
    ids: set[str] = set()
    for number, entry in enumerate(entries):
        name = entry.get("id") or f"entry {number}"
        wrong = [*_entry_faults(entry, today)]
        if name in ids:
            wrong.append("is there twice")
        faults += [f"{name}: {each}" for each in wrong]
        if not wrong:
            ids.add(name)
    return ids, faults


def _entry_faults(entry: Mapping[str, Any], today: date) -> Iterator[str]:
    kinds = {"id": str, "reason": str, "date": date, "expires": date}
    for key in entry.keys() - kinds.keys():
        yield f"{key} is not known; an entry has {', '.join(kinds)}"
    lacking = [
        key
        for key, kind in kinds.items()
        # A moment is a date to Python, and a text of spaces says nothing.
        if type(entry.get(key)) is not kind or not str(entry[key]).strip()
    ]
    for key in lacking:
        yield f"needs {key}, " + ("a date" if kinds[key] is date else "a text")
    if lacking:
        return
    if entry["date"] > today:
        yield f"date: {entry['date']} is still to come"
    if entry["expires"] <= today:
        yield f"expired on {entry['expires']}; mend it, or look at it again and say so"
    if (entry["expires"] - entry["date"]).days > LONGEST_DAYS:
        yield f"expires: at most {LONGEST_DAYS} days after date"


# --- what is known


@dataclass(frozen=True)
class Answer:
    """What the index said. `silent` tells why it said nothing at all."""

    packages: Sequence[Mapping[str, Any]] = ()
    silent: str = ""

    def weaknesses(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each that was found, and in what package."""
        for package in self.packages:
            for weakness in package.get("vulns", ()):
                yield f"{package['name']} {package['version']}", weakness

    def unanswered(self) -> list[str]:
        """Packages that the index did not answer for."""
        return [each["name"] for each in self.packages if "skip_reason" in each]


def ask() -> Answer:
    """Ask the index about everything that is locked. Raises `RuntimeError` when it could
    not even be asked."""
    # What is locked for the tests includes what is locked for the service.
    locks = [part for lock in LOCKS[1:] for part in ("--requirement", str(lock))]
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", *locks, "--disable-pip"),
            *("--require-hashes", "--format", "json", "--progress-spinner", "off"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    said = report.stderr.strip()[-300:]
    if report.returncode == _USAGE or "No module named" in said:
        raise RuntimeError(f"pip-audit cannot be run: {said}")
    try:
        packages = json.loads(report.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        return Answer(silent=said or "pip-audit says nothing")
    answer = Answer(packages)
    if not packages:
        raise RuntimeError("pip-audit found no package in the locks")
    if len(answer.unanswered()) == len(packages):
        return Answer(silent=f"no answer for any of {len(packages)} packages")
    return answer


def audit_faults(answer: Answer, ignored: set[str]) -> list[str]:
    """What is wrong by what the index said."""
    faults, needed = [], set()
    for package, weakness in answer.weaknesses():
        ids = {weakness["id"], *weakness.get("aliases", ())}
        needed |= ids & ignored
        if not ids & ignored:
            mended = ", ".join(weakness["fix_versions"]) or "no release yet"
            faults.append(f"{package}: {weakness['id']}, mended in {mended}")
    unanswered = answer.unanswered()
    if unanswered:
        faults.append(f"NOT AUDITED, no answer for {', '.join(unanswered)}")
    faults += [
        f"{IGNORED.name}: {name}: nothing has it any more; delete the entry"
        for name in sorted(ignored - needed)
    ]
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python tools/audit.py")
    parser.add_argument(
        "--unanswered-ok",
        action="store_true",
        help="the package index here is known to answer no question about weaknesses",
    )
    parser.add_argument("--ignored", type=Path, default=IGNORED)
    said = parser.parse_args(arguments)
    faults = [
        f"{lock.name} {fault}" for lock in LOCKS for fault in lock_faults(lock.read_text())
    ]
    ignored, wrong = read_ignored(said.ignored.read_text(), datetime.now(UTC).date())
    faults += [f"{said.ignored.name}: {each}" for each in wrong]
    try:
        answer = ask()
    except RuntimeError as error:
        answer = Answer()
        faults.append(str(error))
    else:
        if not answer.silent:
            faults += audit_faults(answer, ignored)
            print(f"audited {len(answer.packages)} packages")
        else:
            print(f"NOT AUDITED: the index tells of no weaknesses: {answer.silent}")
            if not said.unanswered_ok:
                faults.append("nothing was audited; say --unanswered-ok if that is known")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
