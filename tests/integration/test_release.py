"""A release is complete: its wheels run where nothing of the repository is."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tools import release
from tools.release import ROOT

DEMO_ROWS = 2_000
PACKAGES = {
    "exportd": ROOT / "clients/python/src/exportd",
    "exportd_server": ROOT / "service/exportd_server",
}


def files(directory: Path) -> set[str]:
    """Every file below, but for what Python compiled."""
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def copied() -> list[str]:
    """What the image is built from, as the Containerfile says."""
    text = (ROOT / "deploy/Containerfile").read_text()
    return [
        source
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
        for source in line.split()
    ]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Built from what the image is built from."""
    tree = tmp_path_factory.mktemp("tree")
    for name in copied():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    return release.build(tmp_path_factory.mktemp("wheels"), tree)


# --- one version


def test_the_version_is_the_same_wherever_it_stands() -> None:
    said = release.versions()
    assert len(set(said.values())) == 1, said


# --- wheels


def test_wheels_hold_every_file_of_their_packages(wheels: list[Path]) -> None:
    held: set[str] = set()
    for wheel, (package, source) in zip(wheels, PACKAGES.items(), strict=True):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        assert {name for name in names if name.startswith(f"{package}/")} == {
            f"{package}/{name}" for name in files(source)
        }
        held |= names
    assert held >= {
        "exportd/py.typed",
        "exportd/service_config.json",
        "exportd_server/py.typed",
        "exportd_server/api/contract.binpb",
        "exportd_server/jobs/ledger/migrations/env.py",
        "exportd_server/jobs/ledger/migrations/versions/0001_first_tables.py",
    }


def environment_of(directory: Path) -> Path:
    """An environment with nothing in it, not even pip; returns its Python."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True
    )
    return directory / "bin/python"


def pip(python: Path, *arguments: str | Path) -> None:
    """Install into the environment of another Python."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*command, f"--python={python}", "install", "--quiet", *map(str, arguments)],
        check=True,
        cwd=python.parent,
    )


def see_it_work(python: Path, directory: Path) -> None:
    """Run the commands and the demo, where nothing of the repository is."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            list(map(str, command)),
            check=False,
            capture_output=True,
            text=True,
            cwd=directory,
            env=environ,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (version,) = set(release.versions().values())
    for command in ("exportd", "exportd-server"):
        assert run(python.parent / command, "--version").split()[-1] == version
    tell = "import exportd, exportd_server as s; print(exportd.__file__, s.__file__)"
    for path in run(python, "-c", tell).split():
        assert Path(path).is_relative_to(python.parent.parent), "it is not the wheel's"
    shutil.copy(ROOT / "tools/demo.py", directory)
    told = run(python, "demo.py", "--data-dir", "data", "--rows", str(DEMO_ROWS))
    assert f"{DEMO_ROWS:,} rows" in told
    assert "verified: CRC32C" in told
    target = directory / "data/demo/token_transfers.csv"
    with target.open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == DEMO_ROWS


@pytest.mark.minutes
def test_installed_wheels_run_the_demo(wheels: list[Path], tmp_path: Path) -> None:
    python = environment_of(tmp_path / "environment")
    pip(python, "--no-deps", "--no-index", *wheels)
    # What they need they may borrow here; exportd itself is not found that way, as the
    # files that make it editable count only where Python looks by itself.
    (site,) = (tmp_path / "environment/lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "elsewhere").mkdir()
    see_it_work(python, tmp_path / "elsewhere")


@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_wheels_run_on_the_locked_requirements_alone(
    wheels: list[Path], tmp_path: Path
) -> None:
    python = environment_of(tmp_path / "environment")
    lock = ROOT / "requirements/runtime.txt"
    pip(python, "--only-binary", ":all:", "--require-hashes", "--requirement", lock)
    pip(python, "--no-deps", "--no-index", *wheels)
    (tmp_path / "elsewhere").mkdir()
    see_it_work(python, tmp_path / "elsewhere")


# --- the command that makes a release


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of this one, as if all of it were committed, with news in its changelog."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    names = subprocess.run(listed, check=True, capture_output=True, cwd=ROOT).stdout
    copy = tmp_path / "repository"
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    changelog = copy / "CHANGELOG.md"
    notes = changelog.read_text(encoding="utf-8")
    told = notes.replace("## Unreleased\n\n", "## Unreleased\n\n- News.\n\n", 1)
    assert told != notes
    changelog.write_text(told, encoding="utf-8")
    git(copy, "init", "--quiet")
    commit(copy)
    return copy


def git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@localhost", *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=directory,
    )
    return done.stdout


def commit(directory: Path) -> None:
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--message", "All of it")


def make_release(directory: Path, version: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.release", version],
        check=False,
        capture_output=True,
        text=True,
        cwd=directory,
    )


@pytest.mark.minutes
def test_a_release_is_made_once_and_of_what_is_committed(repository: Path) -> None:
    last = release.releases()[-1].name.removeprefix("v")
    new = f"{int(last.split('.')[0]) + 1}.0.0"
    (repository / "stray").touch()
    refused = make_release(repository, new)
    assert refused.returncode == 1
    assert "not committed" in refused.stdout
    assert "stray" in refused.stdout
    (repository / "stray").unlink()

    made = make_release(repository, new)
    assert made.returncode == 0, made.stdout + made.stderr
    changed = set(git(repository, "diff", "--name-only").split())
    assert changed == {"CHANGELOG.md", *(name for name, _ in release.PLACES)}
    assert (
        git(repository, "status", "--porcelain", "--untracked-files=all").count("??") == 2
    )
    kept = repository / f"tests/compatibility/v{new}"
    wheel = f"exportd-{new}-py3-none-any.whl"
    assert {path.name for path in kept.iterdir()} == {release.CONTRACT, wheel}
    assert (kept / wheel).read_bytes() == (repository / "dist" / wheel).read_bytes()
    with zipfile.ZipFile(
        repository / f"dist/exportd_server-{new}-py3-none-any.whl"
    ) as archive:
        metadata = archive.read(f"exportd_server-{new}.dist-info/METADATA").decode()
    assert f"Requires-Dist: exportd=={new}\n" in metadata
    notes = (repository / "CHANGELOG.md").read_text()
    assert re.search(
        rf"^## Unreleased\n\n## {new}, \d{{4}}-\d\d-\d\d\n\n- ", notes, re.MULTILINE
    )

    commit(repository)
    again = make_release(repository, new)
    assert again.returncode == 1
    assert "was released" in again.stdout
    empty = make_release(repository, f"{new}0")
    assert empty.returncode == 1
    assert "nothing under" in empty.stdout
    older = make_release(repository, "0.0.9")
    assert older.returncode == 1
    assert "older" in older.stdout
    assert git(repository, "status", "--porcelain") == ""


def test_a_release_whose_contract_breaks_clients_is_refused(repository: Path) -> None:
    job = repository / "proto/exportd/v1/job.proto"
    text = job.read_text()
    assert "string job_id = 1;" in text
    job.write_text(text.replace("string job_id = 1;", "string job_id = 77;", 1))
    commit(repository)
    refused = make_release(repository, "99.0.0")
    assert refused.returncode == 1
    assert "released clients could not use this contract" in refused.stdout
    assert git(repository, "status", "--porcelain") == ""
