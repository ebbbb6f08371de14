"""What reads text that others wrote, each as a function of bytes that may end well or with
the errors that it declares, and with nothing else.

    python -m tests.security.parsers --runs 200000

looks for inputs by coverage, where `atheris` is installed, and tries those that Hypothesis
makes, as `test_fuzz.py` does with fewer, where it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import contextlib
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import FunctionType
from uuid import UUID

import hypothesis
import psycopg
import pyarrow as pa
from aiohttp.test_utils import make_mocked_request
from hypothesis import strategies as st
from psycopg import conninfo
from pydantic import SecretStr

from exportd.v1 import job_pb2
from exportd_server.api import http_download, requests, servicer
from exportd_server.api.http import Refusal
from exportd_server.api.link import BadLink, Link, LinkKeys
from exportd_server.errors import ConfigurationError, ErrorReason, ExportdError
from exportd_server.identity import keys as api_keys
from exportd_server.identity.jwks import KeySetUnusable
from exportd_server.identity.jwks import parse as parse_jwks
from exportd_server.platform.urls import BadUrl as UrlRefused
from exportd_server.platform.urls import parse_postgres_url
from exportd_server.settings import load_settings
from exportd_server.sinks.connections import load_connections
from exportd_server.sinks.database.request import parse_table
from exportd_server.sinks.registry import SinkTypes
from exportd_server.sinks.webhook.headers import BadHeader, read_headers
from exportd_server.sinks.webhook.signature import read_key
from exportd_server.sinks.webhook.status import read_retry_after
from exportd_server.sinks.webhook.url import BadUrl, parse_url
from exportd_server.sources.base import Column
from exportd_server.sources.catalogue import load_catalogue
from exportd_server.sources.literals import coerce
from exportd_server.sources.types import parse_type

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


@contextlib.contextmanager
def _refusing_page_tokens() -> Iterator[None]:
    try:
        yield
    except ExportdError as error:
        if error.reason is not ErrorReason.INVALID_PAGE_TOKEN:
            raise


def _page_token(data: bytes) -> None:
    # Both as callers send it, and as they would like it to be understood.
    made = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for token in (_text(data), made):
        for types in ((str,), (int,), (int, str)):
            with _refusing_page_tokens():
                position = servicer._read_token(token, "query", *types)
                assert [type(value) for value in position] == list(types)
                if types[0] is int:
                    servicer._from_micros(position[0])


_LINKS = LinkKeys([b"k" * 32, b"l" * 32])
_LINK = Link("acme", str(UUID(int=7)), 3, None, NOW)


def _link(data: bytes) -> None:
    made = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for token in (_text(data), made):
        with contextlib.suppress(BadLink):
            read = _LINKS.read(token)
            # Whoever guesses a signature has found something.
            assert token == _LINKS.sign(read)
            assert read == _LINK


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="exportd-parsers-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "rows.csv").write_text("a,b\n1,x\n")
    (folder / "rows.db").touch()
    return folder


def _toml(name: str, load: Callable[[Path], object]) -> Callable[[bytes], None]:
    def parse(data: bytes) -> None:
        path = _folder() / name
        path.write_bytes(data)
        load(path)

    return parse


def _settings(path: Path) -> None:
    load_settings(path, {}, {})


def _range(data: bytes) -> None:
    header, _, condition = _text(data).partition("\n")
    request = make_mocked_request(
        "GET",
        "/",
        headers={"Range": header, **({"If-Range": condition} if condition else {})},
    )
    asked = http_download._asked_range(request, '"etag"')
    http_download._allowed([header], '"etag"')
    http_download._has([header, condition], '"etag"')
    if asked is None:
        return
    for size in (0, 1, 1000):
        with contextlib.suppress(Refusal):
            first, end = http_download._within(asked, size)
            assert 0 <= first < end <= size


def _postgres_url(data: bytes) -> None:
    url = parse_postgres_url(_text(data))
    # Whatever is accepted is read the same by the driver's library, if it takes it.
    with contextlib.suppress(psycopg.ProgrammingError):
        library = conninfo.conninfo_to_dict(url.text)
        wanted = url.options.get("password", url.password)
        assert (library.get("password") or "") == wanted


def _url(data: bytes) -> None:
    url = parse_url(_text(data))
    again = parse_url(f"{url.scheme}://{url.authority}{url.target}")
    assert again == url
    assert url.covers(url)
    assert url.public
    assert url.address is None or str(url.address) == url.host


def _retry_after(data: bytes) -> None:
    wait = read_retry_after(_text(data), NOW)
    assert wait is None or timedelta(0) <= wait <= timedelta(days=1)


_COLUMNS = [
    Column("c", kind)
    for kind in (
        pa.bool_(),
        pa.int64(),
        pa.float64(),
        pa.decimal128(38, 18),
        pa.decimal128(5, 5),
        pa.string(),
        pa.binary(),
        pa.date32(),
        pa.time64("us"),
        pa.timestamp("us", "UTC"),
        pa.timestamp("ns", "UTC"),
        pa.duration("us"),
        pa.list_(pa.int64()),
    )
]
_LITERALS = ("string", "int", "double", "bool", "timestamp", "bytes", "other")


def _literal(data: bytes) -> None:
    text = _text(data)
    for column in _COLUMNS:
        for kind in _LITERALS:
            with contextlib.suppress(ValueError):
                coerce(column, kind, text)


def _csv_options(data: bytes) -> None:
    delimiter, _, marker = _text(data).partition("\n")
    options = job_pb2.CsvOptions(delimiter=delimiter, null_marker=marker or delimiter)
    reader = requests.Reader()
    read = requests._read_csv(reader, options)
    if not reader.violations:
        assert len(read.delimiter) == 1
        assert not set(read.null_marker) & {'"', "\r", "\n", read.delimiter}


def _create(data: bytes) -> None:
    message = job_pb2.CreateExportRequest()
    try:
        message.ParseFromString(data)
    except Exception as error:  # noqa: BLE001 - protobuf's own, judged elsewhere
        del error
        return
    requests.read_create(message, timedelta(days=1))
    requests.payload(message)


def _headers(data: bytes) -> None:
    lines = [line.partition(":") for line in _text(data).split("\n")]
    read = read_headers({name: SecretStr(value) for name, _, value in lines})
    assert all("\r" not in value and "\n" not in value for value in read.values())


@dataclass(frozen=True)
class Parser:
    """One function that reads what others wrote. `declared`: how it may refuse."""

    parse: Callable[[bytes], object]
    declared: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]
    slow: bool = False
    """It touches files: fewer examples suffice."""

    def __call__(self, data: bytes) -> bool:
        """Whether the input was taken; what is not declared comes out."""
        try:
            self.parse(data)
        except self.declared:
            return False
        return True


_CATALOGUE = b"""mask_key = "0123456789abcdef0123456789abcdef"
[connections.main]
url = "sqlite:///rows.db"
[datasets.rows]
csv = "rows.csv"
columns = ["a", "b"]
hidden = []
tenants = ["acme"]
mask = {b = "hash"}
[datasets.rows.column.a]
type = "decimal(10, 2)"
filterable = false
"""
_SINKS = b"""[connections.files]
type = "local_file"
root = "${HOME}/{tenant}"
queue_depth = 3
on_full = "DROP"
tenants = "*"
[connections.hook]
type = "webhook"
url = "https://example.com/hook"
signing_keys = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwAAAA"]
allow_private = ["10.0.0.0/8"]
[connections.rows]
tenants = ["acme", "globex"]
shared = true
type = "database"
url = "postgresql://u:p@h:1/d?sslmode=require"
[connections.lake]
type = "object_storage"
bucket = "lake"
prefix = "a/b"
"""
_SETTINGS = b"""listen = "127.0.0.1:1"
[http]
listen = "127.0.0.1:0"
signing_keys = ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
[identity.jwt]
issuer = "i"
audience = "a"
jwks_file = "x"
[retention]
ttl = 5
"""

PARSERS: Mapping[str, Parser] = {
    "page token": Parser(
        _page_token,
        (),
        (b'["query","a"]', b'["query",1]', b'["query",1767323045000000,"id"]', b"[[[["),
    ),
    "download link": Parser(
        _link, (), (_LINKS.sign(_LINK).encode(), b"AAAA", b"\xff" * 80)
    ),
    "catalogue": Parser(
        _toml("datasets.toml", load_catalogue),
        (ConfigurationError,),
        (_CATALOGUE,),
        slow=True,
    ),
    "sinks": Parser(
        _toml("sinks.toml", lambda path: load_connections(path, SinkTypes.installed())),
        (ConfigurationError,),
        (_SINKS,),
        slow=True,
    ),
    "settings": Parser(
        _toml("exportd.toml", _settings), (ConfigurationError,), (_SETTINGS,), slow=True
    ),
    "range": Parser(_range, (), (b'bytes=0-5\n"etag"', b"bytes=-7", b"bytes=3-")),
    "PostgreSQL URL": Parser(
        _postgres_url,
        (UrlRefused,),
        (
            b"postgresql://u:p%40@h:5432/d?sslmode=require",
            b"postgresql://a:1,[::1]:2/d?host=x,y&port=1,2",
            b"postgresql:///d?host=%2Fvar%2Frun",
        ),
    ),
    "webhook URL": Parser(
        _url,
        (BadUrl,),
        (
            b"https://example.com:8443/a/b%20c?d=e",
            b"http://[::ffff:10.0.0.1]/",
            b"http://0x7f.1/",
        ),
    ),
    "Retry-After": Parser(
        _retry_after,
        (),
        (b"120", b"Wed, 21 Oct 2026 07:28:00 GMT", b"Mon, 1 Jan 1 0:0 -9999"),
    ),
    "literal": Parser(
        _literal,
        (),
        (
            b"12.5",
            b"-9223372036854775808",
            b"2026-01-31T13:45:00.123456789+23:59",
            b"13:45:00.5",
            b"true",
            b"1e309",
            b"QUJD",
        ),
    ),
    "CSV options": Parser(_csv_options, (), (b",\nNULL", b"]\n\\N", b"^\n-", b"\\\nx")),
    "request": Parser(
        _create,
        (),
        (
            job_pb2.CreateExportRequest(
                dataset="orders",
                format=1,  # type: ignore[arg-type]
                filters=[{"column": "a", "operator": 1, "values": [{"int_value": 3}]}],  # type: ignore[list-item]
                labels={"a": "b"},
                ttl={"seconds": 3},  # type: ignore[arg-type]
            ).SerializeToString(),
        ),
    ),
    "webhook headers": Parser(_headers, (BadHeader,), (b"x-a:b\ncontent-type:text/csv",)),
    "webhook key": Parser(
        lambda data: read_key(_text(data)),
        (ValueError,),
        (b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwAAAA",),
    ),
    "table name": Parser(
        lambda data: parse_table(_text(data)),
        (ValueError,),
        (b'"a""b".c', b"public.orders"),
    ),
    "type name": Parser(
        lambda data: parse_type(_text(data)), (ValueError,), (b"decimal(38, 18)", b"int64")
    ),
    "API key": Parser(
        lambda data: api_keys._split(_text(data)), (), (b"exportd_abc_" + b"x" * 52,)
    ),
    "key set": Parser(
        lambda data: parse_jwks(data, ("RS256", "ES256", "EdDSA")),
        (KeySetUnusable,),
        (
            (
                b'{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","use":"sig",'
                b'"x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}'
            ),
        ),
    ),
}


_TAILS = (
    b"[",
    b'"',
    b"9" * 30,
    b"\0",
    b"e9",
    b"-",
    b".",
    b"%",
    b"@",
    b"\xd9\xa1",
    b"\xed\xa0\x80",
)


def try_inputs(parser: Parser, count: int, seed: int) -> None:
    """Try texts, bytes, and what is right with a few places spoilt. Raises what the parser
    does not declare."""
    text = st.text(max_size=60).map(lambda drawn: drawn.encode("utf-8", "surrogatepass"))

    @st.composite
    def spoilt(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(parser.seeds)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            put = draw(st.one_of(st.sampled_from(_TAILS), text, st.binary(max_size=6)))
            data[at : at + draw(st.integers(0, 5))] = put
        return bytes(data)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        suppress_health_check=list(hypothesis.HealthCheck),
        deadline=None,
        database=None,
    )
    @hypothesis.given(st.one_of(spoilt(), text, st.binary(max_size=60)))
    def check(data: bytes) -> None:
        parser(data)

    check()


def main() -> int:
    """Fuzz one parser after the other by coverage, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.security.parsers")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(PARSERS))
    said = parser.parse_args()
    covering = importlib.util.find_spec("atheris") is not None
    if said.only:
        search = _by_coverage if covering else _by_chance
        return search(PARSERS[said.only], said.runs, said.seed)
    sys.stdout.write(
        "inputs are looked for by coverage\n"
        if covering
        else "inputs are made by chance: atheris is not installed\n"
    )
    return max(asyncio.run(_alone(name, said.runs, said.seed)) for name in PARSERS)


