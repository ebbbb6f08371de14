"""The examples of the API reference are what a real server answers on the sample data."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from exportd.v1 import export_service_pb2, job_pb2
from exportd_server.sources.catalogue import Catalogue, Dataset, load_catalogue
from tests.support import rpc
from tests.support.gate import GateSource
from tests.support.receiver import Receiver, reply
from tests.support.server import Server, serve, settings
from tests.support.waits import ENOUGH
from tools import api_reference
from tools.api_reference import ERROR_EXAMPLE, EXAMPLES, TARGET, Contract, Fault, Page, page

METHODS = list(
    export_service_pb2.DESCRIPTOR.services_by_name["ExportService"].methods_by_name
)

VARYING = {
    *("createTime", "startTime", "finishTime", "expireTime", "disabledTime"),
    *("failingSince", "time", "duration", "recordId", "deliveryId", "revision"),
}
"""Fields that are another at each run; of the same kind, all the same."""

KINDS = {
    "a UUID": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "a time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z",
    "a duration": r"\d+(\.\d+)?s",
    "a number": r"\d+",
}


def written(name: str) -> dict[str, Any]:
    found = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


class Story:
    """Makes the calls of the examples, in an order in which each has what it needs."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.names: dict[str, str] = {}
        """What the examples write, and what it is here."""
        self.answers: dict[str, Any] = {}
        self.streaming = asyncio.Event()
        """The first message of a stream has come."""

    def here(self, message: Any) -> Any:
        """A message of an example, as this server needs it."""
        text = json.dumps(message)
        for name, actual in self.names.items():
            text = text.replace(name, actual)
        return json.loads(text)

    def as_written(self, message: Any) -> Any:
        """A message of this server, as an example writes it."""
        text = json.dumps(message)
        for name, actual in self.names.items():
            text = text.replace(actual, name)
        return json.loads(text)

    def request(self, method: str, fields: Any) -> Any:
        kind: type[Message] = (
            job_pb2.CreateExportRequest
            if method == "CreateExport"
            else getattr(export_service_pb2, f"{method}Request")
        )
        return json_format.ParseDict(self.here(fields), kind())

    async def tell(self, method: str) -> Any:
        """Make the call of an example, and keep its answer."""
        call = getattr(self.server.stub, method)(
            self.request(method, written(method)["request"])
        )
        if hasattr(call, "__aiter__"):
            answer: Any = []
            async for message in call:
                answer.append(fields(message))
                self.streaming.set()
        else:
            answer = fields(await call)
        self.answers[method] = answer
        return answer

    async def run(self, gate: GateSource, receiver: Receiver) -> None:
        stub = self.server.stub
        await self.tell("ListDatasets")
        await self.tell("GetDataset")

        # While the one worker is held, what is created stays pending.
        await rpc.create(stub, "held")
        await eventually(lambda: done(gate.opened))
        created = await self.tell("CreateExport")
        job = written("CreateExport")["response"]["job"]["jobId"]
        self.names[job] = created["job"]["jobId"]

        unwanted = await rpc.create(stub, "hl_fills")
        self.names[written("CancelJob")["request"]["jobId"]] = unwanted.job_id
        await self.tell("CancelJob")

        watching = asyncio.create_task(self.tell("WatchJob"))
        async with asyncio.timeout(ENOUGH):
            await self.streaming.wait()
        gate.open_wide()
        await watching
        await self.delivered(self.names[job])
        for method in ("GetJob", "ListJobs", "StreamDownload", "GetDownloadUrls"):
            await self.tell(method)

        # An endpoint that is gone, and comes back.
        hook = {"webhook": {"connection": "hooks", "url": receiver.url}}
        asked = {"dataset": "hl_fills", "format": "FORMAT_CSV", "limit": 3, "sinks": [hook]}
        gone = await stub.CreateExport(self.request("CreateExport", asked))
        self.names[written("ListDeliveries")["request"]["jobId"]] = gone.job.job_id
        await self.delivered(gone.job.job_id)
        assert len(receiver.requests) == 1
        await self.tell("ListDeliveries")
        queues = await self.tell("ListSinkQueues")
        queue = written("EnableSinkQueue")["request"]["queue"]
        self.names[queue] = queues["queues"][-1]["queue"]
        await self.tell("EnableSinkQueue")
        receiver.answers = [reply()]
        await self.tell("RedriveDeliveries")
        await self.delivered(gone.job.job_id)
        assert len(receiver.requests) == 2

        expected = len(written("ListAuditRecords")["response"]["records"])

        async def recorded() -> bool:
            answer = await self.tell("ListAuditRecords")
            return len(answer.get("records", [])) == expected

        await eventually(recorded)
        await self.tell("DeleteJob")

    async def delivered(self, job_id: str) -> None:
        watch = export_service_pb2.WatchJobRequest(job_id=job_id, until_delivered=True)
        async for _ in self.server.stub.WatchJob(watch):
            pass


