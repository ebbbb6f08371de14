"""Who calls: API keys, tokens, and what happens when they change while a server runs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
import structlog
from aiohttp import web
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2
from exportd_server.api.interceptors.identity import SCOPES, IdentityInterceptor
from exportd_server.cli import main
from exportd_server.errors import ConfigurationError, Unauthenticated
from exportd_server.identity.authenticator import Authenticator
from exportd_server.identity.base import ANYBODY, Method, Principal, Scope
from exportd_server.identity.file import NAME, FileKeyStore
from exportd_server.identity.jwks import (
    FileSource,
    KeySet,
    KeySetUnusable,
    UrlSource,
    parse,
)
from exportd_server.identity.keys import KeyRing, new_key
from exportd_server.identity.tokens import TokenOptions, TokenVerifier
from exportd_server.jobs.ledger.postgres import migrate_postgres_ledger
from exportd_server.platform.clock import SystemClock
from exportd_server.settings import JwtSettings, load_settings
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.identity import AUDIENCE, ISSUER, Issuer, api_key, bearer
from tests.support.ledger import FakeClock
from tests.support.samples import catalogue_of
from tests.support.server import Server, serve, server_process, settings, until
from tests.support.waits import ENOUGH

ALGORITHMS = ("RS256", "ES256", "EdDSA")


def keyed(data_dir: Path, **values: Any) -> Any:
    return settings(data_dir, identity={"api_keys": True}, drain_timeout=1.0, **values)


async def ask(server: Server, text: str) -> str:
    """What a caller with this key or token is answered: OK, or the reason."""
    try:
        await server.stub.ListJobs(pb.ListJobsRequest(), metadata=bearer(text))
    except grpc.aio.AioRpcError as error:
        return rpc.Refusal(error).reason
    return "OK"


async def answers(server: Server, text: str, expected: str) -> None:
    """Wait until a caller is answered so."""
    async with asyncio.timeout(ENOUGH):
        while await ask(server, text) != expected:
            await asyncio.sleep(0.05)


# --- API keys


def test_a_key_is_long_random_and_kept_as_a_hash_only() -> None:
    now = datetime.now(UTC)
    made = [new_key("acme", [Scope.READ], now=now) for _ in range(100)]
    for text, key in made:
        match = re.fullmatch(r"exportd_([a-z2-7]{16})_([a-z2-7]{52})", text)
        assert match is not None
        assert key.key_id == match[1]
        assert key.digest == hashlib.sha256(match[2].encode()).digest()
        assert match[2] not in repr(key)
    assert len({key.key_id for _, key in made}) == 100
    assert len({key.digest for _, key in made}) == 100


async def test_keys_are_made_listed_and_revoked_by_command_while_the_server_runs(
    tmp_path: Path,
) -> None:
    async def run(*arguments: str) -> Any:
        return await asyncio.to_thread(command, *arguments, "--data-dir", str(tmp_path))

    async with serve(keyed(tmp_path), catalogue_of(wide=GateSource(wide=True))) as server:
        made = await run(
            *("create", "--tenant", "acme", "--scope", "exports.read", "--name", "ci"),
            *("--expires-in", "90d"),
        )
        text = made.stdout.strip()
        key_id = text.split("_")[1]
        assert text.count("\n") == 0
        assert key_id in made.stderr
        await answers(server, text, "OK")

        listed = (await run("list", "--json")).stdout
        (row,) = map(json.loads, listed.splitlines())
        assert (row["id"], row["tenant"], row["name"]) == (key_id, "acme", "ci")
        assert row["scopes"] == ["exports.read"]
        left = datetime.fromisoformat(row["expires"]) - datetime.now(UTC)
        assert timedelta(days=89) < left < timedelta(days=91)
        assert row["revoked"] is None
        shown = (await run("list")).stdout
        assert key_id in shown
        assert text.rpartition("_")[2] not in listed + shown
        assert not (await run("list", "--tenant", "globex")).stdout

        assert "revoked" in (await run("revoke", key_id)).stdout
        await answers(server, text, "UNAUTHENTICATED")
        assert "already" in (await run("revoke", key_id)).stdout
        assert "revoked" in (await run("list")).stdout


def command(*arguments: str, code: int = 0) -> Any:
    """Run `exportd-server keys`, which sets the process's logging up for itself."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    try:
        result = CliRunner().invoke(main, ["keys", *arguments])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.configure(**before)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "--tenant", "Acme Corp"),
        ("create", "--tenant", "../acme"),
        ("create", "--tenant", "acme", "--scope", "everything"),
        ("create", "--tenant", "acme", "--expires-in", "soon"),
        ("create", "--tenant", "acme", "--expires-in", "0d"),
        ("create", "--tenant", "acme", "--name", "two\nlines"),
        ("create",),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    command(*arguments, "--data-dir", str(tmp_path), code=2)
    assert not (tmp_path / NAME).exists()


def test_revoking_a_key_that_is_not_there_says_so_without_repeating_it(
    tmp_path: Path,
) -> None:
    text, _ = new_key("acme", [Scope.READ], now=datetime.now(UTC))
    result = command("revoke", text, "--data-dir", str(tmp_path), code=1)
    assert "no key of that id" in result.output
    assert text not in result.output


def test_whoever_makes_a_key_that_nobody_asks_for_is_told(tmp_path: Path) -> None:
    made = command("create", "--tenant", "acme", "--data-dir", str(tmp_path))
    assert "identity.api_keys" in made.stderr


