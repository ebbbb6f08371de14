"""The Python client, held to what every client is held to."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

import exportd
from exportd.v1 import export_service_pb2, export_service_pb2_grpc
from tests.clients.languages import CLIENTS
from tests.clients.suite import ClientSuite
from tests.support.server import server_process
from tests.support.tcp_proxy import TcpProxy


class PythonClient:
    """Runs by the interpreter of the tests; there is nothing to build."""

    name = "python"
    folder = CLIENTS / "python"
    into_directories = True

    def missing(self) -> str | None:
        return None

    def build(self) -> None:
        pass

    def check(self) -> None:
        """By `make check` and `make test`, as the service is."""

    def driver(self) -> Sequence[str]:
        return [sys.executable, str(CLIENTS / "python/driver.py")]

    def example(self) -> Sequence[str]:
        return [sys.executable, str(CLIENTS / "python/example.py")]

    def snippet(self, text: str, directory: Path) -> Sequence[str]:
        program = directory / "snippet.py"
        program.write_text(text)
        return [sys.executable, str(program)]


class TestPython(ClientSuite):
    language = PythonClient()


def test_the_stubs_with_the_service_config_do_not_notice_that_a_server_was_gone(
    samples: Path, tmp_path: Path
) -> None:
    with server_process(tmp_path, "--catalogue", str(samples)) as server:
        proxy = TcpProxy(server.port)
        with proxy.running():
            proxy.down()
            back = threading.Timer(5, proxy.up)
            back.start()
            options = [("grpc.service_config", exportd.SERVICE_CONFIG)]
            target = f"127.0.0.1:{proxy.port}"
            with grpc.insecure_channel(target, options=options) as channel:
                stub = export_service_pb2_grpc.ExportServiceStub(channel)
                request = export_service_pb2.GetDatasetRequest(name="positions")
                assert stub.GetDataset(request, timeout=60).dataset.name == "positions"
            back.join()


def test_without_it_they_do() -> None:
    with (
        TcpProxy(1).running() as proxy,
        grpc.insecure_channel(f"127.0.0.1:{proxy.port}") as channel,
    ):
        proxy.down()
        stub = export_service_pb2_grpc.ExportServiceStub(channel)
        request = export_service_pb2.GetDatasetRequest(name="positions")
        with pytest.raises(grpc.RpcError) as error:
            stub.GetDataset(request, timeout=60)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
