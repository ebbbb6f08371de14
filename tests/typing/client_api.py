"""How callers use the client, for type checkers to agree with. Never run."""

# pyright: strict
from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import assert_type

import polars as pl

from exportd import (
    AsyncClient,
    AsyncJob,
    AuditOutcome,
    AuditRecord,
    CancelOutcome,
    Client,
    Dataset,
    Delivery,
    DeliveryState,
    DeliveryStatus,
    Download,
    DownloadProgress,
    DownloadUrl,
    DownloadUrls,
    Filter,
    Job,
    JobInfo,
    JobState,
    Manifest,
    Progress,
    Retry,
    Sink,
    SinkDelivery,
    SinkLike,
    SinkQueue,
    to_database,
    to_file,
    to_plugin,
    to_s3,
    to_webhook,
)
from exportd.errors import DeliveryFailed, ExportdError, JobFailed, QuotaExceeded
from exportd.v1 import sink_pb2


def show(info: JobInfo) -> None:
    assert_type(info.progress.fraction, float | None)


def count(progress: DownloadProgress) -> int:
    return progress.done


def blocking(path: Path) -> None:
    with Client("localhost:50051", token="t", retry=Retry(attempts=2)) as client:
        job = client.export(
            "token_transfers",
            format="parquet",
            target_id="0xabc",
            start=datetime(2026, 1, 1, tzinfo=UTC),
            columns=["block", "amount"],
            filters=[
                ("amount", ">=", Decimal("1.5")),
                ("memo", "is null"),
                ("network", "in", ["base", "optimism"]),
                Filter("sender", "starts with", "0x"),
            ],
            compression="zstd",
            ttl=timedelta(hours=1),
            labels={"team": "data"},
            on_row_error="skip",
            max_row_errors=100,
        )
        assert_type(job, Job)
        assert_type(job.row_errors, int)
        assert_type(job.download_errors(path), Download)
        done = job.wait(timeout=60, on_progress=show).download(
            path, parallel=4, overwrite=True, on_progress=count
        )
        assert_type(done, Download)
        done.path.read_bytes()
        path.open().close()
        assert_type(job.state, JobState)
        assert_type(job.progress, Progress)
        assert_type(job.manifest, Manifest | None)
        assert_type(job.error, JobFailed | None)
        assert_type(job.cancel(), CancelOutcome)
        assert_type(job.to_polars(), pl.DataFrame)
        urls = job.download_urls(lifetime=timedelta(hours=1))
        assert_type(urls, DownloadUrls)
        assert_type(urls.joined, DownloadUrl | None)
        assert_type([url.url for url in urls.parts], list[str])
        for info in job.watch():
            assert_type(info, JobInfo)
        for dataset in client.datasets():
            assert_type(dataset, Dataset)
        for other in client.jobs(states=[JobState.RUNNING, "FAILED"], dataset="d"):
            assert_type(other, Job)
        client.export("d", format="xml")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        client.export("d")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def delivering() -> None:
    sinks: list[SinkLike] = [
        to_file("reports", "daily/"),
        to_s3("lake", "flights", name="archive"),
        to_webhook("https://example.com/in", mode="PUSH_PARTS", headers={"x": "y"}),
        to_webhook(connection="hook", secret="whsec_x"),
        to_database("warehouse", "sales.orders", mode="MERGE", key_columns=["id"]),
        to_plugin("kafka", "main", topic="exports", retries=3, tags=["a", None]),
        sink_pb2.Sink(local_file=sink_pb2.LocalFileSink(connection="reports")),
    ]
    with Client() as client:
        job = client.export("d", format="csv", sinks=sinks, drop_after_delivery=True)
        client.export("d", format="csv", sinks=[to_file("reports")])
        assert_type(job.wait(until_delivered=True), Job)
        assert_type(job.delivery_status, DeliveryStatus | None)
        assert_type(job.info.deliveries, tuple[SinkDelivery, ...])
        assert_type(job.info.delivered_to, tuple[str, ...])
        for info in job.watch(until_delivered=True):
            assert_type(info.settled, bool)
        states = [DeliveryState.DEAD_LETTERED, "DROPPED"]
        for delivery in client.deliveries(job_id=job.id, sink="archive", states=states):
            assert_type(delivery, Delivery)
            assert_type(delivery.last_error, DeliveryFailed | None)
            assert_type(delivery.next_attempt_time, datetime | None)
        for delivery in job.deliveries(states=["PENDING"]):
            assert_type(delivery.state, DeliveryState)
        assert_type(client.redrive(queue="webhook/hook"), int)
        assert_type(job.redrive(sink="archive"), int)
        for queue in client.sink_queues():
            assert_type(queue, SinkQueue)
        assert_type(client.enable_sink_queue("webhook/hook"), SinkQueue)
        for record in client.audit_records(methods=["DeleteJob"], outcomes=["FAILED"]):
            assert_type(record, AuditRecord)
            assert_type(record.outcome, AuditOutcome)
            assert_type(record.bytes_sent, int | None)
        assert_type(to_file("reports"), Sink)
        to_database("w", "t", mode="UPSERT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        to_plugin("kafka", key=object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        client.export("d", format="csv", sinks=["file:x"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


async def in_asyncio(path: Path) -> None:
    async with AsyncClient("localhost:50051", tls=True) as client:
        job = await client.export("token_transfers", format="csv", header=False)
        assert_type(job, AsyncJob)
        done = await (await job.wait(on_progress=show)).download(path)
        assert_type(done, Download)
        assert_type(await job.to_polars(), pl.DataFrame)
        assert_type(await job.download_urls(part=0), DownloadUrls)
        async for info in job.watch():
            assert_type(info, JobInfo)
        async for other in client.jobs():
            assert_type(other, AsyncJob)
        async for dataset in client.datasets():
            assert_type(dataset, Dataset)
        assert_type(await job.wait(until_delivered=True), AsyncJob)
        async for info in job.watch(until_delivered=True):
            assert_type(info, JobInfo)
        async for delivery in client.deliveries(queue="q"):
            assert_type(delivery, Delivery)
        async for delivery in job.deliveries(sink="archive"):
            assert_type(delivery, Delivery)
        assert_type(await client.redrive(delivery_id="x"), int)
        assert_type(await job.redrive(), int)
        async for queue in client.sink_queues():
            assert_type(queue, SinkQueue)
        assert_type(await client.enable_sink_queue("q"), SinkQueue)
        async for record in client.audit_records(tenant="acme"):
            assert_type(record, AuditRecord)


def failing(error: ExportdError) -> None:
    assert_type(error.reason, str)
    assert_type(error.metadata, dict[str, str])
    if isinstance(error, QuotaExceeded):
        assert_type(error.retry_after, timedelta | None)
