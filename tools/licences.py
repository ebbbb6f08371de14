"""Lists the licences of what exportd runs on.

    python tools/licences.py           write docs/licences.md
    python tools/licences.py --check   fail when it is not current

A package without a licence, or with one that is not among those allowed here, fails both.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    requires,
)
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements/runtime.txt"
PAGE = ROOT / "docs/licences.md"
PROJECT = ROOT / "pyproject.toml"

ALLOWED = {
    *("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "PSF-2.0", "MPL-2.0", "CC0-1.0"),
    *("0BSD", "Zlib", "MIT-0", "ISC"),
    # Used as libraries of their own, unchanged and replaceable, as it asks.
    *("LGPL-2.1-or-later", "LGPL-3.0-only"),
}
_SPELLINGS = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.1-or-later",
}


def locked() -> list[str]:
    """Names in the lock of what a server needs."""
    return sorted(re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(), re.MULTILINE))


def added() -> list[str]:
    """What the extras of the server bring besides."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = project["optional-dependencies"].values()
    left = [Requirement(each).name for extra in extras for each in extra]
    found: set[str] = set()
    while left:
        name = canonicalize_name(left.pop())
        if name in found or name in locked():
            continue
        found.add(name)
        needed = [Requirement(each) for each in requires(name) or ()]
        left += [n.name for n in needed if not n.marker or n.marker.evaluate({"extra": ""})]
    return sorted(found)


def licence_of(package: Distribution) -> str:
    """What the package says, as an SPDX expression; empty when it says nothing."""
    said = package.metadata.json
    told = str(said.get("license_expression", ""))
    if not told:
        marks = package.metadata.get_all("Classifier") or []
        names = [m.rpartition(" :: ")[2] for m in marks if m.startswith("License ::")]
        names = [name for name in names if name not in ("OSI Approved", "DFSG approved")]
        told = names[0] if names else str(said.get("license", "")).split("\n")[0]
    return _SPELLINGS.get(told, told)


def faults_and_page() -> tuple[list[str], str]:
    """What is not allowed, and the list."""
    faults = []
    lines = []
    for name in sorted([*locked(), *added()]):
        try:
            found = licence_of(distribution(name))
        except PackageNotFoundError:
            # Of another platform.
            continue
        parts = set(re.split(r" (?:AND|OR) |[()]", found)) - {""}
        if not parts or not parts <= ALLOWED:
            faults.append(f"{name}: licence {found!r} is not among those allowed")
        lines.append(f"| {name} | {found} |\n")
    head = (
        "# Licences\n\nOf the packages that a server runs on, those of its extras among "
        "them, as each of them states it. "
        "`python tools/licences.py` makes this page, and `make check` holds it to the "
        "truth.\n\n| Package | Licence |\n|---|---|\n"
    )
    return faults, head + "".join(lines)


def main() -> int:
    """Write or check; returns the exit code."""
    faults, page = faults_and_page()
    for fault in faults:
        print(fault)
    if "--check" in sys.argv[1:]:
        # It may list more: packages of other platforms and Pythons.
        if not set(page.splitlines()) <= set(PAGE.read_text().splitlines()):
            print("docs/licences.md is not current; run python tools/licences.py")
            return 1
    else:
        PAGE.write_text(page)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
