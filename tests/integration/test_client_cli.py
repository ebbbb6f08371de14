"""The command line as a user runs it: a process, its output and its exit code."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from exportd import (
    Client,
    Retry,
    Sink,
    to_database,
    to_file,
    to_plugin,
    to_s3,
    to_webhook,
)
from exportd._sinks import plugin
from exportd.cli import session
from exportd.cli.commands import cli, exit_code, run
from exportd.errors import ExportdError, OutputExpired
from exportd.v1 import dataset_pb2, job_pb2, sink_pb2
from tests.support.scripted_server import (
    JOB,
    Script,
    ScriptedPart,
    ScriptedServer,
    scripted,
)
from tests.support.waits import ENOUGH

DATA = random.Random(7).randbytes(700_001)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted(parts=[ScriptedPart(DATA)]) as running:
        yield running


class Result:
    """What a run of the command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def exportd(
    server: ScriptedServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Any:
    monkeypatch.setenv("EXPORTD_SERVER", server.address)
    monkeypatch.delenv("EXPORTD_WEBHOOK_SECRET", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Result:
        capfd.readouterr()
        code = run(arguments)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def start(server: ScriptedServer, *arguments: str, **options: Any) -> Any:
    environment = {**os.environ, "EXPORTD_SERVER": server.address}
    return subprocess.Popen(
        [sys.executable, "-m", "exportd.cli", *arguments], env=environment, **options
    )


def test_the_installed_command_runs_and_documents_its_exit_codes() -> None:
    command = Path(sys.executable).with_name("exportd")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130):
        assert re.search(rf"^ +{code}  \w", done.stdout, re.MULTILINE), code


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_help_and_json(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output


def test_datasets_are_listed_and_described(exportd: Any) -> None:
    listed = exportd("datasets")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == [
        "NAME",
        "positions",
        "secrets",
        "token_transfers",
    ]
    assert "(not exportable)" in listed.out
    assert "decimal128(38, 18)" in exportd("datasets", "positions").out
    assert [d["name"] for d in exportd("datasets", "--json").lines()][2] == (
        "token_transfers"
    )
    described = exportd("datasets", "positions", "--json").json()
    assert described["columns"][0]["kind"] == "COLUMN_KIND_INTEGER"
    assert described["target_column"] == "sender"  # the contract's field names


def test_create_sends_what_was_typed_and_prints_the_id(
    exportd: Any, server: ScriptedServer
) -> None:
    result = exportd(
        *("create", "token_transfers", "--format", "csv", "--target", "0xabc"),
        *("--network", "base", "--since", "2026-01-01", "--until", "2026-02-01T00:00Z"),
        *("--columns", "block, amount", "--where", "amount>=1.5"),
        *("-w", "block in (1,2)", "--limit", "10", "--compression", "gzip"),
        *("--delimiter", ";", "--null-marker", "NULL", "--spreadsheet-safe"),
        *("--part-rows", "5", "--part-bytes", "70000", "--ttl", "24h"),
        *("--priority", "-5", "--label", "team=data", "--label", "a=b=c"),
        *("--request-id", "6f1f1c1e-0000-4000-8000-000000000001"),
    )
    assert (result.code, result.out) == (0, JOB + "\n")
    sent = next(r for r in server.requests if isinstance(r, job_pb2.CreateExportRequest))
    assert (sent.target_id, sent.network, sent.limit) == ("0xabc", "base", 10)
    assert list(sent.columns) == ["block", "amount"]
    assert sent.time_range.start_time.ToJsonString() == "2026-01-01T00:00:00Z"
    assert sent.time_range.end_time.ToJsonString() == "2026-02-01T00:00:00Z"
    assert sent.filters[0].operator == dataset_pb2.FILTER_OPERATOR_GREATER_OR_EQUAL
    assert sent.filters[0].values[0].string_value == "1.5"
    assert [v.int_value for v in sent.filters[1].values] == [1, 2]
    assert sent.compression == job_pb2.COMPRESSION_GZIP
    assert sent.csv_options.delimiter == ";"
    assert (sent.max_part_rows, sent.max_part_bytes) == (5, 70_000)
    assert (sent.ttl.seconds, sent.priority) == (86_400, -5)
    assert dict(sent.labels) == {"team": "data", "a": "b=c"}
    assert sent.request_id == "6f1f1c1e-0000-4000-8000-000000000001"


def sent_sinks(server: ScriptedServer) -> list[sink_pb2.Sink]:
    """The sinks of the last export that was asked for."""
    created = [r for r in server.requests if isinstance(r, job_pb2.CreateExportRequest)]
    return list(created[-1].sinks)


@pytest.mark.parametrize(
    ("typed", "sink"),
    [
        (("file:reports",), to_file("reports")),
        (("file:reports/daily/flights/",), to_file("reports", "daily/flights")),
        (("s3:lake/a/b",), to_s3("lake", "a/b")),
        (("webhook:https://h/in?k=v",), to_webhook("https://h/in?k=v")),
        (("webhook:hook",), to_webhook(connection="hook")),
        (
            ("webhook:hook", "--webhook-mode", "push-parts"),
            to_webhook(connection="hook", mode="PUSH_PARTS"),
        ),
        (("db:warehouse/sales.orders",), to_database("warehouse", "sales.orders")),
        (
            (
                *("db:warehouse/a/b", "--db-mode", "merge", "--key", "id", "--key", "day"),
                "--db-create-table",
            ),
            to_database(
                "warehouse",
                "a/b",
                mode="MERGE",
                key_columns=["id", "day"],
                create_table=True,
            ),
        ),
        (("plugin:kafka",), to_plugin("kafka")),
        (
            ('plugin:kafka:main?{"topic": "a?b", "n": [1, null], "name": "x"}',),
            plugin("kafka", "main", {"topic": "a?b", "n": [1, None], "name": "x"}),
        ),
    ],
)
def test_a_sink_that_is_typed_is_the_one_that_is_sent(
    exportd: Any, server: ScriptedServer, typed: tuple[str, ...], sink: Sink
) -> None:
    assert exportd("create", "t", "-f", "csv", "--to", *typed).code == 0
    assert sent_sinks(server) == [sink.proto]


def test_several_sinks_share_the_options_of_their_kind(
    exportd: Any, server: ScriptedServer
) -> None:
    result = exportd(
        *("create", "t", "-f", "csv", "--to", "db:a/t", "--to", "file:reports"),
        *("--to", "db:b/t", "--db-mode", "replace", "--drop-after-delivery"),
    )
    assert result.code == 0
    assert [sink.WhichOneof("kind") for sink in sent_sinks(server)] == [
        "database",
        "local_file",
        "database",
    ]
    assert sent_sinks(server)[2] == to_database("b", "t", mode="REPLACE").proto
    created = [r for r in server.requests if isinstance(r, job_pb2.CreateExportRequest)]
    assert created[-1].drop_after_delivery


def test_the_key_of_a_webhook_comes_from_the_environment_or_before_that_from_a_file(
    exportd: Any,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    create = ("create", "t", "-f", "csv", "--to", "webhook:https://h/in")
    monkeypatch.setenv("EXPORTD_WEBHOOK_SECRET", "whsec_environment")
    assert exportd(*create).code == 0
    assert sent_sinks(server)[0].webhook.secret == "whsec_environment"
    file = tmp_path / "key"
    file.write_text("whsec_file\n")
    assert exportd(*create, "--webhook-secret-file", str(file)).code == 0
    assert sent_sinks(server)[0].webhook.secret == "whsec_file"
    for nothing in (b" \n", b"\xff\xfe"):
        file.write_bytes(nothing)
        refused = exportd(*create, "--webhook-secret-file", str(file))
        assert refused.code == 2
        assert "holds no text; write whsec_... into it" in refused.err
    # One that is there for other commands is no sink's business.
    assert exportd("create", "t", "-f", "csv", "--to", "file:reports").code == 0


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            ("--to", "reports"),
            "--to: cannot read 'reports'; write file:CONNECTION[/PATH], ",
        ),
        (("--to", "fil:reports"), "--to: cannot read 'fil:reports'; write file:CONN"),
        (("--to", "DB:a/b"), "--to: cannot read 'DB:a/b'; write db:CONNECTION/TABLE"),
        (("--to", "file:"), "--to: cannot read 'file:'; write file:CONNECTION[/PATH]"),
        (("--to", "db:warehouse"), "'db:warehouse'; write db:CONNECTION/TABLE"),
        (("--to", "webhook:h.example/in"), "write webhook:https://... or webhook:CONN"),
        (("--to", "https://u:canary@h/x?canary"), "cannot read 'https://...@h/x?...'"),
        (("--to", 'plugin:kafka?{"a": canary'), "'plugin:kafka?...': what follows ? is no"),
        (("--to", "plugin:kafka?[1]"), "'plugin:kafka?...': write {...} after ?"),
        (("--to", 'plugin:k?{"a": 9007199254740993}'), "too large to stay exact"),
        (("--to", 'plugin:k?{"a": {"b": NaN}}'), "config.a.b: nan is no number"),
        (("--to", "plugin:k?" + "[" * 100_000), "nested too deep"),
        (("--webhook-mode", "notify"), "--webhook-mode: goes with --to webhook:https://"),
        (("--db-mode", "merge", "--to", "file:a"), "--db-mode: goes with --to db:CONN"),
        (("--key", "id"), "--key: goes with --to db:CONNECTION/TABLE"),
        (("--db-create-table",), "--db-create-table: goes with --to db:CONN"),
        (("--webhook-secret-file", __file__), "--webhook-secret-file: goes with --to web"),
    ],
)
def test_a_sink_that_cannot_be_read_names_its_option_and_the_mend(
    exportd: Any, server: ScriptedServer, typed: tuple[str, ...], says: str
) -> None:
    refused = exportd("create", "t", "-f", "csv", *typed)
    assert (refused.code, refused.out) == (2, "")
    assert says in refused.err
    assert "canary" not in refused.err
    assert not server.created


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("redrive",), "say which: a JOB, --delivery ID or --queue QUEUE"),
        (("redrive", "--queue", "q", "--sink", "a"), "--sink is a name inside a job"),
        (("deliveries", "--sink", "a"), "--sink is a name inside a job: give --job, too"),
        (("deliveries", "--state", "done"), "dead-lettered"),
    ],
)
def test_deliveries_that_are_not_named_well_are_a_wrong_usage(
    exportd: Any, server: ScriptedServer, arguments: tuple[str, ...], says: str
) -> None:
    refused = exportd(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert says in refused.err
    assert not server.requests


def test_create_download_waits_downloads_and_prints_the_path(
    exportd: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.watch = ["PENDING", "RUNNING", "SUCCEEDED"]
    result = exportd("create", "t", "-f", "csv", "--download", "out.csv")
    assert (result.code, result.out) == (0, "out.csv\n")
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert "3 before it" in result.err
    assert "verified by sha256" in result.err


def test_validate_only_tells_the_estimate(exportd: Any, server: ScriptedServer) -> None:
    result = exportd("create", "t", "-f", "csv", "--validate-only")
    assert result.out == "the request is valid; about 1,234 rows\n"
    assert not server.created


def test_get_and_list_speak_to_people_and_to_programs(
    exportd: Any, server: ScriptedServer
) -> None:
    people = exportd("get", JOB)
    assert re.search(r"^state +SUCCEEDED$", people.out, re.MULTILINE)
    assert re.search(r"^labels +team=data$", people.out, re.MULTILINE)
    job = exportd("get", JOB, "--json").json()
    assert job["state"] == "JOB_STATE_SUCCEEDED"
    assert job["manifest"]["bytes"] == str(len(DATA))
    assert job["manifest"]["parts"][0]["prefix_bytes"] == "0"
    server.script.jobs = 5
    assert len(exportd("list", "--json").lines()) == 5
    assert len(exportd("list", "-n", "3").out.splitlines()) == 4
    failed = exportd("list", "--state", "failed", "--since", "2026-01-01")
    assert failed.code == 0
    assert server.requests[-1].states


def test_a_failed_job_prints_its_error_as_json_too(
    exportd: Any, server: ScriptedServer
) -> None:
    server.script.state = "FAILED"
    error = exportd("get", JOB, "--json").json()["error"]
    assert error["details"][0]["reason"] == "EXPORT_TOO_LARGE"
    assert "the export passed max_rows = 10" in exportd("get", JOB).out


def test_watch_prints_each_message_as_json(exportd: Any, server: ScriptedServer) -> None:
    server.script.watch = ["PENDING", "RUNNING", "SUCCEEDED"]
    result = exportd("watch", JOB, "--json")
    assert [j["state"] for j in result.lines()] == [
        "JOB_STATE_PENDING",
        "JOB_STATE_RUNNING",
        "JOB_STATE_SUCCEEDED",
    ]
    assert (result.code, result.err) == (0, "")


def test_cancel_and_delete(exportd: Any, server: ScriptedServer) -> None:
    server.script.state = "RUNNING"
    assert exportd("cancel", JOB).out == f"cancelled: job {JOB} is cancelled\n"
    again = exportd("cancel", JOB, "--json").json()
    assert again["outcome"] == "CANCEL_OUTCOME_ALREADY_FINISHED"
    assert exportd("delete", JOB, "--json").json() == {"job_id": JOB, "deleted": True}
    assert exportd("get", JOB).code == 3


def test_download_takes_the_servers_name_refuses_to_replace_and_obeys_force(
    exportd: Any, tmp_path: Path
) -> None:
    result = exportd("download", JOB)
    assert (result.code, result.out) == (0, "token_transfers-1.csv\n")
    assert (tmp_path / "token_transfers-1.csv").read_bytes() == DATA
    refused = exportd("download", JOB)
    assert refused.code == 7
    assert refused.err.startswith("error: token_transfers-1.csv exists; ")
    forced = exportd("download", JOB, "--force", "--json").json()
    assert forced["bytes"] == str(len(DATA))
    assert forced["verified_by"] == "sha256"


def test_a_path_that_ends_in_a_slash_is_a_directory_to_make(
    exportd: Any, tmp_path: Path
) -> None:
    assert exportd("download", JOB, "new/dir/").out == "new/dir/token_transfers-1.csv\n"
    assert (tmp_path / "new/dir/token_transfers-1.csv").read_bytes() == DATA


def test_download_of_parts_that_do_not_join_makes_a_directory_named_after_the_output(
    exportd: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script = Script(
        parts=[ScriptedPart(b"1"), ScriptedPart(b"22")],
        joinable=False,
        file_name="t-1.parquet",
        format=dataset_pb2.FORMAT_PARQUET,
    )
    assert exportd("download", JOB).out == "t-1\n"
    assert (tmp_path / "t-1" / "part-1.parquet").read_bytes() == b"22"
    assert exportd("download", JOB, "one.parquet", "--part", "0").code == 0
    assert (tmp_path / "one.parquet").read_bytes() == b"1"


def test_following_from_the_command_line(
    exportd: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.state = "RUNNING"
    assert exportd("download", JOB, "out.csv", "--follow").code == 0
    assert (tmp_path / "out.csv").read_bytes() == DATA


@pytest.mark.parametrize(
    ("code", "reason", "exit_status"),
    [
        ("INVALID_ARGUMENT", "INVALID_REQUEST", 2),
        ("NOT_FOUND", "DATASET_NOT_FOUND", 3),
        ("UNAVAILABLE", "DRAINING", 5),
        ("DATA_LOSS", "CHECKSUM_MISMATCH", 6),
        ("FAILED_PRECONDITION", "DATASET_NOT_EXPORTABLE", 7),
        ("ALREADY_EXISTS", "REQUEST_ID_CONFLICT", 7),
        ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", 8),
        ("INTERNAL", "INTERNAL", 1),
    ],
)
def test_a_servers_refusal_is_one_line_and_an_exit_code(
    exportd: Any, server: ScriptedServer, code: str, reason: str, exit_status: int
) -> None:
    server.script.create_error = (grpc.StatusCode[code], reason, "what,\nand the mend")
    result = exportd("create", "t", "-f", "csv")
    assert (result.code, result.out) == (exit_status, "")
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("error: what, and the mend")
    assert f"[{reason}]" in result.err


@pytest.mark.parametrize(
    ("arguments", "exit_status", "says"),
    [
        (("create", "t"), 2, "Missing option"),
        (("frobnicate",), 2, "No such command"),
        (("create", "t", "-f", "csv", "--since", "2026-01-01T00:00"), 2, "add Z for UTC"),
        (("create", "t", "-f", "csv", "--where", "nope=1"), 2, "no column 'nope'"),
        (("create", "t", "-f", "parquet", "--compression", "gzip"), 2, "parquet takes"),
        (("create", "t", "-f", "csv", "--label", "x"), 2, "write key=value"),
        (("create", "t", "-f", "csv", "--limit", "9" * 20), 2, "no whole number"),
        (("create", "t", "-f", "csv", "-w", "sender <> x"), 2, "write !="),
        (("--server", "", "datasets"), 2, "is empty; give the server's host:port"),
        (("create", "nothing", "-f", "csv", "-w", "a=1"), 3, "DATASET_NOT_FOUND"),
        (("get", "no-such-job"), 3, "JOB_NOT_FOUND"),
        (("download", JOB, "no/such/dir/x"), 1, "check that its directory is there"),
    ],
)
def test_mistakes_are_told_on_stderr_with_their_exit_code(
    exportd: Any, arguments: tuple[str, ...], exit_status: int, says: str
) -> None:
    result = exportd(*arguments)
    assert (result.code, result.out) == (exit_status, "")
    assert says in result.err


def test_jobs_that_end_badly_or_not_yet_have_exit_codes(
    exportd: Any, server: ScriptedServer
) -> None:
    server.script.state = "RUNNING"
    assert exportd("download", JOB).code == 7
    assert exportd("delete", JOB).err.endswith("try again in 2 s\n")
    server.script.watch = ["RUNNING", "FAILED"]
    failed = exportd("watch", JOB)
    assert failed.code == 4
    assert "EXPORT_TOO_LARGE" in failed.err
    server.script.state = "CANCELLED"
    assert exportd("download", JOB).code == 4
    server.script.state = "SUCCEEDED"
    server.script.corrupt = {5: 99}
    assert exportd("download", JOB).code == 6
    assert exit_code(OutputExpired("gone")) == 3
    assert exit_code(ExportdError("whatever")) == 1


def test_a_server_that_is_down_is_code_5(exportd: Any, server: ScriptedServer) -> None:
    server.stop()
    result = exportd("get", JOB)
    assert result.code == 5
    assert result.err.startswith(f"error: cannot reach exportd at {server.address}")
    assert len(result.err.splitlines()) == 1


def test_a_download_that_gives_up_says_how_to_go_on(
    exportd: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def impatient(address: str, **options: Any) -> Client:
        return Client(address, stream_retry=Retry(attempts=2, initial=0.01), **options)

    monkeypatch.setattr(session, "Client", impatient)
    server.script.cuts = [4, 0, 0]
    result = exportd("download", JOB, "a b.csv", "--force")
    assert result.code == 5
    again = f"exportd download {JOB} 'a b.csv' --force"
    assert f"what is there is kept: '{again}' goes on where this ended" in result.err
    assert len(result.err.splitlines()) <= 2  # progress, and the error
    server.script.cuts = []
    resumed = exportd(*shlex.split(again)[1:], "--json").json()["resumed_bytes"]
    assert resumed == str(4 * server.script.chunk)
    assert (tmp_path / "a b.csv").read_bytes() == DATA


def test_a_target_that_cannot_be_written_is_refused_before_a_job_is_made(
    exportd: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    missing = exportd("create", "t", "-f", "csv", "--download", "nodir/x.csv")
    assert (missing.code, missing.out) == (1, "")
    assert "nodir is no directory; make it first" in missing.err
    (tmp_path / "there.csv").write_text("mine")
    there = exportd("create", "t", "-f", "csv", "--download", "there.csv")
    assert there.code == 7
    assert not server.created
    forced = exportd("create", "t", "-f", "csv", "--download", "there.csv", "--force")
    assert forced.code == 0
    assert exportd("create", "t", "-f", "csv", "--download", "new/").code == 0


def test_following_parts_that_do_not_join_says_what_to_do_instead(
    exportd: Any, server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.state = "RUNNING"
    server.script.download_error = (
        grpc.StatusCode.FAILED_PRECONDITION,
        "PARTS_NOT_JOINABLE",
        "the parts of this format do not join; download each by part_index",
    )
    result = exportd("download", JOB, "out.parquet", "--follow")
    assert result.code == 7
    assert "download it without --follow once it has ended" in result.err
    assert not list(tmp_path.iterdir())


def test_quiet_leaves_stderr_to_errors(exportd: Any, server: ScriptedServer) -> None:
    created = exportd("-q", "create", "t", "-f", "csv", "--download", "out.csv")
    assert (created.out, created.err) == ("out.csv\n", "")
    assert exportd("-q", "create", "t", "-f", "csv", "--wait").err == ""
    server.script.state = "RUNNING"
    assert exportd("-q", "download", JOB, "followed.csv", "--follow").err == ""
    server.script.state = "SUCCEEDED"
    assert exportd("-q", "delete", JOB).err == ""
    assert exportd("-q", "get", JOB).err.startswith("error: ")


def test_text_from_the_server_cannot_steer_the_terminal(
    exportd: Any, server: ScriptedServer
) -> None:
    server.script.file_name = "x\x1b]0;owned\x07.csv"
    assert "\x1b" not in exportd("get", JOB).out


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_ctrl_c_in_a_download_says_how_to_go_on_and_it_does(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.pause = threading.Semaphore(4)
    process = start(
        server, "download", JOB, "out.csv", cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: list(tmp_path.glob("*.json")), "a record of the download")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=ENOUGH)
    assert process.returncode == 130
    again = f"exportd download {JOB} out.csv"
    assert f"interrupted; what is there is kept: '{again}' goes on" in err
    assert "Traceback" not in err
    server.script.pause = None
    done = start(server, *again.split()[1:], "--json", cwd=tmp_path, stdout=subprocess.PIPE)
    out, _ = done.communicate(timeout=ENOUGH)
    assert json.loads(out)["resumed_bytes"] == str(4 * server.script.chunk)
    assert (tmp_path / "out.csv").read_bytes() == DATA


def test_ctrl_c_in_a_wait_says_that_the_job_goes_on(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.watch = ["RUNNING"]
    server.script.watch_stays = True
    process = start(server, "watch", JOB, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: server.calls["WatchJob"], "the watch")
    assert process.stderr.readline().startswith("token_transfers: running")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=ENOUGH)
    assert process.returncode == 130
    assert f"the job goes on: 'exportd watch {JOB}' follows it" in err


def on_terminal(
    server: ScriptedServer, *arguments: str, columns: int = 120
) -> tuple[int, str]:
    """Run with stderr on a pseudo-terminal; answers with the code and what it showed."""
    mine, theirs = pty.openpty()
    environment = {**os.environ, "EXPORTD_SERVER": server.address, "TERM": "xterm"}
    environment["COLUMNS"] = str(columns)
    process = subprocess.Popen(
        [sys.executable, "-m", "exportd.cli", *arguments],
        env=environment,
        stderr=theirs,
        stdout=subprocess.DEVNULL,
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + ENOUGH
    while time.monotonic() < deadline:
        if select.select([mine], [], [], 0.1)[0]:
            try:
                block = os.read(mine, 65_536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not block:
                break
            shown += block
    os.close(mine)
    return process.wait(ENOUGH), shown.decode()


def test_a_terminal_gets_a_live_bar(server: ScriptedServer, tmp_path: Path) -> None:
    server.script.watch = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    code, shown = on_terminal(
        server, "create", "t", "-f", "csv", "--download", str(tmp_path / "out.csv")
    )
    assert code == 0
    assert "\x1b[" in shown  # drawn, not only printed
    assert "━" in shown
    assert "683.6 KiB of 683.6 KiB" in shown
    assert (tmp_path / "out.csv").read_bytes() == DATA


@pytest.mark.parametrize("columns", [80, 100])
def test_the_bar_stays_on_one_line_of_a_narrow_terminal(
    server: ScriptedServer, tmp_path: Path, columns: int
) -> None:
    server.script.file_name = "token_transfers-" + "long-" * 25 + ".csv"
    code, shown = on_terminal(server, "download", JOB, str(tmp_path), columns=columns)
    assert code == 0
    assert "683.6 KiB of 683.6 KiB" in shown  # the name gave way
    assert "token_trans" in shown
    assert "…" in shown
    assert "\x1b[1A" not in shown  # up a line, as after two


def test_quiet_on_a_terminal_shows_nothing(server: ScriptedServer, tmp_path: Path) -> None:
    code, shown = on_terminal(server, "-q", "download", JOB, str(tmp_path / "out.csv"))
    assert (code, shown) == (0, "")


def test_a_pipe_that_closes_early_is_no_traceback(server: ScriptedServer) -> None:
    server.script.jobs = 2000
    process = start(
        server,
        *("list", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=ENOUGH)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
