"""Sinks as people type them: `--to file:reports/daily`, `--to webhook:https://...`."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from exportd._sinks import (
    Sink,
    WebhookModeName,
    WriteModeName,
    plugin,
    to_database,
    to_file,
    to_s3,
    to_webhook,
)
from exportd.errors import InvalidRequest, Violation

SECRET_VARIABLE = "EXPORTD_WEBHOOK_SECRET"  # noqa: S105 - the name of one

_Command = TypeVar("_Command", bound=Callable[..., Any])

_WEBHOOK_MODES = {
    name.lower().replace("_", "-"): name for name in get_args(WebhookModeName)
}
_WRITE_MODES = {name.lower(): name for name in get_args(WriteModeName)}
_FIELD = re.compile(r"sinks\[(\d+)\](?:\.\w+)?(?:\.(.+))?")
_OPTIONS = {
    ("webhook", "mode"): "--webhook-mode",
    ("webhook", "secret"): f"{SECRET_VARIABLE} or --webhook-secret-file",
    ("db", "mode"): "--db-mode",
    ("db", "key_columns"): "--key",
    ("db", "create_table"): "--db-create-table",
}
"""Where fields of a sink come from that do not stand in its `--to`."""

_USER = re.compile(r"//[^/@]*@")


def sink_options(command: _Command) -> _Command:
    """The options of `create` that are about sinks."""
    options = (
        click.option(
            "--to",
            multiple=True,
            metavar="SINK",
            help="Deliver it, too; may be repeated. file:CONNECTION[/PATH], "
            "s3:CONNECTION[/PREFIX], webhook:https://... or webhook:CONNECTION, "
            "db:CONNECTION/TABLE, plugin:TYPE[:CONNECTION][?{JSON}].",
        ),
        click.option(
            "--webhook-mode",
            type=click.Choice(list(_WEBHOOK_MODES)),
            help="What webhooks get: links once it is done, the default, or each part.",
        ),
        click.option(
            "--webhook-secret-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="File with the key that signs for webhooks, whsec_...; or set "
            f"{SECRET_VARIABLE}.",
        ),
        click.option(
            "--db-mode",
            type=click.Choice(list(_WRITE_MODES)),
            help="How rows meet those in the table: are added, the default, replace all, "
            "or replace those with the same --key.",
        ),
        click.option(
            "--key",
            multiple=True,
            metavar="COLUMN",
            help="With --db-mode merge: column that tells a row; may be repeated.",
        ),
        click.option(
            "--db-create-table", is_flag=True, help="Make the table when it is missing."
        ),
        click.option(
            "--drop-after-delivery",
            is_flag=True,
            help="Drop the stored output once every sink has it.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, repr=False)
class _Shared:
    """What holds for all sinks of a kind in one command."""

    webhook_mode: WebhookModeName
    webhook_secret: str
    db_mode: WriteModeName
    keys: Sequence[str]
    create_table: bool


def parse_sinks(given: Mapping[str, Any]) -> list[Sink]:
    """The sinks of the options of `sink_options`.

    Raises:
        InvalidRequest: One cannot be read, or an option is there without its sink.
    """
    texts: Sequence[str] = given["to"]
    kinds = {text.partition(":")[0] for text in texts}
    for option, kind in (
        ("webhook_mode", "webhook"),
        ("webhook_secret_file", "webhook"),
        ("db_mode", "db"),
        ("key", "db"),
        ("db_create_table", "db"),
    ):
        if given[option] and kind not in kinds:
            raise InvalidRequest.of(
                f"--{option.replace('_', '-')}", f"goes with --to {_SYNTAX[kind]}"
            )
    secret = _secret(given["webhook_secret_file"]) if "webhook" in kinds else ""
    shared = _Shared(
        webhook_mode=_WEBHOOK_MODES[given["webhook_mode"] or "notify"],
        webhook_secret=secret,
        db_mode=_WRITE_MODES[given["db_mode"] or "append"],
        keys=given["key"],
        create_table=given["db_create_table"],
    )
    return [_parse(text, shared) for text in texts]


def _secret(file: Path | None) -> str:
    """The key that signs: never an option, since those show in ps and in histories."""
    if file is None:
        return os.environ.get(SECRET_VARIABLE, "").strip()
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        secret = ""
    if not secret:
        raise InvalidRequest.of(
            "--webhook-secret-file", f"{file} holds no text; write whsec_... into it"
        )
    return secret


def _parse(text: str, shared: _Shared) -> Sink:
    kind, colon, rest = text.partition(":")
    if not colon or kind not in _KINDS:
        near = difflib.get_close_matches(kind.lower(), _KINDS, n=1)
        mend = _SYNTAX[near[0]] if near else ", ".join(_SYNTAX.values())
        raise InvalidRequest.of("--to", f"cannot read {_shown(text)!r}; write {mend}")
    if not rest:
        raise _unreadable(text, kind)
    return _KINDS[kind](text, rest, shared)


def _file(_text: str, rest: str, _shared: _Shared) -> Sink:
    connection, _, path = rest.partition("/")
    return to_file(connection, path)


def _s3(_text: str, rest: str, _shared: _Shared) -> Sink:
    connection, _, prefix = rest.partition("/")
    return to_s3(connection, prefix)


def _webhook(text: str, rest: str, shared: _Shared) -> Sink:
    url, connection = (rest, "") if "://" in rest else ("", rest)
    if set("/:?@") & set(connection):  # an address whose scheme was left out
        raise _unreadable(text, "webhook")
    return to_webhook(
        url, connection=connection, mode=shared.webhook_mode, secret=shared.webhook_secret
    )


def _database(text: str, rest: str, shared: _Shared) -> Sink:
    connection, _, table = rest.partition("/")
    if not table:
        raise _unreadable(text, "db")
    return to_database(
        connection,
        table,
        mode=shared.db_mode,
        key_columns=shared.keys,
        create_table=shared.create_table,
    )


def _plugin(text: str, rest: str, _shared: _Shared) -> Sink:
    target, _, config = rest.partition("?")
    type_, _, connection = target.partition(":")
    try:
        values = json.loads(config or "{}")
        if isinstance(values, dict):
            return plugin(type_, connection, values)
        problem = "write {...} after ?"
    except json.JSONDecodeError as error:
        problem = f"what follows ? is no JSON: {error}"
    except RecursionError:
        problem = "what follows ? is nested too deep"
    except InvalidRequest as error:  # a number that would not arrive as it is
        problem = error.message
    raise InvalidRequest.of("--to", f"{_shown(text)!r}: {problem}")


_KINDS: Mapping[str, Callable[[str, str, _Shared], Sink]] = {
    "file": _file,
    "s3": _s3,
    "webhook": _webhook,
    "db": _database,
    "plugin": _plugin,
}
_SYNTAX: Mapping[str, str] = {
    "file": "file:CONNECTION[/PATH]",
    "s3": "s3:CONNECTION[/PREFIX]",
    "webhook": "webhook:https://... or webhook:CONNECTION",
    "db": "db:CONNECTION/TABLE",
    "plugin": "plugin:TYPE[:CONNECTION][?{JSON}]",
}


def _unreadable(text: str, kind: str) -> InvalidRequest:
    return InvalidRequest.of("--to", f"cannot read {_shown(text)!r}; write {_SYNTAX[kind]}")


def _shown(text: str) -> str:
    """A sink as it may be shown: without the query of a URL, the configuration of a
    plug-in and a password, which all may be secret."""
    head, query, _ = text.partition("?")
    return _USER.sub("//...@", head) + ("?..." if query else "")


@contextlib.contextmanager
def said_as_typed(texts: Sequence[str]) -> Iterator[None]:
    """Have errors about `sinks[0].webhook.url` name the `--to` it came from."""
    try:
        yield
    except InvalidRequest as error:
        typed = [
            Violation(_as_typed(v.subject, texts), _mend_as_typed(v.description))
            for v in error.violations
        ]
        for said, shown in zip(error.violations, typed, strict=True):
            error.message = error.message.replace(
                f"{said.subject}: {said.description}",
                f"{shown.subject}: {shown.description}",
            )
        error.violations = tuple(typed)
        raise


def _mend_as_typed(description: str) -> str:
    """What the server proposes, with options for fields."""
    for (_, field), option in _OPTIONS.items():
        if "_" in field:  # others are words of the language as well
            description = description.replace(field, option)
    return description


def _as_typed(subject: str, texts: Sequence[str]) -> str:
    if subject == "sinks":
        return "--to"
    if subject == "drop_after_delivery":
        return "--drop-after-delivery"
    match = _FIELD.fullmatch(subject)
    if match is None or int(match[1]) >= len(texts):
        return subject
    text = texts[int(match[1])]
    field = match[2] or ""
    kind = text.partition(":")[0]
    field = _OPTIONS.get((kind, field.partition("[")[0]), field)
    return f"--to {_shown(text)}" + (f" ({field})" if field else "")
