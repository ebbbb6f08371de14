"""Makes a release, and holds today's contract against the last one.

    python -m tools.release --check     can released clients use today's contract?
    python -m tools.release VERSION     make the release

A release sets the version wherever it stands, dates the changelog's unreleased section,
builds the wheels into `dist/`, and keeps two things in `tests/compatibility`: the compiled
contract, which `buf breaking` compares with, and the wheel of the Python client, which the
tests run against later servers. They lie in the tree, so that a checkout without tags has
them. Nothing is committed: look at it first.
"""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ROOT / "tests/compatibility"
CHANGELOG = ROOT / "CHANGELOG.md"
DIST = ROOT / "dist"
CONTRACT = "contract.binpb"
BUF = Path(sys.executable).with_name("buf")

_NUMBER = r"\d+\.\d+\.\d+"
PLACES = (
    ("pyproject.toml", r'(?m)^version = "(.+)"$'),
    ("pyproject.toml", r'(?m)^  "exportd==(.+)",$'),
    ("clients/python/pyproject.toml", r'(?m)^version = "(.+)"$'),
    ("clients/typescript/package.json", r'(?m)^  "version": "(.+)",$'),
    (
        "clients/typescript/package-lock.json",
        r'\A\{\s+"name": "exportd",\s+"version": "(.+)"',
    ),
    (
        "clients/typescript/package-lock.json",
        r'"": \{\s+"name": "exportd",\s+"version": "(.+)"',
    ),
    ("clients/java/pom.xml", r"<artifactId>exportd-client</artifactId>\s+<version>(.+)<"),
    ("clients/java/README.md", rf"target/exportd-client-({_NUMBER})\.jar"),
    (
        "clients/java/README.md",
        r"<artifactId>exportd-client</artifactId>\s+<version>(.+)<",
    ),
    ("deploy/Containerfile", rf"--tag exportd:({_NUMBER})"),
    ("deploy/compose.yaml", rf"(?m)^  image: exportd:({_NUMBER})$"),
    ("deploy/kubernetes/kustomization.yaml", r"(?m)^    newTag: (.+)$"),
)
"""Where the version stands: a file, and an expression that is found in it once."""


class Refused(Exception):
    """The release cannot be made; the text says why."""


def releases() -> list[Path]:
    """The directories of the released versions, oldest first."""
    found = [p for p in RELEASES.iterdir() if re.fullmatch(f"v{_NUMBER}", p.name)]
    return sorted(found, key=lambda path: _numbers(path.name[1:]))


def versions() -> dict[str, str]:
    """What each place says. Raises `Refused` where one does not say it exactly once."""
    return {f"{name}: {pattern}": _found(name, pattern)[1] for name, pattern in PLACES}


def check() -> int:
    """Hold the contract against the last release; returns the exit code."""
    kept = releases()
    if not kept:
        print(f"{RELEASES.relative_to(ROOT)} has no release to compare with")
        return 1
    last = kept[-1] / CONTRACT
    return subprocess.run(
        [BUF, "breaking", "proto", "--against", last], check=False, cwd=ROOT
    ).returncode


def release(version: str) -> None:
    """Make the release. Raises `Refused` before anything was changed."""
    place = RELEASES / f"v{version}"
    if not re.fullmatch(_NUMBER, version):
        raise Refused(f"{version} is no version such as 1.2.3")
    if place.exists() or _git("tag", "--list", place.name):
        raise Refused(f"{version} was released; what was released stays as it is")
    if (kept := releases()) and _numbers(version) < _numbers(kept[-1].name[1:]):
        raise Refused(f"{version} is older than {kept[-1].name[1:]}, the last release")
    if changed := _git("status", "--porcelain"):
        raise Refused(f"there is what is not committed:\n{changed}")
    notes = CHANGELOG.read_text(encoding="utf-8")
    if not re.search(r"^## Unreleased\n\n- ", notes, re.MULTILINE):
        raise Refused("CHANGELOG.md has nothing under `## Unreleased`")
    versions()
    if releases() and check() != 0:
        raise Refused("released clients could not use this contract")
    for name, pattern in PLACES:
        _set(name, pattern, version)
    today = datetime.now(UTC).date()
    dated = f"## Unreleased\n\n## {version}, {today}\n\n- "
    notes = notes.replace("## Unreleased\n\n- ", dated, 1)
    CHANGELOG.write_text(notes, encoding="utf-8")
    keep(place, build(DIST))


def build(directory: Path, tree: Path = ROOT) -> list[Path]:
    """Build the wheels of both distributions; returns them, the client's first."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"),
            *("--quiet", "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", directory, tree / "clients/python", tree),
        ],
        check=True,
    )
    version = _found(*PLACES[0])[1]
    names = ("exportd", "exportd_server")
    return [directory / f"{name}-{version}-py3-none-any.whl" for name in names]


def keep(place: Path, wheels: list[Path]) -> None:
    """Keep the contract and the client."""
    place.mkdir()
    subprocess.run(
        [BUF, "build", "proto", "--exclude-source-info", "-o", place / CONTRACT],
        check=True,
        cwd=ROOT,
    )
    (place / wheels[0].name).write_bytes(wheels[0].read_bytes())


def _found(name: str, pattern: str) -> re.Match[str]:
    found = list(re.finditer(pattern, (ROOT / name).read_text(encoding="utf-8")))
    if len(found) != 1:
        raise Refused(f"{name}: the version is there {len(found)} times, and not once")
    return found[0]


def _set(name: str, pattern: str, version: str) -> None:
    match = _found(name, pattern)
    text = match.string[: match.start(1)] + version + match.string[match.end(1) :]
    (ROOT / name).write_text(text, encoding="utf-8")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def main() -> int:
    """Check or release; returns the exit code."""
    match sys.argv[1:]:
        case ["--check"]:
            return check()
        case [version]:
            try:
                release(version)
            except Refused as refused:
                print(f"no release: {refused}")
                return 1
            print(
                f"dist/ has the wheels of {version}. Look at `git diff`, then:\n\n"
                f"  git add --all && git commit --message 'Release {version}'\n"
                f"  git tag v{version}"
            )
            return 0
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    sys.exit(main())
