"""Keys that secrets of callers are kept under may be rotated, and a request that is sent
again is known again whatever the keys were."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest

from exportd.v1 import export_service_pb2 as pb
from exportd.v1 import job_pb2, sink_pb2
from exportd_server.api.requests import payload
from exportd_server.platform.sealing import Fingerprints
from tests.support import rpc
from tests.support.receiver import Receiver, reply
from tests.support.server import serve, settings, until
from tests.support.waits import ENOUGH

FIRST, SECOND = "first key of 32 characters or so", "second key of 32 characters or so"
PIN = "4821"
SINKS = (
    '[connections.open]\ntype = "webhook"\nallow_http = true\n'
    'allow_private = ["127.0.0.0/8"]\nmax_attempts = 50\nretry_base_seconds = 0.2\n'
)


def options(folder: Path, catalogue: Path, *keys: str, **values: Any) -> Any:
    """Of an embedded server with these keys, or with the one that it makes and keeps."""
    sinks = folder / "sinks.toml"
    sinks.write_text(SINKS)
    delivery = {"secret_keys": " ".join(key.replace(" ", "-") for key in keys)}
    return settings(
        folder / "data", catalogue=catalogue, sinks=sinks, delivery=delivery, **values
    )


def request(url: str, pin: str = PIN, **fields: Any) -> job_pb2.CreateExportRequest:
    hook = sink_pb2.WebhookSink(
        connection="open", url=url, secret="whsec_" + "QUJD" * 10, headers={"x-pin": pin}
    )
    return rpc.request(
        "token_transfers", limit=1, sinks=[sink_pb2.Sink(webhook=hook)], **fields
    )


async def made(stub: Any, message: job_pb2.CreateExportRequest) -> str:
    return str((await stub.CreateExport(message)).job.job_id)


async def test_what_is_kept_under_the_made_key_outlives_its_rotation(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    async with Receiver(reply(503)).listen() as receiver:
        async with serve(options(tmp_path, sample_catalogue)) as server:
            await made(server.stub, request(receiver.url))
            await until(lambda: receiver.requests)
        assert (tmp_path / "data" / "secrets.key").is_file()
        seen = len(receiver.requests)
        receiver.answers = [reply(204)]
        async with serve(options(tmp_path, sample_catalogue, FIRST)):
            await until(lambda: len(receiver.requests) > seen, ENOUGH)
        assert receiver.requests[-1].header("x-pin") == PIN


async def test_no_key_is_made_where_one_is_set(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    async with serve(options(tmp_path, sample_catalogue, FIRST)):
        assert not (tmp_path / "data" / "secrets.key").exists()


async def test_a_request_is_known_again_while_keys_are_rotated(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    again = request("http://127.0.0.1:1/", request_id=str(uuid4()))
    other = request("http://127.0.0.1:1/", pin="1284", request_id=again.request_id)
    first = ""
    for keys in ((), (FIRST,), (SECOND, FIRST)):
        async with serve(options(tmp_path, sample_catalogue, *keys)) as server:
            first = first or await made(server.stub, again)
            assert await made(server.stub, again) == first
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await server.stub.CreateExport(other)
            assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
            await server.stub.CancelJob(pb.CancelJobRequest(job_id=first))


def fingerprints(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "data" / "ledger.db") as ledger:
        rows = ledger.execute("SELECT fingerprint FROM jobs").fetchall()
    ledger.close()
    return [text for (text,) in rows]


async def test_a_job_of_before_fingerprints_had_keys_is_known_again(
    tmp_path: Path, sample_catalogue: Path
) -> None:
    again = request("http://127.0.0.1:1/", request_id=str(uuid4()))
    async with serve(options(tmp_path, sample_catalogue)) as server:
        job_id = await made(server.stub, again)
    plain = hashlib.sha256(payload(again)).hexdigest()
    with sqlite3.connect(tmp_path / "data" / "ledger.db") as ledger:
        ledger.execute("UPDATE jobs SET fingerprint = ?", (plain,))
    ledger.close()
    async with serve(options(tmp_path, sample_catalogue)) as server:
        assert await made(server.stub, again) == job_id


@pytest.mark.parametrize("keys", [(), (FIRST,)], ids=["made", "set"])
async def test_a_short_secret_is_not_found_from_the_fingerprint(
    tmp_path: Path, sample_catalogue: Path, keys: tuple[str, ...]
) -> None:
    async with serve(options(tmp_path, sample_catalogue, *keys)) as server:
        await made(server.stub, request("http://127.0.0.1:1/"))
    (kept,) = fingerprints(tmp_path)

    def found(fingerprint: str) -> list[str]:
        """As one does who knows all of the request but the secret."""
        return [
            pin
            for pin in (f"{number:04}" for number in range(10_000))
            for each in [payload(request("http://127.0.0.1:1/", pin))]
            if Fingerprints([]).of(each)[0] == fingerprint
        ]

    assert not found(kept)
    # A control: the plain hash tells it.
    control = request("http://127.0.0.1:1/")
    assert found(hashlib.sha256(payload(control)).hexdigest()) == [PIN]


def test_fingerprints_are_of_the_key_and_of_nothing_else() -> None:
    one, two = Fingerprints([b"a" * 32]), Fingerprints([b"b" * 32, b"a" * 32])
    assert one.of(b"x")[0] != two.of(b"x")[0]
    assert one.of(b"x")[0] == two.of(b"x")[1] != one.of(b"y")[0]
    assert one.of(b"x")[-1] == Fingerprints([]).of(b"x")[0]
