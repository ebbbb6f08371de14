"""What a slow sink costs the fast one beside it: how soon an export of many parts has
arrived in a directory, alone and beside a webhook that takes its time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from bench.machine import CACHE, sample_data, server
from bench.receiver import receiving
from bench.report import Result
from exportd import Client, DeliveryStatus, Sink, to_file, to_webhook

ROWS = 1_000_000
PART_BYTES = 2 * 2**20
RUNS = 5
ANSWER_SECONDS = 2.0
_SECRET = "whsec_" + "A" * 32


def results() -> Iterator[Result]:
    """Measure."""
    catalogue = sample_data(ROWS)
    with tempfile.TemporaryDirectory(dir=CACHE) as name, _slow_receiver() as url:
        directory = Path(name)
        (directory / "delivered").mkdir()
        sinks = directory / "sinks.toml"
        sinks.write_text(
            f'[connections.fast]\ntype = "local_file"\n'
            f'root = "{directory / "delivered"}"\n'
            '[connections.slow]\ntype = "webhook"\nallow_http = true\n'
            'allow_private = ["127.0.0.0/8"]\n'
        )
        variables = {"EXPORTD_SINKS": str(sinks)}
        with (
            server(directory / "data", catalogue, variables) as running,
            Client(running.address) as client,
        ):
            fast = to_file("fast")
            slow = to_webhook(url=url, connection="slow", secret=_SECRET, mode="PUSH_PARTS")
            _arrival(client, fast)
            alone, beside = [], []
            for _ in range(RUNS):
                alone.append(_arrival(client, fast))
                beside.append(_arrival(client, fast, slow))
    yield Result(
        "fast sink beside a slow one, throughput",
        1 / statistics.median(beside),
        "exports/s",
        peer="the fast sink alone",
        peer_value=1 / statistics.median(alone),
        ratio=statistics.median(alone) / statistics.median(beside),
        goal="at least 0.9",
    )


def _arrival(client: Client, *sinks: Sink) -> float:
    """Seconds from the creation until the first sink has everything."""
    begun = time.perf_counter()
    job = client.export(
        "token_transfers", format="csv", max_part_bytes=PART_BYTES, sinks=sinks
    )
    for now in job.watch(until_delivered=True):
        if now.deliveries and now.deliveries[0].status is DeliveryStatus.DELIVERED:
            break
    seconds = time.perf_counter() - begun
    # What the slow one has not been given yet is not for the next run.
    job.delete()
    return seconds


@contextmanager
def _slow_receiver() -> Iterator[str]:
    class Receiver(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            left = int(self.headers["Content-Length"])
            while left:
                left -= len(self.rfile.read(min(left, 2**16)))
            time.sleep(ANSWER_SECONDS)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with receiving(Receiver) as url:
        yield url
