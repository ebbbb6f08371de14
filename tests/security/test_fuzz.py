"""Whatever is sent, the server answers with an error of the contract, and lives; whatever
a parser is given, it refuses as it declares. `make fuzz` does more of the same."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exportd.v1 import export_service_pb2 as pb
from exportd_server.sinks.base import ExportColumn
from exportd_server.sinks.manifest import manifest_json
from tests.security.fuzz import (
    METHODS,
    Known,
    Maker,
    Outcome,
    fuzz,
    judge,
    judge_http,
    judge_log,
)
from tests.security.parsers import PARSERS
from tests.support.sinks import an_export, deliver_whole

REQUESTS = 2500
_TAILS = (
    b"[",
    b'"',
    b"9" * 30,
    b"\0",
    b"e9",
    b"-",
    b".",
    b"%",
    b"\xd9\xa1",
    b"\xed\xa0\x80",
)


async def test_a_server_answers_whatever_it_is_sent(tmp_path: Path) -> None:
    report = await fuzz(tmp_path, REQUESTS, seed=7)
    assert not report.problems, report.text()
    for method in METHODS:
        codes = report.codes(method.name)
        assert sum(codes.values()) > 15, (method.name, codes)
        assert codes.get("INVALID_ARGUMENT"), (method.name, codes)
    # Right requests are among them, or little would have been tried.
    for name in ("CreateExport", "GetJob", "ListJobs", "ListDeliveries", "GetDataset"):
        assert report.codes(name).get("OK"), report.text()
    assert report.codes("HTTP"), report.text()
    assert report.events["info: job succeeded"], report.text()


def _error(
    code: grpc.StatusCode, details: str, reason: str = "", domain: str = "exportd"
) -> grpc.aio.AioRpcError:
    trailers: tuple[tuple[str, bytes], ...] = ()
    if reason:
        status = status_pb2.Status(code=code.value[0], message=details)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
        trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=details
    )


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (_error(grpc.StatusCode.INTERNAL, "[INTERNAL] x", "INTERNAL"), "INTERNAL"),
        (_error(grpc.StatusCode.UNKNOWN, "x"), "UNKNOWN"),
        (_error(grpc.StatusCode.NOT_FOUND, "x"), "no details"),
        (_error(grpc.StatusCode.NOT_FOUND, "[OUCH] x", "OUCH"), "not of the contract"),
        (
            _error(grpc.StatusCode.NOT_FOUND, "[JOB_NOT_FOUND] x", "JOB_NOT_FOUND", "else"),
            "not of the contract",
        ),
        (_error(grpc.StatusCode.ABORTED, "[JOB_NOT_FOUND] x", "JOB_NOT_FOUND"), "ABORTED"),
        (_error(grpc.StatusCode.NOT_FOUND, "x", "JOB_NOT_FOUND"), "message"),
        (
            _error(
                grpc.StatusCode.NOT_FOUND, "[JOB_NOT_FOUND] " + 9000 * "x", "JOB_NOT_FOUND"
            ),
            "trailers",
        ),
        (_error(grpc.StatusCode.DEADLINE_EXCEEDED, "too late"), "no details"),
    ],
)
def test_the_judge_finds_what_is_wrong(error: grpc.aio.AioRpcError, problem: str) -> None:
    (wrong, *_) = judge(Outcome("GetJob", b"", error))
    assert problem in wrong


def test_the_judge_finds_nothing_wrong_with_a_good_error() -> None:
    error = _error(grpc.StatusCode.NOT_FOUND, "[JOB_NOT_FOUND] x", "JOB_NOT_FOUND")
    assert not judge(Outcome("GetJob", b"", error))
    late = _error(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
    assert not judge(Outcome("GetJob", b"", late, hurried=True))


def test_the_judge_reads_logs_and_http_answers() -> None:
    line = json.dumps({"level": "error", "event": "unforeseen error"})
    assert judge_log(line)[0]
    assert judge_log("Traceback")[0]
    assert not judge_log(json.dumps({"level": "info", "event": "serving"}))[0]
    assert judge_http(b"", b"HTTP/1.1 500 Oops\r\n\r\n")
    assert judge_http(b"", b"HTTP/1.1 404 No\r\n\r\n{}")
    assert not judge_http(b"", b"HTTP/1.1 200 OK\r\n\r\nanything")


def test_a_request_is_the_same_for_the_same_seed() -> None:
    def requests(seed: int) -> list[bytes]:
        known = Known(datasets=[pb.GetDatasetResponse().dataset])
        return [
            Maker(seed, number, known).wire(METHODS[number % len(METHODS)])
            for number in range(200)
            if METHODS[number % len(METHODS)].name != "CreateExport"
        ]

    assert requests(1) == requests(1) != requests(2)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_what_is_right(name: str) -> None:
    assert PARSERS[name](PARSERS[name].seeds[0])


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_refuses_only_as_it_declares(name: str) -> None:
    parser = PARSERS[name]
    text = st.text(max_size=60).map(lambda drawn: drawn.encode("utf-8", "surrogatepass"))

    @st.composite
    def spoilt(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(parser.seeds)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            put = draw(st.one_of(st.sampled_from(_TAILS), text, st.binary(max_size=6)))
            data[at : at + draw(st.integers(0, 5))] = put
        return bytes(data)

    @settings(
        max_examples=15 if parser.slow else 60,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(st.one_of(spoilt(), text, st.binary(max_size=60)))
    def check(data: bytes) -> None:
        parser(data)

    check()


@settings(derandomize=True, database=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_a_manifest_is_one_json_document_whatever_columns_are_called(
    names: list[str],
) -> None:
    columns = [ExportColumn(name, "STRING", "string", nullable=True) for name in names]
    data = manifest_json(deliver_whole(an_export(columns=columns)))
    told = json.loads(data.decode())
    assert [column["name"] for column in told["columns"]] == names
    assert data.endswith(b"}\n")