async def test_every_process_of_a_fleet_sees_keys_in_postgresql(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(migrate_postgres_ledger, postgres_url)
    options = keyed(
        tmp_path / "data",
        ledger={"url": postgres_url, "connections": 2},
        store={"url": f"file://{tmp_path / 'out'}"},
        metrics={},
    )
    monkeypatch.setenv("EXPORTD_LEDGER__URL", postgres_url)
    sources = catalogue_of(wide=GateSource(wide=True))
    async with serve(options, sources) as one, serve(options, sources) as two:
        made = await asyncio.to_thread(command, "create", "--tenant", "acme")
        text = made.stdout.strip()
        for server in (one, two):
            await answers(server, text, "OK")
        await asyncio.to_thread(command, "revoke", text.split("_")[1])
        for server in (one, two):
            await answers(server, text, "UNAUTHENTICATED")
    assert not (tmp_path / "data" / NAME).exists()


async def test_a_stream_ends_when_its_key_is_revoked_and_others_go_on(
    tmp_path: Path,
) -> None:
    source = GateSource(2)
    text, key = await api_key(tmp_path)
    other, _ = await api_key(tmp_path)
    async with serve(keyed(tmp_path), catalogue_of(held=source)) as server:
        created = await server.stub.CreateExport(rpc.request("held"), metadata=bearer(text))
        job_id = created.job.job_id
        streams = {
            name: asyncio.create_task(drained(call))
            for name, call in {
                "watch": server.stub.WatchJob(
                    pb.WatchJobRequest(job_id=job_id), metadata=bearer(text)
                ),
                "download": server.stub.StreamDownload(
                    pb.StreamDownloadRequest(job_id=job_id, follow=True),
                    metadata=bearer(text),
                ),
                "other": server.stub.WatchJob(
                    pb.WatchJobRequest(job_id=job_id), metadata=bearer(other)
                ),
            }.items()
        }
        async for answer in server.stub.WatchJob(
            pb.WatchJobRequest(job_id=job_id), metadata=bearer(other)
        ):
            if answer.job.state == job_pb2.JOB_STATE_RUNNING:
                break
        await FileKeyStore(tmp_path).revoke(key.key_id, datetime.now(UTC))
        async with asyncio.timeout(ENOUGH):
            for name in ("watch", "download"):
                refusal = await streams[name]
                assert isinstance(refusal, rpc.Refusal)
                assert refusal.reason == "UNAUTHENTICATED"
                assert "revoked" in refusal.message
        source.open_wide()
        assert await streams["other"] is None


async def test_a_download_that_nobody_reads_ends_with_its_key_too(tmp_path: Path) -> None:
    text, key = await api_key(tmp_path)
    # Far more than connections buffer.
    source = GateSource(1500, wide=True)
    async with serve(keyed(tmp_path), catalogue_of(wide=source)) as server:
        own = bearer(text)
        created = await server.stub.CreateExport(rpc.request("wide"), metadata=own)
        watch = pb.WatchJobRequest(job_id=created.job.job_id)
        async for answer in server.stub.WatchJob(watch, metadata=own):
            job = answer.job
        assert job.manifest.bytes > 10 * 2**20
        asked = pb.StreamDownloadRequest(job_id=job.job_id)
        messages = aiter(server.stub.StreamDownload(asked, metadata=own))
        assert (await anext(messages)).HasField("metadata")
        await FileKeyStore(tmp_path).revoke(key.key_id, datetime.now(UTC))
        await answers(server, text, "UNAUTHENTICATED")
        refusal = await drained(messages)
        assert refusal is not None
        assert refusal.reason == "UNAUTHENTICATED"


async def drained(call: Any) -> rpc.Refusal | None:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return rpc.Refusal(error)
    return None


async def test_the_last_good_keys_hold_while_the_file_is_broken(tmp_path: Path) -> None:
    text, _ = await api_key(tmp_path)
    good = (tmp_path / NAME).read_bytes()
    ring = KeyRing(FileKeyStore(tmp_path), SystemClock())
    await ring.start()
    try:
        (tmp_path / NAME).write_text("{")
        with pytest.raises(Exception, match=NAME):
            await ring.refresh()
        assert ring.authenticate(text).tenant == "acme"
        (tmp_path / NAME).write_bytes(good)
        await ring.refresh()
        assert ring.authenticate(text).tenant == "acme"
        (tmp_path / NAME).unlink()
        await ring.refresh()
        with pytest.raises(Unauthenticated):
            ring.authenticate(text)
    finally:
        await ring.close()


async def test_a_server_does_not_start_on_keys_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{")
    with pytest.raises(ConfigurationError, match=NAME):
        async with serve(keyed(tmp_path), catalogue_of(wide=GateSource())):
            pass


async def test_a_key_ends_at_its_moment_and_not_before(tmp_path: Path) -> None:
    clock = FakeClock()
    text, key = new_key(
        "acme", [Scope.READ], now=clock.now(), lifetime=timedelta(seconds=10)
    )
    await FileKeyStore(tmp_path).add(key)
    ring = KeyRing(FileKeyStore(tmp_path), clock)
    await ring.refresh()
    clock.advance(9.999999)
    assert ring.authenticate(text) == Principal(
        f"key:{key.key_id}",
        "acme",
        frozenset({Scope.READ}),
        Method.API_KEY,
        key_id=key.key_id,
    )
    clock.advance(0.000001)
    with pytest.raises(Unauthenticated, match="has expired"):
        ring.authenticate(text)


async def test_whoever_has_not_the_secret_learns_nothing_of_a_key(tmp_path: Path) -> None:
    text, key = await api_key(tmp_path, lifetime=timedelta(seconds=-1))
    await FileKeyStore(tmp_path).revoke(key.key_id, datetime.now(UTC))
    ring = KeyRing(FileKeyStore(tmp_path), SystemClock())
    await ring.refresh()
    told = set()
    for wrong in (
        text[:-1] + ("a" if text[-1] != "a" else "b"),
        f"exportd_{'a' * 16}_{text.rpartition('_')[2]}",
        f"exportd_{key.key_id}_",
        f"exportd_{key.key_id}",
        f"exportd_{key.key_id}_{key.digest.hex()[:52]}",
        text + "x",
        text.upper(),
        "exportd_",
        "exportd__",
    ):
        with pytest.raises(Unauthenticated) as refused:
            ring.authenticate(wrong)
        told.add(refused.value.message)
    assert told == {"the credentials are not valid"}


# --- tokens


@dataclass
class Tokens:
    """An issuer with a key of each algorithm, and a server's view of it."""

    issuer: Issuer
    verifier: TokenVerifier
    file: Path

    async def refused(self, token: str) -> str:
        """What a refused caller is told."""
        with pytest.raises(Unauthenticated) as refused:
            await self.verifier.authenticate(token)
        return refused.value.message


def options(**changes: Any) -> TokenOptions:
    return TokenOptions(
        **{
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "algorithms": ALGORITHMS,
            "tenant_claim": "tenant",
            "scopes_claim": "scope",
            "leeway": 10.0,
            **changes,
        }
    )


@asynccontextmanager
async def tokens_of(
    directory: Path, issuer: Issuer | None = None, **changes: Any
) -> AsyncIterator[Tokens]:
    if issuer is None:
        issuer = Issuer()
        for algorithm in ALGORITHMS:
            issuer.add(algorithm, algorithm)
    file = directory / "jwks.json"
    file.write_bytes(issuer.jwks())
    keys = KeySet(FileSource(file), ALGORITHMS, refresh=300, pause=0)
    await keys.start()
    try:
        yield Tokens(issuer, TokenVerifier(options(**changes), keys), file)
    finally:
        await keys.close()


@pytest.fixture
async def tokens(tmp_path: Path) -> AsyncIterator[Tokens]:
    async with tokens_of(tmp_path) as tokens:
        yield tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_token_of_each_algorithm_names_its_caller(
    tokens: Tokens, algorithm: str
) -> None:
    found = await tokens.verifier.authenticate(tokens.issuer.token(algorithm))
    assert found == Principal(
        "somebody", "acme", frozenset({Scope.READ, Scope.WRITE}), Method.TOKEN
    )


@pytest.mark.parametrize(
    ("claim", "scopes"),
    [
        ("exports.read", {Scope.READ}),
        ("openid exports.write  profile", {Scope.WRITE}),
        (["admin", "openid"], {Scope.ADMIN}),
        ("exports.readexports.write Admin EXPORTS.READ", set()),
        ("", set()),
        (None, set()),
        (7, set()),
        ({"exports.read": True}, set()),
        ([["admin"]], set()),
    ],
)
async def test_only_scopes_that_are_known_count(
    tokens: Tokens, claim: object, scopes: set[Scope]
) -> None:
    token = tokens.issuer.token("ES256", scope=claim)
    assert (await tokens.verifier.authenticate(token)).scopes == scopes


@pytest.mark.parametrize("claim", ["exp", "nbf", "iss", "aud", "sub", "tenant"])
async def test_a_token_without_a_claim_that_it_must_have_is_refused(
    tmp_path: Path, claim: str
) -> None:
    async with tokens_of(tmp_path, require_nbf=True) as tokens:
        told = await tokens.refused(tokens.issuer.token("ES256", without=[claim]))
        assert claim in told or claim == "aud"


async def test_nbf_may_be_left_out_unless_the_operator_says_so_and_counts_all_the_same(
    tokens: Tokens,
) -> None:
    assert options().require_nbf is JwtSettings().require_nbf is False
    token = tokens.issuer.token("ES256", without=["nbf"])
    assert (await tokens.verifier.authenticate(token)).tenant == "acme"
    early = tokens.issuer.token("ES256", nbf=int(time.time()) + 60)
    assert "not valid yet" in await tokens.refused(early)


@pytest.mark.parametrize(
    ("claims", "told"),
    [
        ({"lifetime": -11}, "expired"),
        ({"nbf": int(time.time()) + 3600}, "not valid yet"),
        ({"iat": int(time.time()) + 3600}, "not valid yet"),
        ({"iss": "https://issuer.example.evil"}, "not valid"),
        ({"iss": [ISSUER]}, "not valid"),
        ({"aud": "another"}, "another audience"),
        ({"aud": []}, "lacks claim aud"),
        ({"exp": "soon"}, "not valid"),
        ({"exp": float("inf")}, "not valid"),
        ({"sub": 7}, "not valid"),
        ({"tenant": "Acme"}, "no tenant"),
        ({"tenant": "../acme"}, "no tenant"),
        ({"tenant": ["acme"]}, "no tenant"),
        ({"tenant": ""}, "no tenant"),
        ({"tenant": "a" * 64}, "no tenant"),
        ({"tenant": "acme\n"}, "no tenant"),
    ],
)
async def test_a_token_with_a_wrong_claim_is_refused(
    tokens: Tokens, claims: Mapping[str, Any], told: str
) -> None:
    token = tokens.issuer.token("ES256", **claims)
    assert told in await tokens.refused(token)


async def test_clocks_may_differ_a_little(tokens: Tokens) -> None:
    token = tokens.issuer.token("ES256", lifetime=-5, nbf=int(time.time()) + 5)
    assert (await tokens.verifier.authenticate(token)).tenant == "acme"


async def test_a_token_that_was_good_ends_at_its_moment_or_with_its_key(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tokens.issuer.token("ES256", lifetime=60)
    for _ in range(3):
        assert (await tokens.verifier.authenticate(token)).tenant == "acme"
    # The leeway is ten seconds.
    for later, good in ((65, True), (75, False)):
        now = time.time() + later
        with monkeypatch.context() as patch:
            patch.setattr("exportd_server.identity.tokens.time.time", lambda now=now: now)
            assert (tokens.verifier._known(digest(token)) is not None) == good
    tokens.file.write_bytes(tokens.issuer.jwks(["RS256"]))
    other = tokens.issuer.token("ES256", headers={"kid": "unknown"})
    assert await tokens.refused(other)
    assert await tokens.refused(token) == "the credentials are not valid"


@pytest.mark.parametrize("exp", [10**400, float("inf"), float("nan"), [10**400], 1e400])
async def test_a_token_that_ends_at_no_moment_there_is_is_refused(
    tokens: Tokens, exp: object
) -> None:
    with pytest.raises(Unauthenticated) as refused:
        await tokens.verifier.authenticate(tokens.issuer.token(exp=exp))
    assert refused.value.cause.startswith("bad token: ")


async def test_a_token_of_a_far_future_is_good_each_time(tokens: Tokens) -> None:
    text = tokens.issuer.token(exp=10**300)
    for _ in range(2):
        assert (await tokens.verifier.authenticate(text)).tenant == "acme"


async def test_only_so_many_good_tokens_are_remembered(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd_server.identity.tokens._REMEMBERED", 10)
    for number in range(35):
        token = tokens.issuer.token("EdDSA", sub=str(number))
        for _ in range(2):
            found = await tokens.verifier.authenticate(token)
            assert found.subject == str(number)
        assert len(tokens.verifier._good) <= 10


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


async def test_a_token_for_several_services_works_here(tokens: Tokens) -> None:
    token = tokens.issuer.token("ES256", aud=["another", AUDIENCE])
    assert (await tokens.verifier.authenticate(token)).tenant == "acme"


def unsigned(header: Mapping[str, Any], token: str) -> str:
    """The token's claims under another header, without a signature."""
    head = base64.urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip("=")
    return f"{head}.{token.split('.')[1]}."


async def test_algorithms_that_prove_nothing_are_refused(tokens: Tokens) -> None:
    good = tokens.issuer.token("RS256")
    for name in ("none", "None", "NONE", "", None, 7):
        for kid in ("RS256", None):
            header = {"alg": name, "typ": "JWT", "kid": kid}
            assert await tokens.refused(unsigned(header, good))
    # The public key, which everybody knows, as the secret of a symmetric algorithm.
    _, key = tokens.issuer.keys["RS256"]
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for algorithm, digest in (("HS256", "sha256"), ("HS512", "sha512")):
        signed = unsigned({"alg": algorithm, "kid": "RS256"}, good).rstrip(".")
        mac = hmac.digest(public, signed.encode(), digest)
        text = base64.urlsafe_b64encode(mac).decode().rstrip("=")
        assert await tokens.refused(f"{signed}.{text}")


async def test_a_key_serves_its_own_algorithm_alone(tokens: Tokens) -> None:
    for kid in ALGORITHMS:
        for other in set(ALGORITHMS) - {kid}:
            token = tokens.issuer.token(kid, headers={"kid": other})
            assert await tokens.refused(token) == "the credentials are not valid"


async def test_a_token_that_was_changed_is_refused(tokens: Tokens) -> None:
    head, claims, signature = tokens.issuer.token("ES256", tenant="acme").split(".")
    other = tokens.issuer.token("ES256", tenant="globex").split(".")[1]
    for token in (
        f"{head}.{other}.{signature}",
        f"{head}.{claims}.",
        f"{head}.{claims}",
        f"{head}.{claims}.{signature[:-4]}AAAA",
        f".{claims}.{signature}",
    ):
        assert await tokens.refused(token) == "the credentials are not valid"


async def test_keys_that_a_token_brings_along_do_not_count(tokens: Tokens) -> None:
    forger = Issuer()
    forger.add("ES256")
    (own,) = json.loads(forger.jwks())["keys"]
    for headers in (
        {"jwk": own},
        {"jku": "http://127.0.0.1:1/jwks.json"},
        {"x5u": "http://127.0.0.1:1/x.pem"},
        {"kid": "../../jwks.json"},
        {"crit": ["exp"], "exp": 0},
    ):
        assert await tokens.refused(forger.token("ES256", headers=headers))


async def test_an_extension_that_must_be_understood_is_refused(tokens: Tokens) -> None:
    token = tokens.issuer.token("ES256", headers={"crit": ["b64"], "b64": True})
    unknown = tokens.issuer.token("ES256", headers={"crit": ["odd"], "odd": 1})
    assert await tokens.refused(unknown)
    assert token != unknown


_SEGMENT = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=60).map(lambda raw: base64.urlsafe_b64encode(raw).decode()),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=10),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["alg", "kid", "typ", "crit", "b64", "exp", "nbf", "sub"])
                | st.text(max_size=4),
                inner,
                max_size=5,
            )
        ),
        max_leaves=10,
    ).map(lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode()),
)


