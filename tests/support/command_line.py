"""Command lines, read as click reads them and not run."""

from __future__ import annotations

from collections.abc import Sequence

import click


def parsed(command: click.Command, arguments: Sequence[str]) -> click.Context:
    """The context of the subcommand that the arguments name, the program's name first.
    Raises `click.UsageError` for what it would refuse."""
    name, *rest = arguments
    context = command.make_context(name, list(rest))
    while isinstance(command, click.Group) and (
        rest := [*context._protected_args, *context.args]
    ):
        found, sub, rest = command.resolve_command(context, rest)
        assert sub is not None
        command = sub
        context = command.make_context(found, list(rest), parent=context)
    return context
