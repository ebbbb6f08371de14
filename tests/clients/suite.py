"""What every client is held to, whatever its language: a real server over TLS with an API
key, and whatever can go wrong on the way."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import grpc
import pytest

from exportd import Client
from tests.clients.conftest import Service
from tests.clients.languages import RUN_TIMEOUT, Driver, Language, example_of
from tests.support.scripted_server import JOB, ScriptedPart, ScriptedServer, scripted
from tests.support.server import server_process
from tests.support.tcp_proxy import TcpProxy

MIB = 2**20
UNKNOWN = "01900000-0000-7000-8000-00000000abcd"


def visible(directory: Path) -> list[str]:
    """The names in a directory, without those of files that are not finished."""
    return sorted(p.name for p in directory.iterdir() if ".part" not in p.name)


def partial_bytes(directory: Path) -> int:
    """Bytes of the unfinished file."""
    sizes = [p.stat().st_size for p in directory.iterdir() if ".part" in p.name]
    return max(sizes, default=0)


def offsets(server: ScriptedServer) -> list[int]:
    """Where each download stream was to begin."""
    return [r.read_offset for r in server.requests if hasattr(r, "read_offset")]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The first test of a class builds, which on a new machine fetches a language's libraries.
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("built")
class ClientSuite:
    """A language's tests are a class that inherits this one and names the language."""

    language: ClassVar[Language]

    @pytest.fixture
    def driver(self, service: Service) -> Iterator[Driver]:
        driver = service.driving(self.language)
        yield driver
        driver.end()

    def test_the_clients_own_linters_and_unit_tests_pass(self) -> None:
        self.language.check()

    def test_a_download_is_the_file_that_the_manifest_tells_of(
        self, service: Service, driver: Driver, target: Path
    ) -> None:
        job = service.export(format="csv")
        done = driver.run("download", job.id, str(target)).result
        manifest = job.manifest
        assert manifest is not None
        assert done["bytes"] == target.stat().st_size == manifest.size
        assert done["verified_by"] == "sha256"
        assert done["sha256"] == sha256(target) == manifest.parts[0].sha256.hex()
        assert [p.name for p in target.parent.iterdir()] == [target.name]

    def test_joined_parts_are_one_verified_file(
        self, service: Service, driver: Driver, target: Path, tmp_path: Path
    ) -> None:
        job = service.export(format="csv", max_part_rows=7_000)
        done = driver.run("download", job.id, str(target)).result
        assert job.manifest is not None
        assert len(job.manifest.parts) > 3
        assert done["verified_by"] == "sha256"
        with service.client() as client:
            other = client.job(job.id).download(tmp_path / "other")
        assert target.read_bytes() == other.path.read_bytes()

    def test_parts_that_do_not_join_are_refused_by_name_and_come_one_by_one(
        self, service: Service, driver: Driver, target: Path
    ) -> None:
        job = service.export(format="parquet", max_part_rows=15_000)
        assert job.manifest is not None
        if not self.language.into_directories:
            error = driver.run("download", job.id, str(target)).error
            assert error["code"] == "FAILED_PRECONDITION"
            assert error["reason"] == "PARTS_NOT_JOINABLE"
        part = job.manifest.parts[1]
        driver.run("download", job.id, str(target), "--part", "1")
        assert sha256(target) == part.sha256.hex()

    def test_an_export_is_made_and_watched_to_its_end(
        self, service: Service, driver: Driver
    ) -> None:
        job = driver.run("create", "positions", "FORMAT_CSV").result["job_id"]
        watched = driver.run("watch", job)
        assert watched.code == 0
        assert watched.lines[-1]["state"] == "JOB_STATE_SUCCEEDED"
        assert driver.run("get", job).result["state"] == "JOB_STATE_SUCCEEDED"

    def test_a_wrong_key_and_an_unknown_job_are_the_languages_own_errors_with_the_reason(
        self, service: Service, driver: Driver, target: Path
    ) -> None:
        for arguments in (["get"], ["watch"], ["download", str(target)]):
            verb, *rest = arguments
            error = driver.run(verb, UNKNOWN, *rest).error
            assert (error["code"], error["reason"]) == ("NOT_FOUND", "JOB_NOT_FOUND"), verb
            assert "JOB_NOT_FOUND" in error["message"]
            assert error["type"]
        wrong = service.driving(self.language)
        wrong.environment = {**wrong.environment, "EXPORTD_TOKEN": "exportd_nobody_x"}
        error = wrong.run("download", UNKNOWN, str(target)).error
        assert error["code"] == "UNAUTHENTICATED"
        assert error["reason"]
        assert visible(target.parent) == []

    def test_a_server_that_is_down_is_told_as_unavailable(
        self, service: Service, driver: Driver, target: Path
    ) -> None:
        service.kill()
        runs = [
            driver.start("get", UNKNOWN),
            driver.start("download", UNKNOWN, str(target)),
        ]
        for run in runs:
            assert run.wait().error["code"] == "UNAVAILABLE"
        assert visible(target.parent) == []

    def test_a_token_is_not_sent_in_plain_text_beyond_this_machine(
        self, driver: Driver
    ) -> None:
        driver.environment = {
            "EXPORTD_SERVER": "192.0.2.1:50051",  # for documentation: never routed
            "EXPORTD_TOKEN": "secret",
        }
        error = driver.run("get", UNKNOWN).error
        assert error["code"] == ""
        assert "TLS" in error["message"]
        assert "secret" not in error["message"]

    def test_a_download_that_is_cut_goes_on_where_it_was(
        self, service: Service, target: Path
    ) -> None:
        job = service.export(format="csv")
        assert job.manifest is not None
        size = job.manifest.size
        assert size > 4 * MIB
        proxy = TcpProxy(service.port, cuts=[size // 3, size // 3])
        with proxy.running():
            driver = service.driving(self.language, proxy.port)
            done = driver.run("download", job.id, str(target)).result
        assert proxy.connections >= 3
        assert done["sha256"] == sha256(target) == job.manifest.parts[0].sha256.hex()

    def test_a_server_that_is_gone_for_five_seconds_is_not_noticed_by_a_call(
        self, service: Service
    ) -> None:
        job = service.export("positions", format="csv")
        proxy = TcpProxy(service.port)
        with proxy.running():
            proxy.down()
            run = service.driving(self.language, proxy.port).start("get", job.id)
            time.sleep(5)
            proxy.up()
            assert run.wait().result == {"state": "JOB_STATE_SUCCEEDED"}

    def test_a_server_that_dies_and_returns_is_not_noticed_by_a_watch(
        self, service: Service, driver: Driver
    ) -> None:
        with service.client() as client:
            job = client.export("slow", format="csv")
        run = driver.start("watch", job.id)
        assert run.line()["state"] in {"JOB_STATE_PENDING", "JOB_STATE_RUNNING"}
        service.kill()
        time.sleep(2)
        service.start()
        watched = run.wait()
        assert watched.code == 0, watched.lines
        assert watched.lines[-1]["state"] == "JOB_STATE_SUCCEEDED"

    def test_a_server_that_dies_and_returns_is_not_noticed_by_a_download(
        self, service: Service, target: Path
    ) -> None:
        job = service.export(format="csv")
        assert job.manifest is not None
        proxy = TcpProxy(service.port, hold_after=2 * MIB)
        with proxy.running():
            driver = service.driving(self.language, proxy.port)
            run = driver.start("download", job.id, str(target))
            assert proxy.held.wait(30)
            service.kill()
            proxy.let_go()
            time.sleep(2)
            service.start()
            done = run.wait().result
        assert proxy.connections >= 2
        assert done["sha256"] == sha256(target) == job.manifest.parts[0].sha256.hex()

    def test_a_client_that_is_killed_leaves_nothing_under_the_final_name(
        self, service: Service, driver: Driver, target: Path
    ) -> None:
        job = service.export(format="csv")
        assert job.manifest is not None
        proxy = TcpProxy(service.port, hold_after=2 * MIB)
        with proxy.running():
            run = service.driving(self.language, proxy.port).start(
                "download", job.id, str(target)
            )
            assert proxy.held.wait(30)
            run.kill()
        assert visible(target.parent) == []
        driver.run("download", job.id, str(target))
        assert sha256(target) == job.manifest.parts[0].sha256.hex()
        assert [p.name for p in target.parent.iterdir()] == [target.name]

    def test_a_file_that_is_there_is_replaced_only_when_told(
        self, service: Service, driver: Driver, target: Path
    ) -> None:
        job = service.export("positions", format="csv")
        target.write_text("mine")
        error = driver.run("download", job.id, str(target)).error
        assert error["code"] == ""
        assert str(target) in error["message"]
        assert target.read_text() == "mine"
        driver.run("download", job.id, str(target), "--overwrite")
        assert job.manifest is not None
        assert sha256(target) == job.manifest.parts[0].sha256.hex()

    def test_a_full_disk_is_the_systems_error_and_leaves_no_file(
        self, service: Service, driver: Driver, tmp_path: Path
    ) -> None:
        job = service.export(format="csv")
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        if (
            os.geteuid()
            or subprocess.run(mount, check=False, capture_output=True).returncode
        ):
            pytest.skip("this user may not mount a small disk")
        try:
            error = driver.run("download", job.id, str(disk / "output")).error
            assert error["code"] == ""
            assert re.search("space|room", error["message"]), error
            assert visible(disk) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def test_a_cut_download_asks_for_what_is_missing_and_nothing_else(
        self, target: Path
    ) -> None:
        data = os.urandom(3 * MIB)
        with scripted(parts=[ScriptedPart(data)], cuts=[8, 0, 5]) as server:
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            plain.run("download", JOB, str(target))
            asked = offsets(server)
        assert target.read_bytes() == data
        assert asked == [0, 8 * server.script.chunk, 8 * server.script.chunk, asked[-1]]
        assert asked[-1] == 13 * server.script.chunk

    def test_the_same_call_again_goes_on_where_a_killed_one_ended(
        self, target: Path
    ) -> None:
        data = os.urandom(3 * MIB)
        with scripted(parts=[ScriptedPart(data)], hang_after=16) as server:
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            run = plain.start("download", JOB, str(target))
            # What is recorded of a partial file may lie half a second behind it.
            there = 16 * server.script.chunk
            deadline = time.monotonic() + 30
            while partial_bytes(target.parent) < there:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(1)
            run.kill()
            server.script.hang_after = None
            plain.run("download", JOB, str(target))
            asked = offsets(server)
        assert target.read_bytes() == data
        assert asked == [0, there]
        assert [p.name for p in target.parent.iterdir()] == [target.name]

    def test_a_caller_that_is_to_wait_waits_and_loses_nothing(self, target: Path) -> None:
        data = os.urandom(MIB)
        with scripted(parts=[ScriptedPart(data)], cuts=[8], refuse_once=True) as server:
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            plain.run("download", JOB, str(target))
            asked = offsets(server)
        assert target.read_bytes() == data
        assert asked == [0, 8 * server.script.chunk, 8 * server.script.chunk]

    def test_a_refusal_in_the_middle_keeps_what_was_fetched(self, target: Path) -> None:
        data = os.urandom(MIB)
        with scripted(parts=[ScriptedPart(data)], cuts=[8]) as server:
            server.script.error_after_cut = (
                grpc.StatusCode.UNAUTHENTICATED,
                "UNAUTHENTICATED",
                "the token has expired",
            )
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            assert plain.run("download", JOB, str(target)).error["reason"]
            server.script.error_after_cut = None
            plain.run("download", JOB, str(target))
            asked = offsets(server)
        assert target.read_bytes() == data
        assert asked[-1] == 8 * server.script.chunk

    def test_a_watch_that_always_breaks_off_is_given_up(self) -> None:
        with scripted(watch=["RUNNING"], watch_breaks=True) as server:
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            watched = plain.run("watch", JOB)
            assert watched.error["code"] == "UNAVAILABLE"
            assert 5 <= server.calls["WatchJob"] <= 12

    def test_a_bad_token_is_refused_at_once_and_not_repeated(self) -> None:
        with scripted() as server:
            plain = Driver(
                self.language,
                {"EXPORTD_SERVER": server.address, "EXPORTD_TOKEN": "s3cret\nsecond line"},
            )
            begun = time.monotonic()
            error = plain.run("get", JOB).error
            assert time.monotonic() - begun < 20, "something keeps the process alive"
            assert error["code"] == ""
            assert "token" in error["message"]
            assert "s3cret" not in error["message"]
            assert server.calls["GetJob"] == 0

    def test_a_message_that_was_corrupted_is_fetched_again(self, target: Path) -> None:
        data = os.urandom(3 * MIB)
        with scripted(parts=[ScriptedPart(data)], corrupt={MIB + 17: 1}) as server:
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            plain.run("download", JOB, str(target))
            assert server.calls["StreamDownload"] == 2
        assert target.read_bytes() == data

    @pytest.mark.parametrize("wrong", ["corrupt", "sha256", "crc32c"])
    def test_bytes_that_stay_wrong_never_get_the_final_name(
        self, target: Path, wrong: str
    ) -> None:
        with scripted(
            parts=[ScriptedPart(os.urandom(MIB))],
            corrupt={17: 100} if wrong == "corrupt" else {},
            wrong_sha256=wrong == "sha256",
            wrong_crc32c=wrong == "crc32c",
        ) as server:
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            error = plain.run("download", JOB, str(target)).error
        assert "match" in error["message"]
        assert visible(target.parent) == []

    def test_an_output_that_was_made_anew_is_taken_from_its_beginning(
        self, target: Path
    ) -> None:
        fresh = os.urandom(MIB)
        with scripted(
            parts=[ScriptedPart(os.urandom(MIB))],
            next_parts=[ScriptedPart(fresh)],
            cuts=[4],
            new_generation_at=1,
        ) as server:
            plain = Driver(self.language, {"EXPORTD_SERVER": server.address})
            plain.run("download", JOB, str(target))
        assert target.read_bytes() == fresh

    def test_the_example_works_over_tls_with_a_key(
        self, service: Service, driver: Driver, tmp_path: Path
    ) -> None:
        place = tmp_path / "place"
        place.mkdir()
        done = subprocess.run(
            self.language.example(),
            check=False,
            capture_output=True,
            text=True,
            cwd=place,
            env={**os.environ, **driver.environment},
            timeout=RUN_TIMEOUT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (place / "positions.csv").stat().st_size > 0

    def test_the_example_and_the_page_do_what_they_say(
        self, samples: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "place"
        place.mkdir()
        with server_process(tmp_path / "plain", "--catalogue", str(samples)) as server:
            done = subprocess.run(
                self.language.example(),
                check=False,
                capture_output=True,
                text=True,
                cwd=place,
                env={**os.environ, "EXPORTD_SERVER": server.address},
                timeout=RUN_TIMEOUT,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (written,) = place.iterdir()
            assert written.stat().st_size > 0
            text = example_of(self.language.folder / "README.md")
            assert "localhost:50051" in text
            text = text.replace("localhost:50051", server.address)
            for path in place.iterdir():
                path.unlink()
            snippets = tmp_path / "snippet"
            snippets.mkdir()
            command = self.language.snippet(text, snippets)
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                cwd=place,
                timeout=RUN_TIMEOUT * 2,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            with Client(server.address) as client:
                newest = next(client.jobs(dataset="positions")).refresh()
            manifest = newest.manifest
            assert manifest is not None
            assert sha256(place / "positions.csv") == manifest.parts[0].sha256.hex()
            assert visible(place) == ["positions.csv"]
