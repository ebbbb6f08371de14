"""What every command shares: the server to talk to, `--json`, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc

from exportd import errors
from exportd._client import Client
from exportd._connection import Retry, tls_from_files

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(slots=True)
class Settings:
    """What every command knows."""

    server: str
    tls: bool
    ca_cert: Path | None
    client_cert: Path | None
    client_key: Path | None
    timeout: float
    quiet: bool
    allow_plaintext_token: bool

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """A client of the server that was named."""
        tls: bool | grpc.ChannelCredentials = self.tls
        if self.ca_cert or self.client_cert or self.client_key:
            tls = tls_from_files(self.ca_cert, self.client_cert, self.client_key)
        token = os.environ.get("EXPORTD_TOKEN")
        with Client(
            self.server,
            tls=tls,
            token=token,
            timeout=self.timeout,
            # Who mistypes an address wants to know at once. Waiting and downloading, which
            # scripts do, have the patience of their own.
            retry=Retry(attempts=4),
            allow_plaintext_token=self.allow_plaintext_token,
        ) as client:
            yield client


class Interrupted(Exception):
    """Ctrl-C, with a word on how to go on."""


@contextlib.contextmanager
def resumable(hint: str) -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted` with a hint; a server that stays away gets it too."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(hint) from None
    except (errors.Unavailable, errors.TimedOut) as error:
        error.message += f"; {hint}"
        raise


def json_option(command: _Command) -> _Command:
    """`--json`, which every command has."""
    option = click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print JSON for programs: one object, or one a line for lists and watch.",
    )
    return option(command)


def limit_option(command: _Command) -> _Command:
    """`--limit` of lists."""
    option = click.option(
        "-n", "--limit", type=click.IntRange(min=1), help="At most so many; default all."
    )
    return option(command)


def up_to(limit: int | None) -> range:
    """To zip a list with, so that it ends after so many."""
    return range(sys.maxsize if limit is None else limit)


def labels_of(pairs: Sequence[str]) -> dict[str, str]:
    """Labels from `key=value`."""
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise errors.InvalidRequest.of("--label", f"{pair!r}: write key=value")
        labels[key] = value
    return labels
