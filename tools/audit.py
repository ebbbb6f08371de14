"""Audits the locked requirements: complete hashes, no addresses, no known weaknesses.

    python tools/audit.py

Known weaknesses are asked of the package index by pip-audit. Where the index does not
answer such questions (a mirror, say) that is printed, package by package count, and does
not pass as an answer; a weakness that is found fails.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "requirements/runtime.txt", ROOT / "requirements/dev.txt")


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


def main() -> int:
    """Audit; returns the exit code."""
    failed = False
    for lock in LOCKS:
        for fault in lock_faults(lock.read_text()):
            failed = True
            print(f"{lock.relative_to(ROOT)} {fault}")
    report = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip_audit",
            *("--requirement", str(LOCKS[1]), "--disable-pip", "--require-hashes"),
            *("--format", "json", "--progress-spinner", "off"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        packages = json.loads(report.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        print("NOT AUDITED: the index does not tell of known weaknesses")
        print(report.stderr.strip()[-300:])
        return 1 if failed else 0
    unanswered = [package for package in packages if "skip_reason" in package]
    for package in packages:
        for weakness in package.get("vulns", ()):
            failed = True
            print(
                f"{package['name']} {package['version']}: {weakness['id']}, "
                f"mended in {', '.join(weakness['fix_versions']) or 'no release yet'}"
            )
    if unanswered:
        print(f"NOT AUDITED: {len(unanswered)} of {len(packages)} packages, no answer")
    else:
        print(f"audited {len(packages)} packages")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