def fields(message: Message) -> dict[str, Any]:
    """A message as grpcurl prints it."""
    return json_format.MessageToDict(message)


async def done(value: object) -> bool:
    return bool(value)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(ENOUGH):
        while not await condition():
            await asyncio.sleep(0.01)


def with_gate(path: Path, gate: GateSource) -> Catalogue:
    """The samples, and a dataset `held` that the test holds."""
    samples = load_catalogue(path)
    datasets = {name: samples.get(name) for name in samples.names()}
    held = Dataset(name="held", columns=gate.columns(), source=gate)
    return Catalogue(
        {**{name: found for name, found in datasets.items() if found}, "held": held}
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, sample_catalogue: Path) -> Story:
    directory = tmp_path_factory.mktemp("api")
    reports = directory / "reports"
    reports.mkdir()
    sinks = directory / "sinks.toml"
    sinks.write_text(
        f'[connections.reports]\ntype = "local_file"\nroot = "{reports}"\n'
        '[connections.hooks]\ntype = "webhook"\nallow_http = true\n'
        f'allow_private = ["127.0.0.0/8"]\nsigning_keys = ["whsec_{"A" * 32}"]\n'
    )
    options = settings(
        directory / "data",
        sinks=sinks,
        worker={"concurrency": 1},
        http={"listen": "127.0.0.1:0", "public_url": "https://exports.example.com"},
    )
    gate = GateSource()

    async def play() -> Story:
        async with (
            Receiver(reply(410)).listen() as receiver,
            serve(options, with_gate(sample_catalogue, gate)) as server,
        ):
            story = Story(server)
            await story.run(gate, receiver)
            return story

    return asyncio.run(play())


def differences(expected: Any, actual: Any, path: str = "") -> Iterator[str]:
    """Where an answer is not as it is written.

    In what is written, `…` stands for one or more of the like in a list, and for one or
    more fields in an object; `<word>` in a text for any text, and a varying field for any
    other of its kind.
    """
    if isinstance(expected, dict) and isinstance(actual, dict):
        yield from _fields(expected, actual, path)
    elif isinstance(expected, list) and isinstance(actual, list):
        yield from _items(expected, actual, path)
    elif isinstance(expected, str) and isinstance(actual, str):
        if not like(expected, actual, path.rpartition(".")[2]):
            yield f"{path}: {actual!r} in the answer, {expected!r} written"
    elif expected != actual or isinstance(expected, bool) is not isinstance(actual, bool):
        yield f"{path}: {actual!r} in the answer, {expected!r} written"


def _fields(expected: dict[str, Any], actual: dict[str, Any], path: str) -> Iterator[str]:
    said = {key: value for key, value in expected.items() if key != "…"}
    for key, value in said.items():
        if key in actual:
            yield from differences(value, actual[key], f"{path}.{key}")
        else:
            yield f"{path}.{key}: not in the answer"
    more = sorted(actual.keys() - said.keys())
    if "…" not in expected:
        yield from (f"{path}.{key}: not written" for key in more)
    elif not more:
        yield f"{path}: … stands for nothing"


def _items(expected: list[Any], actual: list[Any], path: str) -> Iterator[str]:
    if "…" in expected:
        before = expected.index("…")
        middle = len(actual) - len(expected) + 1
        if middle < 1:
            yield f"{path}: … stands for nothing"
            return
        expected = expected[:before] + expected[before + 1 :]
        actual = actual[:before] + actual[before + middle :]
    if len(expected) != len(actual):
        yield f"{path}: {len(actual)} in the answer, {len(expected)} written"
    for index, (one, other) in enumerate(zip(expected, actual, strict=False)):
        yield from differences(one, other, f"{path}[{index}]")


