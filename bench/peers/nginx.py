"""nginx serving a file with sendfile, in one process of its own with a configuration of
its own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.contest import Missing
from bench.machine import Measured

_CONFIGURATION = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    sendfile_max_chunk 2m;
    tcp_nopush on;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location = /file {{ alias {path}; }}
    }}
}}
"""
_START_SECONDS = 10


def missing() -> Missing | None:
    """Why it cannot take part."""
    if shutil.which("nginx") is None:
        return Missing("nginx is not installed")
    return None


@contextlib.contextmanager
def serving(path: Path, directory: Path) -> Iterator[Measured]:
    """Serve the file at `/file`."""
    directory.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    configuration = directory / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(directory=directory, path=path, port=port), encoding="utf-8"
    )
    process = subprocess.Popen(
        ["nginx", "-p", str(directory), "-c", str(configuration)],
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(port)
        yield Measured(f"127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _wait(port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return