@given(st.lists(_SEGMENT, min_size=1, max_size=4).map(".".join))
def test_whatever_is_sent_as_a_token_is_refused_and_breaks_nothing(text: str) -> None:
    class NoKeys(KeySet):
        async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
            return KEY

    verifier = TokenVerifier(options(), NoKeys(FileSource(Path()), ALGORITHMS, refresh=1))
    with pytest.raises(Unauthenticated):
        asyncio.run(verifier.authenticate(text))


def _some_key() -> jwt.PyJWK:
    issuer = Issuer()
    issuer.add("k")
    return parse(issuer.jwks(), ALGORITHMS)[0]


KEY = _some_key()


@given(
    st.dictionaries(
        st.sampled_from(["exp", "nbf", "iat", "iss", "aud", "sub", "scope"]),
        st.none()
        | st.booleans()
        | st.floats()
        | st.integers()
        | st.text(max_size=10)
        | st.lists(st.text(max_size=5), max_size=3),
    )
)
def test_signed_claims_of_any_kind_are_refused_or_name_a_tenant(
    claims: dict[str, Any],
) -> None:
    issuer = Issuer()
    issuer.add("k")
    (key,) = parse(issuer.jwks(), ALGORITHMS)

    class OneKey(KeySet):
        async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
            return key

    token = issuer.token(**claims)
    verifier = TokenVerifier(options(), OneKey(FileSource(Path()), ALGORITHMS, refresh=1))
    try:
        found = asyncio.run(verifier.authenticate(token))
    except Unauthenticated:
        return
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", found.tenant)


