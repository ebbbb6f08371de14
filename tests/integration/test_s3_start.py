"""What is wrong with S3 is told when the server starts, as an operator meets it: one line
that says which setting to mend, and exit code 2."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.s3_proxy import Fault, error, s3_proxy
from tests.support.seaweed import BUCKET, SECRET, RawS3, SeaweedServer
from tests.support.server import ROOT
from tests.support.waits import ENOUGH

pytestmark = pytest.mark.minutes

EXIT_CONFIGURATION = 2


@dataclass(frozen=True)
class Mistake:
    """What an operator got wrong, and what tells him so."""

    tells: tuple[str, ...]
    """Parts of the line, the setting to mend among them."""
    variables: dict[str, str] = field(default_factory=dict)
    """Settings that differ from those that work; an empty one is not set."""
    answer: Fault | None = None
    """What S3 answers to everything, where a real one cannot be brought to it."""


MISTAKES = {
    "no such bucket": Mistake(
        ("there is no such bucket", "store.url", "s3://elsewhere/"),
        {"STORE__URL": "s3://elsewhere/outputs"},
    ),
    "no right to write": Mistake(
        ("access is denied", "s3:PutObject", "store.s3"),
        {"STORE__S3__ACCESS_KEY_ID": "reader"},
    ),
    "an unknown key": Mistake(
        ("does not know the access key id", "store.s3.access_key_id"),
        {"STORE__S3__ACCESS_KEY_ID": "nobody"},
    ),
    "a wrong secret": Mistake(
        ("does not match its id", "store.s3.secret_access_key"),
        {"STORE__S3__SECRET_ACCESS_KEY": "not-the-one"},
    ),
    "no keys at all": Mistake(
        ("no credentials were found", "store.s3.access_key_id"),
        {"STORE__S3__ACCESS_KEY_ID": "", "STORE__S3__SECRET_ACCESS_KEY": ""},
    ),
    "half of the keys": Mistake(
        ("access_key_id and secret_access_key", "or neither"),
        {"STORE__S3__SECRET_ACCESS_KEY": ""},
    ),
    "an endpoint that is down": Mistake(
        ("cannot be reached", "store.s3.endpoint_url", "http://127.0.0.1:1"),
        {"STORE__S3__ENDPOINT_URL": "http://127.0.0.1:1"},
    ),
    "another region": Mistake(
        ("the region 'eu-west-3'", "store.s3.region"),
        answer=error(
            400, "AuthorizationHeaderMalformed", extra="<Region>eu-west-3</Region>"
        ),
    ),
    "another region, by a redirect": Mistake(
        ("the region 'eu-west-3'", "store.s3.region"),
        answer=error(301, "PermanentRedirect", extra="<Region>eu-west-3</Region>"),
    ),
    "expired credentials": Mistake(
        ("the credentials have expired", "store.s3.session_token"),
        {"STORE__S3__SESSION_TOKEN": "temporary"},
        answer=error(400, "ExpiredToken"),
    ),
    "something that is no S3": Mistake(
        ("404", "store.s3.endpoint_url"),
        answer=Fault(status=404, body="<html>nothing here</html>"),
    ),
}


def environment(home: Path, endpoint: str, variables: dict[str, str]) -> dict[str, str]:
    """An environment in which nothing else says how to get to S3."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "EXPORTD_"))
    }
    good = {
        "STORE__URL": f"s3://{BUCKET}/{home.name}",
        "STORE__S3__ENDPOINT_URL": endpoint,
        "STORE__S3__PATH_STYLE": "true",
        "STORE__S3__ACCESS_KEY_ID": "writer",
        "STORE__S3__SECRET_ACCESS_KEY": SECRET,
        "STORE__S3__ATTEMPTS": "1",
        "STORE__S3__CONNECT_TIMEOUT": "10",
    }
    chosen = {f"EXPORTD_{k}": v for k, v in (good | variables).items() if v}
    return {
        **inherited,
        **chosen,
        "HOME": str(home),
        "AWS_EC2_METADATA_DISABLED": "true",
    }


async def start(
    home: Path, catalogue: Path, variables: dict[str, str]
) -> tuple[int | None, str, str]:
    """Start a server; how it ended, None when it did not and had to be, and all that it
    said on standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "exportd_server", "serve"),
        *("--listen", "127.0.0.1:0", "--data-dir", str(home / "data")),
        *("--catalogue", str(catalogue), "--log-level", "warning"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=variables,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(ENOUGH):
            first = await process.stdout.readline()
    finally:
        if running := process.returncode is None and not process.stdout.at_eof():
            process.terminate()
        out, err = await process.communicate()
    code = None if running and first else process.returncode
    return code, (first + out).decode(), err.decode()


@dataclass(frozen=True)
class Ended:
    """What came of a start."""

    code: int | None
    out: str
    err: str
    left: list[str]
    """Objects and unfinished uploads in the bucket, at the place that was named."""


@pytest.fixture(scope="module")
def ended(
    tmp_path_factory: pytest.TempPathFactory,
    sample_catalogue: Path,
    seaweed: SeaweedServer,
) -> dict[str, Ended]:
    """Every start, and the one without a mistake; two at a time, for most of it is
    loading."""
    tried = {"none": Mistake(())} | MISTAKES
    turns = asyncio.Semaphore(2)

    async def one(name: str, wrong: Mistake) -> Ended:
        home = tmp_path_factory.mktemp("start")
        async with turns:
            with s3_proxy(seaweed.endpoint) as proxy:
                proxy.plan = lambda _: wrong.answer
                variables = environment(home, proxy.endpoint, wrong.variables)
                code, out, err = await start(home, sample_catalogue, variables)
        raw = RawS3(seaweed.raw, seaweed.options(prefix=home.name))
        return Ended(code, out, err, [*raw.objects(), *raw.uploads()])

    async def all_of_them() -> list[Ended]:
        return await asyncio.gather(*(one(*each) for each in tried.items()))

    return dict(zip(tried, asyncio.run(all_of_them()), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_start_with_one_line_that_names_the_setting(
    ended: dict[str, Ended], mistake: str
) -> None:
    found = ended[mistake]
    assert found.code == EXIT_CONFIGURATION, found.err
    assert found.out == ""
    (line,) = found.err.splitlines()
    assert line.startswith("exportd-server: ")
    for text in MISTAKES[mistake].tells:
        assert text in line
    assert "Traceback" not in line
    assert SECRET not in line
    assert found.left == []


def test_without_a_mistake_the_same_start_serves(ended: dict[str, Ended]) -> None:
    """Else the lines above could have come from anything."""
    found = ended["none"]
    assert found.code is None, found.err
    assert found.out.startswith("127.0.0.1:")
    assert found.err == ""
    assert found.left == [".owner"]