async def _alone(name: str, runs: int, seed: int) -> int:
    runs = runs // 20 if PARSERS[name].slow else runs
    # A fuzzer ends without leave. What it found is kept.
    folder = tempfile.mkdtemp(prefix="exportd-corpus-")
    started = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.security.parsers", "--only", name),
        *("--runs", str(runs), "--seed", str(seed)),
        env={**os.environ, "TMPDIR": folder},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    told, _ = await process.communicate()
    seconds = time.monotonic() - started
    code = process.returncode or 0
    sys.stdout.write(f"{name}: {runs} runs in {seconds:.0f} s, exit {code}\n")
    if code:
        sys.stdout.write(told.decode(errors="replace")[-3000:] + f"\nsee {folder}\n")
    else:
        await asyncio.to_thread(shutil.rmtree, folder)
    sys.stdout.flush()
    return code


def _by_chance(parser: Parser, runs: int, seed: int) -> int:
    # Making one takes far longer than finding one by coverage does.
    try_inputs(parser, max(100, runs // 100), seed)
    return 0


def _by_coverage(parser: Parser, runs: int, seed: int) -> int:
    atheris = importlib.import_module("atheris")
    for function in {parser.parse, *_functions()}:
        atheris.instrument_func(function)
    corpus = Path(tempfile.mkdtemp(prefix="exportd-corpus-"))
    for number, seed_input in enumerate(parser.seeds):
        (corpus / str(number)).write_bytes(seed_input)
    os.chdir(_folder())
    arguments = [
        sys.argv[0],
        f"-atheris_runs={runs}",
        f"-seed={seed}",
        "-max_len=2000",
        "-timeout=20",
        f"-artifact_prefix={corpus}/",
        str(corpus),
    ]
    atheris.Setup(arguments, lambda data: (parser(data), None)[1])
    atheris.Fuzz()
    return 0


def _functions() -> list[FunctionType]:
    """Every function of the service that is loaded, methods among them."""
    gc.collect()
    return [
        each
        for each in gc.get_objects()
        if isinstance(each, FunctionType)
        and (each.__module__ or "").startswith("exportd_server.")
    ]


if __name__ == "__main__":
    sys.exit(main())
