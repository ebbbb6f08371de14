"""Whatever is sent, the server answers with an error of the contract, and lives; whatever
a parser is given, it refuses as it declares. `make fuzz` does more of the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from exportd.v1 import export_service_pb2 as pb
from exportd_server.sinks.base import ExportColumn
from exportd_server.sinks.manifest import manifest_json
from tests.security import stalled
from tests.security.fuzz import (
    METHODS,
    MOST_SAMPLES,
    Known,
    Maker,
    Outcome,
    Report,
    fuzz,
    judge,
    judge_http,
    judge_log,
)
from tests.security.parsers import PARSERS, Parser, try_inputs
from tests.security.stalled import Figures
from tests.support.sinks import an_export, deliver_whole

REQUESTS = 1500


@pytest.mark.minutes
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


def _memory(of: Callable[[int], float], requests: int = 100_000) -> Report:
    """A run whose server had so many MiB after a number of requests, with noise."""
    chance = random.Random(1)
    samples = [requests * n // MOST_SAMPLES for n in range(MOST_SAMPLES + 1)]
    return Report(memory=[(n, of(n) + chance.uniform(-12, 12)) for n in samples])


@pytest.mark.parametrize(
    "of",
    [
        lambda n: 300,
        # Warming up, with a burst of exports in the end.
        lambda n: 250 + 120 * min(1, n / 15_000) + (90 if n > 95_000 else 0),
        lambda n: 300 + n / 10_000,
    ],
    ids=["even", "warming up", "a little"],
)
def test_memory_that_stays_is_no_leak(of: Callable[[int], float]) -> None:
    report = _memory(of)
    assert not report.leaks(), report.growth


@pytest.mark.parametrize("kilobytes", [1, 2, 10])
def test_memory_that_grows_with_the_requests_is_a_leak(kilobytes: int) -> None:
    report = _memory(lambda n: 300 + kilobytes * n / 1024)
    (wrong,) = report.leaks()
    assert "memory grew" in wrong
    assert abs(report.growth - kilobytes * 10_000 / 1024) < 2


def test_memory_that_was_not_seen_to_the_end_is_told() -> None:
    (wrong,) = Report(memory=[(0, 300.0), (500, 300.0)]).leaks()
    assert "samples" in wrong


def _figures(memory: float = 340, idle: float = 6, meanwhile: float = 6) -> Figures:
    return Figures(200, 200, 280, memory, 0.3, 1, idle, 1, meanwhile, 20)


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        (_figures(), ""),
        (_figures(memory=501), "501 MiB"),
        (_figures(meanwhile=101), "101 ms"),
        # A machine that is busy with other work.
        (_figures(idle=40, meanwhile=159), ""),
        (_figures(idle=40, meanwhile=161), "161 ms"),
    ],
)
def test_stalled_readers_are_judged(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figures: Figures,
    problem: str,
) -> None:
    async def measured(*asked: object) -> Figures:
        return figures

    monkeypatch.setattr(stalled, "measure", measured)
    assert stalled.main([]) == (1 if problem else 0)
    told = capsys.readouterr().out
    assert problem in told
    assert ("WRONG" in told) == bool(problem)
    assert ("machine is busy" in told) == (figures.idle_p99 > 25)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_what_is_right(name: str) -> None:
    assert PARSERS[name](PARSERS[name].seeds[0])


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_refuses_only_as_it_declares(name: str) -> None:
    parser = PARSERS[name]
    try_inputs(parser, 15 if parser.slow else 60, seed=1)


def test_what_a_parser_does_not_declare_is_found() -> None:
    def parse(data: bytes) -> None:
        if b"%" in data:
            raise KeyError(data)

    with pytest.raises(KeyError):
        try_inputs(Parser(parse, (ValueError,), (b"a",)), 200, seed=1)
    try_inputs(Parser(parse, (KeyError,), (b"a",)), 200, seed=1)


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