def like(expected: str, actual: str, name: str) -> bool:
    if name in VARYING:
        kind = next(kind for kind in KINDS.values() if re.fullmatch(kind, expected))
        return re.fullmatch(kind, actual) is not None
    pieces = map(re.escape, re.split(r"<\w+>", expected))
    return re.fullmatch(".+?".join(pieces), actual) is not None


@pytest.mark.parametrize("method", METHODS)
def test_an_example_is_what_a_server_answers(story: Story, method: str) -> None:
    answer = story.as_written(story.answers[method])
    assert not list(differences(written(method)["response"], answer))


def test_the_example_of_an_error_is_what_a_server_answers(
    sample_catalogue: Path, tmp_path: Path
) -> None:
    example = json.loads(ERROR_EXAMPLE.read_text(encoding="utf-8"))

    async def refused() -> dict[str, Any]:
        async with serve(settings(tmp_path), load_catalogue(sample_catalogue)) as server:
            request = Story(server).request(example["method"], example["request"])
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await getattr(server.stub, example["method"])(request)
            status = rpc_status.from_call(error.value)
            assert status is not None
            return fields(status)

    # What details hold is known by name once their messages are imported.
    assert error_details_pb2.BadRequest.DESCRIPTOR.full_name == "google.rpc.BadRequest"
    assert asyncio.run(refused()) == example["status"]


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ({"a": "1"}, {}),
        ({}, {"a": "1"}),
        ({"a": "1"}, {"a": "2"}),
        ({"a": "1", "…": "…"}, {"a": "1"}),
        ({"a": {}}, {"a": []}),
        ({"a": True}, {"a": 1}),
        ({"a": ["x", "…"]}, {"a": ["x"]}),
        ({"a": ["x", "…", "y"]}, {"a": ["x", "z", "z"]}),
        ({"a": ["x"]}, {"a": ["x", "x"]}),
        ({"a": "b/<token>/c"}, {"a": "b//c"}),
        ({"createTime": "2026-01-02T03:04:05Z"}, {"createTime": "today"}),
    ],
)
def test_an_answer_that_is_not_as_it_is_written_is_told(expected: Any, actual: Any) -> None:
    assert list(differences(expected, actual))


# --- the page


def test_the_page_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == page()


def test_an_rpc_without_an_example_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = shutil.copytree(EXAMPLES, tmp_path / "docs/examples")
    monkeypatch.setattr(api_reference, "ROOT", tmp_path)
    monkeypatch.setattr(api_reference, "EXAMPLES", examples)
    monkeypatch.setattr(api_reference, "ERROR_EXAMPLE", examples / ERROR_EXAMPLE.name)
    assert page() == TARGET.read_text(encoding="utf-8")
    (examples / "GetJob.json").rename(examples / "GetJobs.json")
    with pytest.raises(Fault, match=r"GetJobs\.json is the example of no RPC"):
        page()
    (examples / "GetJobs.json").unlink()
    with pytest.raises(Fault, match="GetJob has no example"):
        page()


def test_a_reason_that_the_contract_and_the_server_see_differently_is_a_fault() -> None:
    contract = Contract.read()
    kind = contract.types["ErrorReason"]
    first, invalid, *others = kind.rows
    wrong = replace(invalid, comment="NOT_FOUND. At least one field is wrong.")
    contract.types[kind.name] = replace(kind, rows=(first, wrong, *others))
    with pytest.raises(Fault, match=r"INVALID_REQUEST.* its code, INVALID_ARGUMENT"):
        Page(contract)
    contract.types[kind.name] = replace(kind, rows=(first, *others))
    with pytest.raises(Fault, match="differ: INVALID_REQUEST"):
        Page(contract)


def test_a_reason_that_no_rpc_names_is_a_fault() -> None:
    contract = Contract.read()
    for service, (text, methods) in contract.services.items():
        silent = [
            replace(each, comment=each.comment.replace("`PARTS_NOT_JOINABLE`", ""))
            for each in methods
        ]
        contract.services[service] = (text, silent)
    with pytest.raises(Fault, match="PARTS_NOT_JOINABLE: no RPC names it"):
        Page(contract)


def test_every_type_of_the_contract_has_its_section_and_every_link_leads_to_one() -> None:
    text = page()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    assert set(Contract.read().types) - set(headings) == {"ErrorReason"}
    assert set(METHODS) <= set(headings)
    anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
