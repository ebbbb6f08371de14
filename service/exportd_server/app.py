"""The one place where things are wired: settings in, a running server out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog

from exportd_server import samples
from exportd_server.api.download import DownloadOptions, Downloads
from exportd_server.api.server import GrpcServer
from exportd_server.api.servicer import ExportService
from exportd_server.errors import ConfigurationError
from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.manager import JobManager, Policy
from exportd_server.jobs.readers import Readers
from exportd_server.jobs.worker import Worker, WorkerOptions
from exportd_server.platform.clock import SystemClock
from exportd_server.platform.malloc import release_free_memory
from exportd_server.settings import Settings
from exportd_server.sources.catalogue import Catalogue, load_catalogue
from exportd_server.store.local import LocalStore

log = structlog.get_logger(__name__)

TENANT = "default"
"""Whose call it is, while callers need not identify themselves."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is up. Set `stop` to have it drain and end."""

    port: int
    stop: asyncio.Event


def sample_catalogue(settings: Settings) -> Path:
    """Generate the sample data unless it is there; returns its catalogue."""
    directory = settings.data_dir / "samples"
    samples.generate(directory, settings.sample_rows)
    return directory / "datasets.toml"


@contextlib.asynccontextmanager
async def serving(
    settings: Settings, *, catalogue: Catalogue | None = None
) -> AsyncIterator[Running]:
    """Run the server for as long as the context is open; then drain.

    A program that embeds the server may bring a catalogue of its own making.

    Raises `ConfigurationError` in one line for whatever the operator must mend.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"data_dir: {settings.data_dir} cannot be made ({error.strerror}); name a "
                "directory that this user may write to"
            ) from None
        if catalogue is not None:
            datasets = catalogue
        else:
            datasets = await asyncio.to_thread(_open_catalogue, settings)
        stack.callback(datasets.close)
        clock = SystemClock()
        ledger = await open_sqlite_ledger(
            _path(
                settings.ledger.url,
                "sqlite",
                "ledger.url",
                settings.data_dir / "ledger.db",
            ),
            clock,
            max_attempts=settings.worker.max_attempts,
        )
        stack.push_async_callback(ledger.close)
        store = LocalStore(
            _path(settings.store.url, "file", "store.url", settings.data_dir / "outputs")
        )
        stack.push_async_callback(store.close)
        readers = Readers()
        policy = _policy(settings)
        manager = JobManager(ledger, datasets, policy, clock, readers)
        downloads = Downloads(
            manager,
            store,
            readers,
            DownloadOptions(settings.download.chunk_bytes, settings.download.stall_timeout),
        )
        stop = asyncio.Event()
        service = ExportService(
            manager, downloads, tenant=lambda _context: TENANT, is_draining=stop.is_set
        )
        worker = Worker(
            ledger,
            store,
            datasets,
            Housekeeping(
                ledger,
                store,
                readers,
                reap_interval=timedelta(seconds=settings.retention.reap_interval),
            ),
            policy,
            _worker_options(settings),
        )
        server = GrpcServer(service)
        try:
            port = await server.start(settings.listen)
        except OSError as error:
            raise ConfigurationError(
                f"listen: {error}; is another server on that port?"
            ) from None
        working = asyncio.create_task(worker.run())
        working.add_done_callback(lambda _task: stop.set())
        # Reading the catalogue took far more memory than it keeps.
        await asyncio.to_thread(release_free_memory)
        log.info(
            "serving",
            listen=f"{settings.listen.rpartition(':')[0]}:{port}",
            datasets=len(datasets.names()),
            identity="none: every caller may do everything",
        )
        try:
            yield Running(port, stop)
        finally:
            stop.set()
            log.info("draining")
            await server.announce_shutdown()
            grace = settings.drain_timeout
            await asyncio.gather(worker.drain(grace), server.stop(grace))
            await asyncio.wait({working}, timeout=grace)
            if not working.done():
                # What a source blocks in cannot be given back; its lease runs out.
                log.warning("work did not end in time")
                working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
            log.info("stopped")


def _open_catalogue(settings: Settings) -> Catalogue:
    return load_catalogue(settings.catalogue or sample_catalogue(settings))


def _policy(settings: Settings) -> Policy:
    return Policy(
        default_ttl=timedelta(seconds=settings.retention.ttl),
        max_ttl=timedelta(seconds=settings.retention.max_ttl),
        text_part_bytes=settings.parts.text_bytes,
        parquet_part_bytes=settings.parts.parquet_bytes,
        max_active_jobs=settings.limits.max_active_jobs,
        max_rows=settings.limits.max_rows,
        max_bytes=settings.limits.max_bytes,
    )


def _worker_options(settings: Settings) -> WorkerOptions:
    return WorkerOptions(
        concurrency=settings.worker.concurrency,
        lease=settings.worker.lease,
        poll=settings.worker.poll,
        running_per_tenant=settings.worker.running_per_tenant,
        max_bytes_in_flight=settings.worker.bytes_in_flight,
    )


def _path(url: str, scheme: str, key: str, default: Path) -> Path:
    """The path in a `scheme:///path` URL."""
    if not url:
        return default
    parts = urlsplit(url)
    if parts.scheme != scheme or parts.netloc or not parts.path or parts.query:
        raise ConfigurationError(
            f"{key}: {parts.scheme or url}: is not supported; use {scheme}:///PATH"
        )
    return Path(unquote(parts.path))