# --- key sets


async def test_a_key_that_is_new_is_found_and_one_that_is_gone_works_no_more(
    tokens: Tokens,
) -> None:
    old = tokens.issuer.token("ES256")
    tokens.issuer.add("new")
    new = tokens.issuer.token("new")
    assert await tokens.refused(new) == "the credentials are not valid"
    tokens.file.write_bytes(tokens.issuer.jwks(["new"]))
    assert (await tokens.verifier.authenticate(new)).tenant == "acme"
    assert await tokens.refused(old) == "the credentials are not valid"


async def test_a_token_without_a_key_id_gets_the_only_key_of_its_algorithm(
    tokens: Tokens,
) -> None:
    anonymous = tokens.issuer.token("ES256", headers={"kid": None})
    head = json.loads(base64.urlsafe_b64decode(anonymous.split(".")[0] + "=="))
    assert head.get("kid") is None
    assert (await tokens.verifier.authenticate(anonymous)).tenant == "acme"
    tokens.issuer.add("second")
    tokens.file.write_bytes(tokens.issuer.jwks())
    assert await tokens.refused(tokens.issuer.token("second", headers={"kid": "third"}))
    assert await tokens.refused(anonymous), "it could be either of two"


def test_only_public_keys_that_sign_are_taken_from_a_set() -> None:
    issuer = Issuer()
    issuer.add("good")
    (good,) = json.loads(issuer.jwks())["keys"]
    small = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to be refused
    kind = jwt.get_algorithm_by_name("RS256")
    _, private = issuer.keys["good"]
    bad = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "secret", "alg": "HS256"},
        {**kind.to_jwk(small.public_key(), as_dict=True), "kid": "short"},
        {**jwt.get_algorithm_by_name("ES256").to_jwk(private, as_dict=True), "kid": "d"},
        {**good, "kid": "encrypts", "use": "enc"},
        {**good, "kid": "signs", "key_ops": ["sign"]},
        {**good, "kid": "odd", "alg": "none"},
        {**good, "kid": "odd", "crv": "P-1"},
        {**good, "kid": "odd", "x": 7},
        {**good, "kid": "odd", "x": "AAAA"},
        {"kid": "nothing"},
        "no key",
        None,
    ]
    text = json.dumps({"keys": [*bad, good]}).encode()
    assert [key.key_id for key in parse(text, ALGORITHMS)] == ["good"]
    with pytest.raises(KeySetUnusable, match="no public key"):
        parse(json.dumps({"keys": bad}).encode(), ALGORITHMS)
    for text in (b"", b"[]", b"{}", b'{"keys": 1}', b"[" * 10_000, b"\xff", b"null"):
        with pytest.raises(KeySetUnusable):
            parse(text, ALGORITHMS)


