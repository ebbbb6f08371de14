"""Downloads against a real gRPC server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from exportd import AsyncClient, Client, Download, DownloadProgress, Retry, _download
from exportd._connection import Channels
from exportd.errors import (
    DataLoss,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    LocalFileError,
    NotFinished,
    OutputExists,
    OutputExpired,
    PartNotFound,
    Unavailable,
)
from exportd.v1 import dataset_pb2
from tests.support.scripted_server import (
    JOB,
    Script,
    ScriptedPart,
    ScriptedServer,
    join,
    scripted,
)
from tests.support.waits import ENOUGH

QUICK = Retry(attempts=4, initial=0.01, maximum=0.05)
DATA = random.Random(7).randbytes(1_000_003)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted(parts=[ScriptedPart(DATA)]) as running:
        yield running


def client(server: ScriptedServer, *, stall_timeout: float = 60.0) -> Client:
    return Client(
        server.address, retry=QUICK, stream_retry=QUICK, stall_timeout=stall_timeout
    )


def fetch(server: ScriptedServer, path: Path, **plan: object) -> Download:
    with client(server) as c:
        return c.job(JOB).download(path, **plan)  # type: ignore[arg-type]  # checked by the callee


def leftovers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def offsets(server: ScriptedServer) -> list[int]:
    return [r.read_offset for r in server.requests if hasattr(r, "read_offset")]


def test_a_download_is_byte_exact_verified_and_leaves_nothing_else(
    server: ScriptedServer, tmp_path: Path
) -> None:
    done = fetch(server, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert leftovers(tmp_path) == ["out.csv"]
    assert done.sha256 == hashlib.sha256(DATA).hexdigest()
    assert (done.size, done.verified_by, done.resumed) == (len(DATA), "sha256", 0)
    assert os.fspath(done) == str(tmp_path / "out.csv")


@pytest.mark.parametrize("quietly", [False, True], ids=["unavailable", "ended with OK"])
def test_a_cut_stream_resumes_at_the_last_verified_byte_of_the_same_generation(
    server: ScriptedServer, tmp_path: Path, quietly: bool
) -> None:
    server.script.cuts = [3, 1, 0, 5, None]
    server.script.cut_quietly = quietly
    fetch(server, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == DATA
    chunk = server.script.chunk
    assert offsets(server) == [0, 3 * chunk, 4 * chunk, 4 * chunk, 9 * chunk]
    streams = [r for r in server.requests if hasattr(r, "if_generation_match")]
    assert {r.if_generation_match for r in streams} == {1}


def test_a_server_that_stays_away_is_given_up_on_and_what_came_is_kept(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.cuts = [4, 0, 0, 0]
    with pytest.raises(Unavailable) as caught:
        fetch(server, tmp_path / "out.csv")
    assert server.address in str(caught.value)
    assert not (tmp_path / "out.csv").exists()
    done = fetch(server, tmp_path / "out.csv")
    assert done.resumed == 4 * server.script.chunk
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert leftovers(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("fault", ["bit", "offset"])
def test_a_corrupt_message_is_fetched_again(
    server: ScriptedServer, tmp_path: Path, fault: str
) -> None:
    if fault == "bit":
        server.script.corrupt = {300_000: 2}
    else:
        server.script.wrong_offset = Counter({65_536: 2})
    fetch(server, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert server.calls["StreamDownload"] == 3


def test_a_message_that_stays_corrupt_is_data_loss_and_no_file(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.corrupt = {300_000: 99}
    with pytest.raises(DataLoss, match="checksum at byte 262144, 3 times"):
        fetch(server, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("wrong", ["wrong_sha256", "wrong_crc32c"])
def test_a_whole_that_does_not_match_its_checksum_is_data_loss_and_leaves_nothing(
    server: ScriptedServer, tmp_path: Path, wrong: str
) -> None:
    setattr(server.script, wrong, True)
    with pytest.raises(DataLoss):
        fetch(server, tmp_path / "out.csv")
    assert leftovers(tmp_path) == []


def test_data_loss_at_the_server_is_not_retried(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.download_error = (
        grpc.StatusCode.DATA_LOSS,
        "CHECKSUM_MISMATCH",
        "stored bytes do not match their checksum",
    )
    with pytest.raises(DataLoss, match="CHECKSUM_MISMATCH"):
        fetch(server, tmp_path / "out.csv")
    assert server.calls["StreamDownload"] == 1


def test_bytes_damaged_on_disk_between_two_tries_are_fetched_again(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.cuts = [6, 0, 0, 0]
    with pytest.raises(Unavailable):
        fetch(server, tmp_path / "out.csv")
    partial = next(tmp_path.glob("*.part-*[!n]"))
    with partial.open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\1\2\3")
    done = fetch(server, tmp_path / "out.csv")
    assert done.resumed == 0
    assert (tmp_path / "out.csv").read_bytes() == DATA


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", '{"version": 1}', '{"version": 9}', "null", '{"version": 1, "x'],
)
def test_a_torn_record_costs_a_fresh_start_and_nothing_else(
    server: ScriptedServer, tmp_path: Path, record: str
) -> None:
    (tmp_path / f"out.csv.part-{JOB}").write_bytes(b"x" * 2_000_000)
    (tmp_path / f"out.csv.part-{JOB}.json").write_text(record)
    assert fetch(server, tmp_path / "out.csv").resumed == 0
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert leftovers(tmp_path) == ["out.csv"]


@pytest.mark.parametrize(
    "ranges",
    [
        [[0, -5, 1]],
        [[5, 10, 1], [0, 3, 1]],
        [[0, 99_999_999, 1]],
        [["0", 1, 1]],
        [[0, 1]],
        [None],
        [[0, True, 0.5]],
    ],
)
def test_a_record_that_makes_no_sense_is_not_believed(
    server: ScriptedServer, tmp_path: Path, ranges: object
) -> None:
    (tmp_path / f"out.csv.part-{JOB}").write_bytes(DATA[:500])
    identity = {"job_id": JOB, "part": None, "generation": 1}
    (tmp_path / f"out.csv.part-{JOB}.json").write_text(
        json.dumps({"version": 1, "identity": identity, "ranges": ranges})
    )
    assert fetch(server, tmp_path / "out.csv").resumed == 0
    assert (tmp_path / "out.csv").read_bytes() == DATA


def test_parallel_ranges_arrive_over_connections_of_their_own(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_download, "MIN_RANGE", 100_000)
    server.script.pause = threading.Semaphore(0)  # nothing goes out until all have come
    work = threading.Thread(
        target=fetch, args=(server, tmp_path / "out.csv"), kwargs={"parallel": 4}
    )
    work.start()
    wait_until(lambda: server.calls["StreamDownload"] == 4)
    server.script.pause.release(1000)
    work.join(ENOUGH)
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert sorted(offsets(server)) == [0, 250_001, 500_002, 750_003]
    assert len(server.peers) == 5  # four ranges and the client's own


def test_downloads_one_after_the_other_share_a_connection(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with client(server) as c:
        for n in range(3):
            c.job(JOB).download(tmp_path / str(n))
        assert len(server.peers) == 2  # that one and the client's own
        # One that failed leaves its connection to nobody.
        server.script.cuts = [0] * (3 + QUICK.attempts)
        with pytest.raises(Unavailable):
            c.job(JOB).download(tmp_path / "cut")
        c.job(JOB).download(tmp_path / "again")
        assert len(server.peers) == 3


def test_a_connection_that_nobody_uses_is_given_up(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Channels, "IDLE_MS", 1_000)  # the least that the library takes
    done = itertools.count()

    def download() -> int:
        c.job(JOB).download(tmp_path / str(next(done)))
        return len(server.peers)

    with client(server) as c:
        download()
        assert download() == 2
        pause = 1.0
        while download() == 2:  # the library looks now and then
            assert pause < ENOUGH / 3
            pause *= 1.5
            time.sleep(pause)


def test_parallel_ranges_resume_each_where_it_was_cut(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_download, "MIN_RANGE", 100_000)
    server.script.cuts = [1, 2, 0, 1, 1, 0, 1]
    server.script.corrupt = {600_000: 1}
    fetch(server, tmp_path / "out.csv", parallel=4)
    assert (tmp_path / "out.csv").read_bytes() == DATA


def test_an_interrupted_parallel_download_goes_on_with_any_number_of_ranges(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_download, "MIN_RANGE", 50_000)
    server.script.cuts = [2, 2, 2, *[0] * 20]
    with pytest.raises(Unavailable):
        fetch(server, tmp_path / "out.csv", parallel=3)
    server.script.cuts = []
    record = json.loads((tmp_path / f"out.csv.part-{JOB}.json").read_text())
    before = len(offsets(server))
    done = fetch(server, tmp_path / "out.csv", parallel=2)
    assert done.resumed == sum(size for _, size, _ in record["ranges"]) > 0
    assert (tmp_path / "out.csv").read_bytes() == DATA
    for offset in offsets(server)[before:]:  # nothing that was there came again
        assert not any(at <= offset < at + size for at, size, _ in record["ranges"])


def test_a_new_generation_between_two_streams_begins_again_from_zero(
    server: ScriptedServer, tmp_path: Path
) -> None:
    anew = random.Random(8).randbytes(900_001)
    server.script.cuts = [5, None, None]
    server.script.new_generation_at = 1
    server.script.next_parts = [ScriptedPart(anew)]
    done = fetch(server, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == anew
    assert (done.size, done.resumed) == (len(anew), 0)
    assert offsets(server)[-1] == 0


def test_a_job_known_to_have_succeeded_is_asked_for_only_if_it_was_made_anew(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with client(server) as c:
        job = c.job(JOB)
        job.download(tmp_path / "out.csv")
        assert server.calls["GetJob"] == 1
        server.script.generation = 2
        job.download(tmp_path / "again.csv")
    assert server.calls["GetJob"] == 2
    assert (tmp_path / "again.csv").read_bytes() == DATA
    streams = [r for r in server.requests if hasattr(r, "if_generation_match")]
    assert [r.if_generation_match for r in streams] == [1, 1, 2]


def test_an_output_without_a_byte_is_made_only_while_the_job_is_there(
    tmp_path: Path,
) -> None:
    with scripted(parts=[ScriptedPart(b"")]) as server, client(server) as c:
        job = c.job(JOB)
        job.download(tmp_path / "out.csv")
        server.script.state = "CANCELLED"
        with pytest.raises(JobCancelled):
            job.download(tmp_path / "again.csv")
    assert leftovers(tmp_path) == ["out.csv"]


def test_a_job_seen_while_it_ran_is_asked_for_before_its_download(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with client(server) as c:
        server.script.state = "RUNNING"
        job = c.job(JOB)
        server.script.state = "SUCCEEDED"
        job.download(tmp_path / "out.csv")
    assert server.calls["GetJob"] == 2
    assert (tmp_path / "out.csv").read_bytes() == DATA


def test_bytes_of_an_older_generation_on_disk_are_not_used(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.cuts = [6, 0, 0, 0]
    with pytest.raises(Unavailable):
        fetch(server, tmp_path / "out.csv")
    server.script.generation = 2
    server.script.parts = [ScriptedPart(bytes(reversed(DATA)))]
    assert fetch(server, tmp_path / "out.csv").resumed == 0
    assert (tmp_path / "out.csv").read_bytes() == bytes(reversed(DATA))


def test_a_stream_that_falls_silent_is_taken_up_anew(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.hang_after = 3
    with client(server, stall_timeout=2.0) as c:
        c.job(JOB).download(tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert offsets(server) == [0, 3 * server.script.chunk]


def test_a_server_that_restarts_in_the_middle_does_not_end_the_download(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.pause = threading.Semaphore(3)
    patient = Retry(attempts=20, initial=0.05, maximum=0.2)
    result: list[Download] = []

    def work() -> None:
        with Client(server.address, stream_retry=patient) as c:
            result.append(c.job(JOB).download(tmp_path / "out.csv"))

    thread = threading.Thread(target=work)
    thread.start()
    assert server.sending.wait(ENOUGH)
    port = server.port
    server.stop()
    again = ScriptedServer(Script(parts=[ScriptedPart(DATA)])).start(port)
    thread.join(ENOUGH)
    again.stop()
    assert result
    assert (tmp_path / "out.csv").read_bytes() == DATA


def parts_of(prefix: bytes, suffix: bytes) -> list[ScriptedPart]:
    bodies = [random.Random(i).randbytes(200_000 + i) for i in range(3)]
    return [ScriptedPart(b, prefix, suffix) for b in bodies]


@pytest.mark.parametrize(
    ("prefix", "suffix"), [(b"", b""), (b"a,b\n", b""), (b"ARROW" * 9, b"EOS\0")]
)
def test_joined_parts_are_each_verified_by_sha256(
    tmp_path: Path, prefix: bytes, suffix: bytes
) -> None:
    parts = parts_of(prefix, suffix)
    with scripted(parts=parts) as server:
        done = fetch(server, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == join(parts)
    assert (done.verified_by, done.sha256) == ("sha256", None)


@pytest.mark.parametrize("other", [b"b,a\n", b"longer header\n"])
def test_parts_whose_headers_differ_are_verified_by_the_whole_crc_and_it_says_so(
    tmp_path: Path, other: bytes
) -> None:
    parts = parts_of(b"a,b\n", b"")
    parts[1].prefix = other
    with scripted(parts=parts) as server:
        done = fetch(server, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == join(parts)
    assert done.verified_by == "crc32c"


@pytest.mark.parametrize("wrong", ["wrong_sha256", "wrong_crc32c"])
def test_joined_parts_that_do_not_match_are_data_loss(tmp_path: Path, wrong: str) -> None:
    script = {"parts": parts_of(b"a,b\n", b""), wrong: True}
    with scripted(**script) as server, pytest.raises(DataLoss):
        fetch(server, tmp_path / "out.csv")
    assert leftovers(tmp_path) == []


def test_one_part_alone_is_a_file_of_its_own(tmp_path: Path) -> None:
    parts = parts_of(b"a,b\n", b"")
    with scripted(parts=parts) as server:
        done = fetch(server, tmp_path / "one.csv", part=1)
        assert (tmp_path / "one.csv").read_bytes() == parts[1].data
        assert done.sha256 == hashlib.sha256(parts[1].data).hexdigest()
        with pytest.raises(PartNotFound, match="3 parts, none with index 9"):
            fetch(server, tmp_path / "nine.csv", part=9)


def parquet_script(parts: list[ScriptedPart]) -> Script:
    return Script(
        parts=parts,
        joinable=False,
        file_name="t.parquet",
        format=dataset_pb2.FORMAT_PARQUET,
    )


def test_parts_that_do_not_join_become_files_in_a_directory_that_resumes(
    tmp_path: Path,
) -> None:
    parts = parts_of(b"", b"")
    with ScriptedServer(parquet_script(parts)) as server:
        server.script.cuts = [None, 2, 0, 0, 0]
        with pytest.raises(Unavailable):
            fetch(server, tmp_path / "out")
        seen: list[DownloadProgress] = []
        done = fetch(server, tmp_path / "out", on_progress=seen.append)
        assert done.resumed == 200_000 + 2 * server.script.chunk
    assert [f.read_bytes() for f in done.files] == [p.data for p in parts]
    assert leftovers(tmp_path / "out") == [f"part-{i}.parquet" for i in range(3)]
    assert seen[-1].done == seen[-1].total == done.size


def test_a_foreign_file_in_the_directory_is_not_replaced_unless_told(
    tmp_path: Path,
) -> None:
    (tmp_path / "part-1.parquet").write_bytes(b"mine")
    with ScriptedServer(parquet_script(parts_of(b"", b""))) as server:
        with pytest.raises(OutputExists):
            fetch(server, tmp_path)
        assert (tmp_path / "part-1.parquet").read_bytes() == b"mine"
        fetch(server, tmp_path, overwrite=True)
    assert (tmp_path / "part-1.parquet").stat().st_size == 200_001


def test_following_a_running_job_takes_its_parts_and_verifies_the_whole(
    tmp_path: Path,
) -> None:
    parts = parts_of(b"a,b\n", b"")
    with scripted(parts=parts, state="RUNNING", cuts=[3, None]) as server:
        done = fetch(server, tmp_path / "out.csv", follow=True)
        assert [r.follow for r in server.requests if hasattr(r, "follow")] == [True, True]
    assert (tmp_path / "out.csv").read_bytes() == join(parts)
    assert done.verified_by == "sha256"
    assert leftovers(tmp_path) == ["out.csv"]


def test_following_into_a_directory_takes_the_servers_name(tmp_path: Path) -> None:
    with scripted(parts=parts_of(b"", b""), state="PENDING") as server:
        done = fetch(server, tmp_path, follow=True)
    assert done.path == tmp_path / "token_transfers-1.csv"
    assert leftovers(tmp_path) == ["token_transfers-1.csv"]


def test_following_a_job_that_fails_throws_away_what_came(tmp_path: Path) -> None:
    script = {"parts": parts_of(b"", b""), "state": "RUNNING", "follow_fails": True}
    with scripted(**script) as server, pytest.raises(JobFailed):
        fetch(server, tmp_path / "out.csv", follow=True)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("PENDING", NotFinished),
        ("RUNNING", NotFinished),
        ("FAILED", JobFailed),
        ("CANCELLED", JobCancelled),
    ],
)
def test_a_job_without_output_says_why(
    server: ScriptedServer, tmp_path: Path, state: str, error: type[Exception]
) -> None:
    server.script.state = state
    with pytest.raises(error):
        fetch(server, tmp_path / "out.csv")
    assert leftovers(tmp_path) == []


def test_an_output_that_expires_during_the_download_leaves_nothing(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.download_error = (
        grpc.StatusCode.NOT_FOUND,
        "OUTPUT_EXPIRED",
        "the output has expired; create the export anew",
    )
    with pytest.raises(OutputExpired):
        fetch(server, tmp_path / "out.csv")
    assert leftovers(tmp_path) == []


def test_a_file_that_is_there_is_replaced_only_when_told(
    server: ScriptedServer, tmp_path: Path
) -> None:
    path = tmp_path / "out.csv"
    path.write_bytes(b"mine")
    with pytest.raises(OutputExists, match=r"out\.csv exists"):
        fetch(server, path)
    assert path.read_bytes() == b"mine"
    assert server.calls["StreamDownload"] == 0
    fetch(server, path, overwrite=True)
    assert path.read_bytes() == DATA


def test_a_file_that_appears_meanwhile_is_not_replaced_and_nothing_is_lost(
    server: ScriptedServer, tmp_path: Path
) -> None:
    path = tmp_path / "out.csv"

    def appear(_: DownloadProgress) -> None:
        path.write_bytes(b"mine")

    with pytest.raises(OutputExists):
        fetch(server, path, on_progress=appear)
    assert path.read_bytes() == b"mine"
    path.unlink()
    assert fetch(server, path).resumed == len(DATA)


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("/abs/x.csv", "x.csv"),
        ("..\\..\\evil.csv", "evil.csv"),
        ("..", "export"),
        ("", "export"),
        (".hidden", "hidden"),
        ("a\x1b[31m\nb\u202e.csv", "a[31mb.csv"),
    ],
)
def test_the_servers_name_cannot_leave_the_directory(
    server: ScriptedServer, tmp_path: Path, told: str, kept: str
) -> None:
    server.script.file_name = told
    directory = tmp_path / "in"
    directory.mkdir()
    assert fetch(server, directory).path == directory / kept
    assert leftovers(directory) == [kept]
    assert leftovers(tmp_path) == ["in"]


def test_a_very_long_name_is_cut_to_what_a_file_system_takes(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.file_name = "é" * 300 + ".csv"
    path = fetch(server, tmp_path).path
    assert path.name.endswith("é.csv")
    assert len(path.name.encode()) <= 180


def test_a_link_planted_under_the_temporary_name_is_not_followed(
    server: ScriptedServer, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f"out.csv.part-{JOB}").symlink_to(victim)
    with pytest.raises(LocalFileError):
        fetch(server, tmp_path / "out.csv")
    assert victim.read_bytes() == b"precious"


def test_a_missing_directory_is_a_clear_error(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with pytest.raises(LocalFileError, match="check that its directory is there"):
        fetch(server, tmp_path / "no" / "out.csv")


def test_an_empty_output_is_an_empty_file(server: ScriptedServer, tmp_path: Path) -> None:
    server.script.parts = [ScriptedPart(b"")]
    assert fetch(server, tmp_path / "out.csv").size == 0
    assert (tmp_path / "out.csv").read_bytes() == b""


def test_two_downloads_to_one_path_do_not_mix(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.pause = threading.Semaphore(1)
    first = threading.Thread(target=fetch, args=(server, tmp_path / "out.csv"))
    first.start()
    assert server.sending.wait(ENOUGH)
    with pytest.raises(LocalFileError, match="another download"):
        fetch(server, tmp_path / "out.csv")
    server.script.pause.release(1000)
    first.join(ENOUGH)
    assert (tmp_path / "out.csv").read_bytes() == DATA


def test_nonsense_plans_are_refused(server: ScriptedServer, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="parallel"):
        fetch(server, tmp_path / "x", parallel=0)
    with pytest.raises(InvalidRequest, match="follow"):
        fetch(server, tmp_path / "x", follow=True, part=0)


CHILD = textwrap.dedent(
    """
    import sys
    from exportd import Client
    address, job, path, limit = sys.argv[1:]
    if int(limit):
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    with Client(address) as client:
        try:
            client.job(job).download(path)
        except Exception as error:
            print(type(error).__name__, error)
            raise SystemExit(3)
    """
)


def child(server: ScriptedServer, path: Path, limit: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, server.address, JOB, str(path), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_record(directory: Path, at_least: int) -> int:
    """Wait until the record of a partial download says so many bytes are there."""
    deadline = time.monotonic() + ENOUGH
    while time.monotonic() < deadline:
        for record in directory.glob("*.json"):
            done: int = sum(r[1] for r in json.loads(record.read_text())["ranges"])
            if done >= at_least:
                return done
        time.sleep(0.02)
    raise AssertionError(f"no record of {at_least} bytes in {directory}")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_process_leaves_a_download_that_goes_on(
    server: ScriptedServer, tmp_path: Path, sign: signal.Signals
) -> None:
    server.script.pause = threading.Semaphore(5)
    process = child(server, tmp_path / "out.csv")
    recorded = wait_for_record(tmp_path, 5 * server.script.chunk)
    process.send_signal(sign)
    process.communicate(timeout=ENOUGH)
    assert process.returncode != 0
    assert not (tmp_path / "out.csv").exists()
    server.script.pause = None
    done = fetch(server, tmp_path / "out.csv")
    assert done.resumed == recorded
    assert (tmp_path / "out.csv").read_bytes() == DATA
    assert leftovers(tmp_path) == ["out.csv"]


def test_a_full_disk_is_a_clear_error_and_what_fits_is_kept(
    server: ScriptedServer, tmp_path: Path
) -> None:
    process = child(server, tmp_path / "out.csv", limit=300_000)
    output, _ = process.communicate(timeout=ENOUGH)
    assert process.returncode == 3, output
    assert output.startswith("LocalFileError cannot write")
    assert "run the same again to go on" in output
    assert not (tmp_path / "out.csv").exists()
    done = fetch(server, tmp_path / "out.csv")
    assert done.resumed == 4 * server.script.chunk
    assert (tmp_path / "out.csv").read_bytes() == DATA


def test_too_little_room_is_told_before_anything_is_fetched(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(LocalFileError, match="1,000,003 bytes to come, 10 free"):
        fetch(server, tmp_path / "out.csv")
    assert server.calls["StreamDownload"] == 0


def test_progress_ends_at_the_total_and_comes_on_the_callers_thread(
    server: ScriptedServer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int | None, int]] = []
    fetch(
        server,
        tmp_path / "out.csv",
        on_progress=lambda p: seen.append((p.done, p.total, threading.get_ident())),
    )
    assert seen[-1] == (len(DATA), len(DATA), threading.get_ident())
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)


async def test_the_asyncio_client_downloads_and_reports_on_the_loop(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.cuts = [3, None]
    threads: set[int] = set()
    async with AsyncClient(server.address, stream_retry=QUICK) as c:
        job = await c.job(JOB)
        done = await job.download(
            tmp_path / "out.csv", on_progress=lambda _: threads.add(threading.get_ident())
        )
        await asyncio.sleep(0)
    assert done.path.read_bytes() == DATA
    assert threads == {threading.get_ident()}


async def test_a_cancelled_task_stops_the_download_and_keeps_what_came(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.script.pause = threading.Semaphore(5)
    async with AsyncClient(server.address) as c:
        task = asyncio.ensure_future((await c.job(JOB)).download(tmp_path / "out.csv"))
        await asyncio.to_thread(wait_for_record, tmp_path, 5 * server.script.chunk)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.script.pause = None
        done = await (await c.job(JOB)).download(tmp_path / "out.csv")
    assert done.resumed == 5 * server.script.chunk
    assert done.path.read_bytes() == DATA
