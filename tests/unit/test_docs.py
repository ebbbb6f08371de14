"""The pages lead where they say, and their commands are ones that there are."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from exportd.cli.commands import cli as client
from exportd_server.cli import main as server
from tests.support.command_line import parsed

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
        *ROOT.glob("bench/**/*.md"),
        *ROOT.glob("clients/*/README.md"),
    )
)
COMMANDS = {"exportd": client, "exportd-server": server}
_FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_OURS = re.compile(r"^(?:\S*/)?(exportd|exportd-server|make)$")
_SHELL = re.compile(r"[A-Z_]+=\S*|sudo|exec|time|env")
"""What may stand before a command."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links


def anchors(path: Path) -> set[str]:
    """The names that a page's headings have, and those that it sets by hand."""
    text = path.read_text(encoding="utf-8")
    found: set[str] = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    seen: Counter[str] = Counter()
    for title in re.findall(r"^#{1,6} (.+?) *#*$", _FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(path: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    plain = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    targets = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", plain)
    targets += re.findall(r"^ *\[[^\]]+\]: (\S+)", plain, re.MULTILINE)
    for target in targets:
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (
            anchor and there.suffix == ".md" and anchor not in anchors(there)
        ):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "link", ["nowhere.md", "#nothing", "runbook.md#nothing", "../docs/none/"]
)
def test_a_link_that_leads_nowhere_is_found(link: str) -> None:
    page = ROOT / "docs/sinks.md"
    assert broken(page, f"See [this]({link}), [that](runbook.md#exportddown).") == [link]


# --- commands


def shell_lines(text: str) -> Iterator[str]:
    """What fenced blocks have a shell do, each command as one line."""
    for block in _FENCE.findall(text):
        first, _, body = block.partition("\n")
        language = first.strip().strip("`")
        if language not in {"", "console", "sh", "shell", "bash"}:
            continue
        lines = re.sub(r"\\\n\s*", " ", body.rpartition("\n")[0]).splitlines()
        prompted = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
        # Without prompts a block is either all commands, or the output of one.
        yield from prompted or (line.strip() for line in lines)


def simple_commands(line: str) -> Iterator[list[str]]:
    """Its commands, with what is substituted into a line as commands of their own."""
    for inner in re.findall(r"\$\(([^()]*)\)", line):
        yield from simple_commands(inner)
    line = re.sub(r"\$\([^()]*\)", "X", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        tokens = list(lexer)
    except ValueError:  # no shell's line
        return
    for token in [*tokens, ";"]:
        if set(token) <= set("|&;"):
            yield words
            words = []
        else:
            words.append(token)


@dataclass(frozen=True)
class Told:
    """A command line of this project on a page. One that is not `whole` stands in a
    sentence, and may leave out what the sentence is not about."""

    name: str
    words: list[str]
    whole: bool

    def fault(self, folder: Path = ROOT) -> str | None:
        """What is wrong with it on a page in `folder`."""
        if self.name == "make":
            files = [at / "Makefile" for at in {folder, ROOT}]
            text = "\n".join(file.read_text() for file in files if file.exists())
            targets = {*re.findall(r"^([a-z-]+):", text, re.MULTILINE)}
            wrong = {w for w in self.words if "=" not in w and w[0] != "-"} - targets
            return f"no target {wrong}" if wrong else None
        try:
            parsed(COMMANDS[self.name], [self.name, *self.words])
        except click.exceptions.NoArgsIsHelpError:
            return None
        except click.MissingParameter as error:
            return error.format_message() if self.whole else None
        except click.BadParameter as error:
            # Files of whoever reads it.
            ours = error.param is None or not isinstance(error.param.type, click.Path)
            return error.format_message() if ours else None
        except click.UsageError as error:
            return error.format_message()
        return None


def told(text: str) -> Iterator[Told]:
    """The command lines of this project on a page."""
    inline = re.findall(
        r"`((?:exportd|exportd-server|make) [^`\n]+)`", _FENCE.sub("", text)
    )
    lines = [(line, True) for line in shell_lines(text)]
    for line, whole in (*lines, *((line, False) for line in inline)):
        for words in simple_commands(line):
            while words and _SHELL.fullmatch(words[0]):
                words.pop(0)
            found = _OURS.match(words[0]) if words else None
            if found is None:
                continue
            ends = [at for at, word in enumerate(words) if set(word) <= set("<>")]
            yield Told(found[1], words[1 : ends[0]] if ends else words[1:], whole)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_command_in_the_pages_is_one(path: Path) -> None:
    found = [(each, each.fault(path.parent)) for each in told(path.read_text())]
    assert [each for each in found if each[1]] == []


def test_the_pages_have_commands() -> None:
    found = [each for path in PAGES for each in told(path.read_text())]
    assert {each.name for each in found} == {"exportd", "exportd-server", "make"}
    assert sum(each.whole for each in found) >= 50
    assert sum(not each.whole for each in found) >= 50


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("exportd lst", "No such command 'lst'"),
        ("exportd list --stat failed", "No such option"),
        ("exportd list --state dead", "Invalid value for '--state'"),
        ("exportd list -n", "requires an argument"),
        ("exportd get", "Missing argument"),
        ("TOKEN=x .venv/bin/exportd-server serve --no-worker", "No such option"),
        ("JOB=$(exportd mak positions) && true", "No such command 'mak'"),
        ("exportd datasets | exportd-server keys make", "No such command 'make'"),
        ("make tests", "no target {'tests'}"),
    ],
)
def test_a_command_that_there_is_not_is_found(line: str, fault: str) -> None:
    *_, last = told(f"```\n$ {line}\n```\n")
    assert fault in str(last.fault())


def test_a_sentence_may_leave_out_what_it_is_not_about() -> None:
    (named,) = told("Have it deleted with `exportd delete JOB`, or `grpcurl`.")
    assert named.fault() is None
    (wrong,) = told("Have it deleted with `exportd delete --everything`.")
    assert "No such option" in str(wrong.fault())