class Website:
    """Serves a key set as the test says."""

    def __init__(self) -> None:
        self.text = b""
        self.asked = 0
        self.status = 200
        self.headers: dict[str, str] = {}
        self.hold: asyncio.Event | None = None

    async def answer(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.hold is not None:
            await self.hold.wait()
        return web.Response(body=self.text, status=self.status, headers=self.headers)


@pytest.fixture
async def website() -> AsyncIterator[tuple[Website, str]]:
    site = Website()
    application = web.Application()
    application.router.add_get("/jwks", site.answer)
    runner = web.AppRunner(application, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield site, f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    if site.hold is not None:
        site.hold.set()
    await runner.cleanup()


async def test_keys_come_from_a_url_and_an_unknown_one_is_looked_for_once_in_a_while(
    website: tuple[Website, str],
) -> None:
    site, url = website
    issuer = Issuer()
    issuer.add("old")
    site.text = issuer.jwks()
    keys = KeySet(UrlSource(url), ALGORITHMS, refresh=300, pause=300)
    await keys.start()
    try:
        for _ in range(50):
            assert await keys.find("old", "ES256") is not None
        assert site.asked == 1
        # However many ask for keys that are not there.
        await asyncio.gather(*(keys.find(f"no-{n}", "ES256") for n in range(200)))
        assert site.asked == 1
        issuer.add("new")
        site.text = issuer.jwks()
        keys._looked -= 300
        found = await asyncio.gather(*(keys.find("new", "ES256") for _ in range(50)))
        assert all(found)
        assert site.asked == 2
    finally:
        await keys.close()


@pytest.mark.parametrize(
    "fault", ["status", "garbage", "no key", "redirect", "too long", "silence", "away"]
)
async def test_the_last_good_keys_hold_while_the_url_fails(
    website: tuple[Website, str], fault: str
) -> None:
    site, url = website
    issuer = Issuer()
    issuer.add("k")
    good = site.text = issuer.jwks()
    source = UrlSource(url)
    keys = KeySet(source, ALGORITHMS, refresh=0.1, pause=0)
    await keys.start()
    try:
        if fault == "status":
            site.status = 500
        elif fault == "garbage":
            site.text = b"<html>"
        elif fault == "no key":
            site.text = b'{"keys": []}'
        elif fault == "redirect":
            site.status, site.headers = 302, {"Location": url}
        elif fault == "too long":
            site.text = b" " * 2**21 + good
        elif fault == "silence":
            site.hold = asyncio.Event()
            source._timeout = 0.3
        else:
            await source.close()
        with pytest.raises((KeySetUnusable, RuntimeError)):
            await keys._read()
        before = site.asked
        assert await keys.find("other", "ES256") is None
        assert fault == "away" or site.asked > before
        assert await keys.find("k", "ES256") is not None
    finally:
        await keys.close()


async def test_new_keys_are_fetched_in_the_background(
    website: tuple[Website, str],
) -> None:
    site, url = website
    issuer = Issuer()
    issuer.add("k")
    site.text = issuer.jwks()
    keys = KeySet(UrlSource(url), ALGORITHMS, refresh=0.05, pause=300)
    await keys.start()
    try:
        issuer.add("new")
        site.text = issuer.jwks()
        await until(lambda: keys._find("new", "ES256"))
        site.text = issuer.jwks(["new"])
        await until(lambda: not keys._find("k", "ES256"))
    finally:
        await keys.close()


async def test_a_server_starts_without_the_issuer_and_takes_tokens_once_it_is_there(
    website: tuple[Website, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd_server.identity.jwks.PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(KeySet.__init__, "__kwdefaults__", {"pause": 0.1})
    site, url = website
    site.status = 503
    issuer = Issuer()
    issuer.add("k")
    site.text = issuer.jwks()
    text, _ = await api_key(tmp_path)
    identity = {
        "api_keys": True,
        "jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": url},
    }
    options = settings(tmp_path, identity=identity, drain_timeout=1.0)
    async with serve(options, catalogue_of(wide=GateSource(wide=True))) as server:
        assert await ask(server, text) == "OK"
        call = server.stub.ListJobs(pb.ListJobsRequest(), metadata=bearer(issuer.token()))
        assert "try again later" in (await rpc.refusal(call)).message
        site.status = 200
        await answers(server, issuer.token(), "OK")


async def test_a_server_does_not_start_on_a_key_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text("{}")
    options = settings(
        tmp_path,
        identity={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": file}},
    )
    with pytest.raises(ConfigurationError, match="jwks_file"):
        async with serve(options, catalogue_of(wide=GateSource())):
            pass


# --- calls


async def test_a_method_without_a_row_is_refused_for_everybody() -> None:
    for authenticator in (Authenticator(), Authenticator(tokens=Everybody())):
        interceptor = IdentityInterceptor(
            frozenset({"exportd.v1.ExportService"}), authenticator, None, scopes={}
        )
        async with calling(interceptor) as channel:
            for method in ("GetJob", "WatchJob"):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await invoke(channel, f"/exportd.v1.ExportService/{method}")
                # Nothing here turns the error into a status, and the handler was not run.
                assert refused.value.code() == grpc.StatusCode.UNKNOWN
                assert "may not do that" in (refused.value.details() or "")


async def test_a_service_that_nobody_guards_does_not_exist_for_callers() -> None:
    interceptor = IdentityInterceptor(frozenset({"other"}), Authenticator(), None, SCOPES)
    async with calling(interceptor) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await invoke(channel, "/exportd.v1.ExportService/GetJob")
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


class Everybody:
    """Takes any token for an administrator's."""

    async def authenticate(self, _: str) -> Principal:
        return ANYBODY


async def invoke(channel: grpc.aio.Channel, method: str) -> bytes:
    call: Callable[..., Awaitable[bytes]] = channel.unary_unary(method)
    return await call(b"", metadata=bearer("anything"), timeout=10)


@asynccontextmanager
async def calling(interceptor: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A server with a handler of two methods behind the interceptor."""

    async def unary(request: bytes, _: Any) -> bytes:
        return b"reached"

    async def stream(request: bytes, _: Any) -> AsyncIterator[bytes]:
        yield b"reached"

    server = grpc.aio.server(interceptors=(interceptor,))
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "GetJob": grpc.unary_unary_rpc_method_handler(unary),
        "WatchJob": grpc.unary_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("exportd.v1.ExportService", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def test_health_and_reflection_are_open_and_tell_the_contract_alone(
    tmp_path: Path,
) -> None:
    async with serve(keyed(tmp_path), catalogue_of(wide=GateSource())) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        found = await health.Check(health_pb2.HealthCheckRequest())
        assert found.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="*")])
        )
        async for answer in call:
            names = {each.name for each in answer.list_services_response.service}
            assert "exportd.v1.ExportService" in names
            break
        refusal = await rpc.refusal(server.stub.ListDatasets(pb.ListDatasetsRequest()))
        assert refusal.reason == "UNAUTHENTICATED"


async def test_a_request_is_read_only_once_the_caller_is_known(tmp_path: Path) -> None:
    text, _ = await api_key(tmp_path)
    async with serve(keyed(tmp_path), catalogue_of(wide=GateSource())) as server:
        for kind in (server.channel.unary_unary, server.channel.unary_stream):
            name = "GetJob" if kind == server.channel.unary_unary else "WatchJob"
            call: Any = kind(f"/exportd.v1.ExportService/{name}")
            assert (await rpc.refusal(call(b"\xff"))).reason == "UNAUTHENTICATED"
            known = await rpc.refusal(call(b"\xff", metadata=bearer(text)))
            assert known.reason == "INVALID_REQUEST"


@pytest.mark.parametrize(
    "headers",
    [
        ["Basic {key}"],
        ["{key}"],
        ["Bearer"],
        ["Bearer "],
        ["Bearer {key} {key}"],
        ["Bearer {key}", "Bearer {key}"],
        ["Bearer {key}", "Bearer other"],
        ["", "Bearer {key}"],
    ],
)
async def test_a_header_that_is_not_one_bearer_credential_is_refused(
    keyed_server: tuple[Server, str], headers: list[str]
) -> None:
    server, text = keyed_server
    metadata = [("authorization", header.format(key=text)) for header in headers]
    call = server.stub.ListJobs(pb.ListJobsRequest(), metadata=metadata)
    assert (await rpc.refusal(call)).reason == "UNAUTHENTICATED"


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
async def test_the_scheme_is_written_as_one_likes(
    keyed_server: tuple[Server, str], scheme: str
) -> None:
    server, text = keyed_server
    metadata = (("authorization", scheme + text),)
    await server.stub.ListJobs(pb.ListJobsRequest(), metadata=metadata)


@pytest.fixture
async def keyed_server(tmp_path: Path) -> AsyncIterator[tuple[Server, str]]:
    text, _ = await api_key(tmp_path)
    async with serve(keyed(tmp_path), catalogue_of(wide=GateSource(wide=True))) as server:
        yield server, text


async def test_a_kind_of_credentials_that_is_not_set_up_is_not_accepted(
    tmp_path: Path, keyed_server: tuple[Server, str]
) -> None:
    server, _ = keyed_server
    issuer = Issuer()
    issuer.add("k")
    call = server.stub.ListJobs(pb.ListJobsRequest(), metadata=bearer(issuer.token()))
    refusal = await rpc.refusal(call)
    assert refusal.reason == "UNAUTHENTICATED"
    assert "with an API key" in refusal.message


async def test_without_identity_everybody_is_one_tenant_and_credentials_are_ignored(
    tmp_path: Path,
) -> None:
    with structlog.testing.capture_logs() as logs:
        async with serve(
            settings(tmp_path), catalogue_of(wide=GateSource(wide=True))
        ) as server:
            for metadata in ((), bearer("whatever")):
                await server.stub.CreateExport(rpc.request("wide"), metadata=metadata)
            jobs = await server.stub.ListJobs(pb.ListJobsRequest())
            assert len(jobs.jobs) == 2
    (serving,) = [each for each in logs if each["event"] == "serving"]
    assert serving["identity"].startswith("none: every caller")
    assert {each["tenant"] for each in logs if each["event"] == "job created"} == {
        "default"
    }


def test_no_key_and_no_token_is_ever_logged_or_kept(tmp_path: Path) -> None:
    """A real process with everything logged, called in all ways that go wrong."""
    issuer = Issuer()
    issuer.add("k")
    jwks = tmp_path / "jwks.json"
    jwks.write_bytes(issuer.jwks())
    data = tmp_path / "data"
    good, key = asyncio.run(api_key(data))
    expired, _ = asyncio.run(api_key(data, lifetime=timedelta(seconds=-1)))
    unknown, _ = new_key("acme", [Scope.ADMIN], now=datetime.now(UTC))
    wrong = good[:-1] + ("a" if good[-1] != "a" else "b")
    sent = [good, expired, unknown, wrong, issuer.token(), issuer.token(lifetime=-99)]
    env = {
        "EXPORTD_IDENTITY__API_KEYS": "true",
        "EXPORTD_IDENTITY__JWT__ISSUER": ISSUER,
        "EXPORTD_IDENTITY__JWT__AUDIENCE": AUDIENCE,
        "EXPORTD_IDENTITY__JWT__JWKS_FILE": str(jwks),
    }
    arguments = ("--sample-rows", "1000", "--log-level", "debug")
    with (
        server_process(data, *arguments, env=env) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call: Any = channel.unary_unary("/exportd.v1.ExportService/ListJobs")
        told: list[str] = []
        for text in sent:
            for header in (f"Bearer {text}", text, f"Basic {text}"):
                try:
                    call(b"", metadata=(("authorization", header),), timeout=30)
                    told.append("OK")
                except grpc.RpcError as error:
                    told.append(str(error))
        assert told.count("OK") == 2
        assert not [answer for answer in told for text in sent if text in answer]
        assert server.terminate() == 0
        log = server.log.read_text()
    refused = [line for line in log.splitlines() if "caller refused" in line]
    assert len(refused) == len(told) - 2
    assert any(key.key_id in line for line in refused), "who was refused can be told"
    assert f'"subject": "key:{key.key_id}"' in log
    assert '"subject": "somebody"' in log
    kept = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    for text in sent:
        secret = text.rpartition("_" if text.startswith("exportd_") else ".")[2]
        assert secret[:20] not in log
        assert secret[:20].encode() not in kept


async def test_a_download_url_carries_all_it_needs(tmp_path: Path) -> None:
    text, _ = await api_key(tmp_path)
    options = keyed(tmp_path, http={"listen": "127.0.0.1:0"})
    async with serve(options, catalogue_of(wide=GateSource(1, wide=True))) as server:
        own = bearer(text)
        created = await server.stub.CreateExport(rpc.request("wide"), metadata=own)
        watch = pb.WatchJobRequest(job_id=created.job.job_id)
        async for _ in server.stub.WatchJob(watch, metadata=own):
            pass
        urls = await server.stub.GetDownloadUrls(
            pb.GetDownloadUrlsRequest(job_id=created.job.job_id), metadata=own
        )
        (url,) = urls.urls
        assert not url.requires_access_token
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.get(url.url)
            assert (answer.status_code, len(answer.content)) == (200, url.bytes)


# --- settings

SECOND_PORT = """
[tls]
cert_file = "c"
key_file = "k"
client_ca_file = "a"
client_cert_listen = "0.0.0.0:2"
"""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('listen = "0.0.0.0:1"', "listen: .*allow_unauthenticated"),
        ('listen = "0.0.0.0:1"\n[identity]\napi_keys = true', "tls.allow_plaintext"),
        ('listen = "[::]:1"\n[identity]\napi_keys = true', "tls.allow_plaintext"),
        ("allow_unauthenticated = true\n[identity]\napi_keys = true", "contradicts"),
        ('[identity.jwt]\nissuer = "x"', "audience is missing"),
        ('[identity.jwt]\naudience = "x"', "issuer is missing"),
        ('[identity.jwt]\nissuer = "x"\naudience = "x"', "jwks_url or jwks_file"),
        ('[identity.jwt]\njwks_url = "http://issuer.example/"', "https://"),
        ('[identity.jwt]\nalgorithms = ["none"]', "algorithms"),
        ('[identity.jwt]\nalgorithms = ["HS256"]', "algorithms"),
        ("[identity.jwt]\nalgorithms = []", "algorithms"),
        ('[[identity.mtls]]\ncn = "x"\ntenant = "t"\nscopes = ["admin"]', "client_ca_file"),
        ('[[identity.mtls]]\ntenant = "t"\nscopes = ["admin"]', "exactly one"),
        (
            '[[identity.mtls]]\ncn = "x"\ndns = "x"\ntenant = "t"\nscopes = ["admin"]',
            "exactly one",
        ),
        ('[[identity.mtls]]\ncn = "x"\ntenant = "T"\nscopes = ["admin"]', "tenant"),
        ('[[identity.mtls]]\ncn = "x"\ntenant = "t"\nscopes = []', "scopes"),
        ('[tls]\ncert_file = "x"', "key_file"),
        ('[tls]\nclient_ca_file = "x"', "require_client_cert"),
        ("[tls]\nrequire_client_cert = true", "client_ca_file"),
        (SECOND_PORT, "tls.client_cert_listen: .* reachable from elsewhere"),
    ],
)
def test_settings_that_leave_a_door_open_are_refused(
    tmp_path: Path, content: str, told: str
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content + "\n")
    with pytest.raises(ConfigurationError, match=told):
        load_settings(file, {}, {})


def test_identity_can_be_set_up_by_variables_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "IDENTITY__API_KEYS": "true",
        "IDENTITY__JWT__ISSUER": ISSUER,
        "IDENTITY__JWT__AUDIENCE": AUDIENCE,
        "IDENTITY__JWT__JWKS_URL": f"{ISSUER}/jwks",
        "IDENTITY__JWT__ALGORITHMS": '["EdDSA"]',
        "IDENTITY__MTLS": '[{"cn": "x", "tenant": "t", "scopes": ["admin"]}]',
        "TLS__CERT_FILE": "c",
        "TLS__KEY_FILE": "k",
        "TLS__CLIENT_CA_FILE": "a",
        "TLS__CLIENT_CERT_LISTEN": "0.0.0.0:2",
        "LISTEN": "0.0.0.0:1",
    }.items():
        monkeypatch.setenv(f"EXPORTD_{name}", value)
    identity = load_settings(None, {}).identity
    assert identity.required
    assert identity.jwt.algorithms == ("EdDSA",)
    assert identity.mtls[0].tenant == "t"


@pytest.mark.parametrize(
    "content",
    [
        'listen = "0.0.0.0:1"\n[identity]\napi_keys = true\n[tls]\nallow_plaintext = true',
        'listen = "127.0.0.1:1"\n[identity]\napi_keys = true',
        'listen = "0.0.0.0:1"\nallow_unauthenticated = true',
        '[identity.jwt]\nissuer = "x"\naudience = "x"\njwks_url = "http://127.0.0.1:1/"',
    ],
)
def test_settings_that_say_what_they_mean_are_accepted(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content + "\n")
    load_settings(file, {}, {})
