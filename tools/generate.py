"""Generates what is made from `proto/` and kept in the tree, or checks that it is current.

    python -m tools.generate [--check] [NAME...]

Names are python, descriptors, service-config, go, typescript and java; without one it
is all of them.
The generators are pinned by version and hash. One whose language is not installed is
told of and left out.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from tools.stubs import descriptors, go, java, python, service_config, typescript
from tools.stubs.base import ROOT, Generator

GENERATORS: list[Generator] = [
    python.GENERATOR,
    descriptors.GENERATOR,
    *service_config.places(),
    go.GENERATOR,
    typescript.GENERATOR,
    java.GENERATOR,
]


def write(generator: Generator) -> None:
    """Put what it makes into the tree."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / generator.committed.name
        generator.generate(fresh)
        if fresh.is_dir():
            shutil.rmtree(generator.committed, ignore_errors=True)
            shutil.copytree(fresh, generator.committed)
        else:
            shutil.copyfile(fresh, generator.committed)


def stale(generator: Generator) -> list[Path]:
    """Files in the tree that are not what it makes: others, too few, too many."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / generator.committed.name
        generator.generate(fresh)
        names = {*_files(fresh), *_files(generator.committed)}
        return [
            generator.committed / name
            for name in sorted(names)
            if not _same(fresh / name, generator.committed / name)
        ]


def _files(place: Path) -> set[Path]:
    if not place.is_dir():
        return {Path()}
    return {
        path.relative_to(place)
        for path in place.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def main() -> int:
    """Generate or check; returns the exit code."""
    names = sorted({generator.name for generator in GENERATORS})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(names):
        parser.error(
            f"there is no {', '.join(sorted(unknown))}: take of {', '.join(names)}"
        )
    old = []
    for generator in GENERATORS:
        if asked.names and generator.name not in asked.names:
            continue
        if reason := generator.missing():
            print(f"{generator.name}: left out, {reason}")
        elif asked.check:
            old += stale(generator)
        else:
            write(generator)
    for path in old:
        print(f"{path.relative_to(ROOT)} is not current: run make gen")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
