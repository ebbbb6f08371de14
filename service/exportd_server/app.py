"""The one place where things are wired: settings in, a running server or worker out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from exportd_server import samples
from exportd_server.addresses import host_and_port
from exportd_server.api.chunks import ChunkMemory
from exportd_server.api.download import DownloadOptions, Downloads
from exportd_server.api.interceptors.identity import caller
from exportd_server.api.limits import CallerLimits, RequestRates, Slots
from exportd_server.api.link import LinkKeys
from exportd_server.api.server import GrpcServer, ServerLimits
from exportd_server.api.servicer import ExportService
from exportd_server.api.urls import DownloadUrls, HttpLinks, UrlOptions
from exportd_server.delivery.sinks import Sinks
from exportd_server.encoders.base import Format
from exportd_server.errors import (
    ConfigurationError,
    LedgerUnavailable,
    ServerLost,
    StoreFailed,
)
from exportd_server.identity.authenticator import Authenticator
from exportd_server.identity.base import KeyStore, Scope
from exportd_server.identity.file import FileKeyStore
from exportd_server.identity.keys import KeyRing
from exportd_server.jobs.audit_keys import AuditedKeyStore
from exportd_server.jobs.audit_log import AuditLog
from exportd_server.jobs.audit_spool import AuditSpool
from exportd_server.jobs.exporting import ExportOptions
from exportd_server.jobs.housekeeping import Housekeeping
from exportd_server.jobs.ledger.base import Ledger
from exportd_server.jobs.ledger.sql import SqlLedger
from exportd_server.jobs.ledger.sqlite import open_sqlite_ledger
from exportd_server.jobs.manager import JobManager, Policy
from exportd_server.jobs.measuring import Measuring
from exportd_server.jobs.readers import Readers
from exportd_server.jobs.worker import Worker, WorkerOptions
from exportd_server.places import (
    KEPT_LINK_KEY,
    KEPT_SECRETS,
    is_embedded,
    ledger_file,
    ledger_url,
    outputs,
    refuse_embedded,
)
from exportd_server.platform import metrics, metrics_exports, metrics_service
from exportd_server.platform.clock import Clock, SystemClock
from exportd_server.platform.lazy import LazyModule
from exportd_server.platform.malloc import release_free_memory
from exportd_server.platform.sealing import Fingerprints, Sealer
from exportd_server.platform.secrets import kept_key
from exportd_server.platform.threads import in_daemon_thread
from exportd_server.platform.tracing import NO_TRACER, Tracer
from exportd_server.settings import (
    IdentitySettings,
    JwtSettings,
    Settings,
    TracingSettings,
    read_headers,
)
from exportd_server.sinks.connections import Connections, load_connections
from exportd_server.sinks.registry import SinkTypes
from exportd_server.sources.catalogue import Catalogue, load_catalogue
from exportd_server.store.base import OutputStore, UrlSigner
from exportd_server.store.local import LocalStore
from exportd_server.store.measured import measured

# What not every server needs is imported by the function that needs it: the PostgreSQL
# driver, the HTTP server and the reader of certificates cost each start 0.2 s and 25 MiB.
if TYPE_CHECKING:
    from exportd_server.api.http import AddRoutes, HttpServer
    from exportd_server.api.tls import ServerTls
    from exportd_server.identity.certificates import CertificateName
    from exportd_server.identity.tokens import TokenVerifier

log = structlog.get_logger(__name__)

_TRACES_SECONDS = 2.0
"""In which spans that still wait are sent, once everything else has ended."""
_AUDIT_SECONDS = 5.0
"""In which audit records that still wait are kept, once everything else has ended."""
_METRICS_SECONDS = 1.0
"""In which answers with metrics that are under way are sent, at the end."""


NO_TRACING = (
    "tracing.endpoint: needs what the extra `tracing` brings, and it is not installed; run "
    "pip install 'exportd-server[tracing]', or remove the setting"
)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is up. Set `stop` to have it drain and end. `http_port` is None
    without an HTTP port, `certificate_port` without one that asks for certificates."""

    port: int
    stop: asyncio.Event
    http_port: int | None = None
    certificate_port: int | None = None


def sample_catalogue(settings: Settings) -> Path:
    """Generate the sample data unless it is there; returns its catalogue."""
    directory = settings.data_dir / "samples"
    samples.generate(directory, settings.sample_rows)
    return directory / "datasets.toml"


@contextlib.asynccontextmanager
async def serving(
    settings: Settings,
    *,
    catalogue: Catalogue | None = None,
    sink_types: SinkTypes | None = None,
) -> AsyncIterator[Running]:
    """Run the API, and workers beside it unless the settings say otherwise, for as long
    as the context is open; then drain.

    A program that embeds the server may bring a catalogue and types of sinks of its own
    making.

    Raises `ConfigurationError` in one line for whatever the operator must mend, and
    `ServerLost` when it ended by itself.
    """
    if not settings.worker.enabled:
        refuse_embedded(settings, "an API without workers")
    stop = asyncio.Event()
    tls = await asyncio.to_thread(_open_tls, settings)
    async with (
        _tracing(settings.tracing) as tracer,
        _wired(settings, catalogue, sink_types) as parts,
        _identifying(settings, parts.keys) as authenticator,
        _auditing(parts) as audit,
    ):
        manager = _manager(parts)
        options = _download_options(settings)
        downloads = Downloads(manager, parts.store, parts.readers, options)
        limits = _caller_limits(settings)
        http = await _open_http(parts, manager, limits, audit, options, authenticator)
        urls = _download_urls(parts, manager, http)
        service = ExportService(
            manager,
            downloads,
            urls,
            tenant=lambda _context: caller().tenant,
            fingerprints=parts.fingerprints,
        )
        server = GrpcServer(
            service, authenticator, _server_limits(settings), limits, audit, tracer
        )
        try:
            port, certificate_port = _listen(server, settings, tls)
        except ConfigurationError:
            if http:
                await http.server.stop(0)
            raise
        await server.start(stop.set)
        enabled = settings.worker.enabled
        worker = _Background(parts, stop, urls, tracer) if enabled else None
        log.info(
            "serving",
            listen=f"{settings.listen.rpartition(':')[0]}:{port}",
            http=http.address if http else "none",
            datasets=len(parts.catalogue.names()),
            workers=settings.worker.concurrency if worker else 0,
            tls="on" if tls else "off: calls can be read on the way",
            identity=_identity(settings),
        )
        if worker:
            # What only an export needs, loaded while the first one is waited for.
            in_daemon_thread(LazyModule("polars").load, "load")
        try:
            yield Running(port, stop, http.port if http else None, certificate_port)
        finally:
            log.info("draining")
            # First of all, so that load balancers send the next call elsewhere.
            await server.announce_shutdown()
            manager.drain()
            stop.set()
            grace = settings.drain_timeout
            await asyncio.gather(
                server.stop(grace),
                *([http.server.stop(grace)] if http else []),
                *([worker.drain(grace)] if worker else []),
            )
            if worker:
                await worker.end()
            log.info("stopped")
        if server.lost:
            # Whoever watches the process is to start it anew.
            raise ServerLost


@contextlib.asynccontextmanager
async def working(
    settings: Settings,
    *,
    catalogue: Catalogue | None = None,
    sink_types: SinkTypes | None = None,
) -> AsyncIterator[asyncio.Event]:
    """Run workers alone, for as long as the context is open; then drain. Gives the event
    that has it end. See `serving`."""
    refuse_embedded(settings, "workers alone")
    stop = asyncio.Event()
    async with (
        _tracing(settings.tracing) as tracer,
        _wired(settings, catalogue, sink_types) as parts,
    ):
        manager = _manager(parts)
        worker = _Background(parts, stop, _download_urls(parts, manager, None), tracer)
        log.info("working", workers=settings.worker.concurrency)
        try:
            yield stop
        finally:
            log.info("draining")
            await worker.drain(settings.drain_timeout)
            await worker.end()
            log.info("stopped")


class _Background:
    """A worker at work. One that ends by itself sets `stop`."""

    def __init__(
        self, parts: _Parts, stop: asyncio.Event, urls: DownloadUrls, tracer: Tracer
    ) -> None:
        self._worker = Worker(
            parts.ledger,
            parts.store,
            parts.catalogue,
            Housekeeping(
                parts.ledger,
                parts.store,
                reap_interval=timedelta(seconds=parts.settings.retention.reap_interval),
                orphan_interval=timedelta(seconds=parts.settings.retention.orphan_interval),
                keep_audit=timedelta(days=parts.settings.audit.retention_days),
            ),
            parts.policy,
            parts.sinks,
            _worker_options(parts.settings),
            links=urls.for_delivery if urls.available else None,
            tracer=tracer,
        )
        self._running = asyncio.create_task(self._worker.run())
        self._running.add_done_callback(lambda _task: stop.set())

    async def drain(self, grace: float) -> None:
        """See `Worker.drain`."""
        await self._worker.drain(grace)

    async def end(self) -> None:
        """Once drained: raises what the worker failed with, if it did."""
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the API and the workers have in common."""

    settings: Settings
    catalogue: Catalogue
    ledger: Ledger
    store: OutputStore
    policy: Policy
    readers: Readers
    sinks: Sinks
    keys: KeyStore
    fingerprints: Fingerprints


@contextlib.asynccontextmanager
async def _wired(
    settings: Settings, catalogue: Catalogue | None, sink_types: SinkTypes | None
) -> AsyncIterator[_Parts]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"data_dir: {settings.data_dir} cannot be made ({error.strerror}); name a "
                "directory that this user may write to"
            ) from None
        if catalogue is None:
            catalogue = await asyncio.to_thread(_open_catalogue, settings)
        stack.callback(catalogue.close)
        ledger = await _open_ledger(settings, SystemClock())
        stack.push_async_callback(ledger.close)
        store = measured(await _open_store(settings))
        stack.push_async_callback(store.close)
        await _claim(ledger, store)
        readers = Readers(ledger)
        stack.push_async_callback(readers.close)
        secret_keys = await asyncio.to_thread(_secret_keys, settings)
        sinks = await asyncio.to_thread(_open_sinks, settings, sink_types, secret_keys)
        stack.push_async_callback(sinks.close)
        metrics.register_sinks(sinks.known())
        metrics_exports.register_datasets(catalogue.names(), Format)
        metrics_service.build_info.labels(version("exportd-server")).set(1)
        await stack.enter_async_context(_measured(settings, ledger, sinks))
        # Reading the catalogue took far more memory than it keeps.
        await asyncio.to_thread(release_free_memory)
        keys = FileKeyStore(settings.data_dir) if is_embedded(settings) else ledger.keys
        yield _Parts(
            settings,
            catalogue,
            ledger,
            store,
            _policy(settings),
            readers,
            sinks,
            keys,
            Fingerprints(secret_keys),
        )


@contextlib.asynccontextmanager
async def key_store(settings: Settings) -> AsyncIterator[KeyStore]:
    """The API keys that servers with these settings accept, whose changes are audited.
    Raises `ConfigurationError`."""
    clock = SystemClock()
    if is_embedded(settings):
        spool = AuditSpool(settings.data_dir)
        yield AuditedKeyStore(FileKeyStore(settings.data_dir), spool.append, clock)
        return
    from exportd_server.jobs.ledger.postgres import (  # noqa: PLC0415 - see above
        open_postgres_ledger,
    )

    ledger = await open_postgres_ledger(ledger_url(settings), connections=1)
    try:
        yield AuditedKeyStore(
            ledger.keys, lambda record: ledger.append_audit([record]), clock
        )
    finally:
        await ledger.close()


@contextlib.asynccontextmanager
async def _tracing(settings: TracingSettings) -> AsyncIterator[Tracer]:
    """What records traces, if the settings say where they go."""
    if not settings.endpoint:
        yield NO_TRACER
        return
    try:
        from exportd_server.platform.otel import (  # noqa: PLC0415 - an extra
            OtelTracer,
        )
    except ModuleNotFoundError as error:
        raise ConfigurationError(NO_TRACING) from error
    tracer = OtelTracer(
        settings.endpoint, settings.sample_ratio, read_headers(settings.headers)
    )
    try:
        yield tracer
    finally:
        await tracer.close(_TRACES_SECONDS)


@contextlib.asynccontextmanager
async def _auditing(parts: _Parts) -> AsyncIterator[AuditLog]:
    """What keeps audit records, those of commands included. When the context closes, what
    waits is kept, or counted as lost."""
    audit = AuditLog(parts.ledger, SystemClock())
    moving: asyncio.Task[None] | None = None
    if is_embedded(parts.settings):
        spool = AuditSpool(parts.settings.data_dir)
        moving = asyncio.create_task(spool.run(parts.ledger))
    try:
        yield audit
    finally:
        if moving is not None:
            moving.cancel()
            await asyncio.wait({moving})
        await audit.close(_AUDIT_SECONDS)


@contextlib.asynccontextmanager
async def _identifying(settings: Settings, keys: KeyStore) -> AsyncIterator[Authenticator]:
    """What finds out who calls, kept up to date for as long as the context is open."""
    identity = settings.identity
    async with contextlib.AsyncExitStack() as stack:
        ring = tokens = callers = None
        if identity.api_keys:
            ring = KeyRing(keys, SystemClock())
            stack.push_async_callback(ring.close)
            await ring.start()
        if identity.jwt.issuer:
            tokens = await _open_tokens(identity.jwt, stack)
        if identity.mtls:
            from exportd_server.identity.certificates import (  # noqa: PLC0415 - see above
                CertificateCallers,
            )

            callers = CertificateCallers(certificate_callers(identity), SystemClock())
        yield Authenticator(ring, tokens, callers)


async def _open_tokens(jwt: JwtSettings, stack: contextlib.AsyncExitStack) -> TokenVerifier:
    # Its libraries take a while to load, and most do without.
    from exportd_server.identity.jwks import (  # noqa: PLC0415 - see above
        FileSource,
        KeySet,
        KeySetUnusable,
        UrlSource,
    )
    from exportd_server.identity.tokens import (  # noqa: PLC0415 - see above
        TokenOptions,
        TokenVerifier,
    )

    url = jwt.jwks_url.get_secret_value()
    source = FileSource(jwt.jwks_file) if jwt.jwks_file else UrlSource(url)
    keys = KeySet(source, jwt.algorithms, refresh=jwt.refresh_seconds)
    stack.push_async_callback(keys.close)
    try:
        await keys.start()
    except KeySetUnusable as error:
        if jwt.jwks_file:
            raise ConfigurationError(
                f"identity.jwt.jwks_file: {jwt.jwks_file} {error}"
            ) from error
        # Somebody else's server: callers with other credentials need not wait for it.
        log.error("keys of tokens cannot be had so far; no token works", error=str(error))  # noqa: TRY400 - its text tells all
    options = TokenOptions(
        issuer=jwt.issuer,
        audience=jwt.audience,
        algorithms=jwt.algorithms,
        tenant_claim=jwt.tenant_claim,
        scopes_claim=jwt.scopes_claim,
        leeway=jwt.leeway_seconds,
        require_nbf=jwt.require_nbf,
    )
    return TokenVerifier(options, keys)


def certificate_callers(
    identity: IdentitySettings,
) -> dict[CertificateName, tuple[str, list[Scope]]]:
    """Whom names in certificates stand for. Raises `ConfigurationError`."""
    from exportd_server.identity.certificates import (  # noqa: PLC0415 - see above
        CertificateName,
    )

    callers: dict[CertificateName, tuple[str, list[Scope]]] = {}
    for each in identity.mtls:
        ((kind, text),) = (
            (kind, text)
            for kind, text in (("cn", each.cn), ("dns", each.dns), ("uri", each.uri))
            if text
        )
        name = CertificateName(kind, text)
        if name in callers:
            raise ConfigurationError(f"identity.mtls: {name} is there twice")
        callers[name] = each.tenant, [Scope(scope) for scope in each.scopes]
    return callers


def _open_tls(settings: Settings) -> ServerTls | None:
    tls = settings.tls
    if tls.cert_file is None or tls.key_file is None:
        return None
    from exportd_server.api.tls import ServerTls, TlsFiles  # noqa: PLC0415 - see above

    return ServerTls(TlsFiles(tls.cert_file, tls.key_file, tls.client_ca_file))


def _listen(
    server: GrpcServer, settings: Settings, tls: ServerTls | None
) -> tuple[int, int | None]:
    """Take the ports: the one of all callers, and that of those with a certificate."""

    def take(key: str, address: str, *, certificates: bool) -> int:
        credentials = None
        if tls is not None:
            credentials = tls.credentials(require_client_cert=certificates)
        try:
            return server.listen(address, credentials)
        except OSError as error:
            raise ConfigurationError(
                f"{key}: {error}; is another server on that port?"
            ) from None

    port = take("listen", settings.listen, certificates=settings.tls.require_client_cert)
    second = settings.tls.client_cert_listen
    if not second:
        return port, None
    return port, take("tls.client_cert_listen", second, certificates=True)


def _identity(settings: Settings) -> str:
    """For the log."""
    identity = settings.identity
    ways = {
        "API keys": identity.api_keys,
        f"tokens of {identity.jwt.issuer}": bool(identity.jwt.issuer),
        "client certificates": bool(identity.mtls),
    }
    open_ = ", ".join(way for way, is_open in ways.items() if is_open)
    return open_ or "none: every caller may do everything"


def _manager(parts: _Parts) -> JobManager:
    return JobManager(
        parts.ledger, parts.catalogue, parts.policy, parts.readers, parts.sinks
    )


def _open_sinks(
    settings: Settings, types: SinkTypes | None, secret_keys: Sequence[bytes]
) -> Sinks:
    types = types or SinkTypes.installed()
    connections = (
        Connections()
        if settings.sinks is None
        else load_connections(settings.sinks, types, identified=settings.identity.required)
    )
    return Sinks(types, connections, Sealer(secret_keys) if secret_keys else None)


def _secret_keys(settings: Settings) -> list[bytes]:
    """What secrets of callers are kept under, the first of them from now on. None at all
    for a fleet without a setting: its processes could not read each other's."""
    keys = [key.get_secret_value().encode() for key in settings.delivery.secret_keys]
    if not is_embedded(settings):
        return keys
    # What was kept before the setting was made stays readable for as long as the file
    # is there.
    if not keys or (settings.data_dir / KEPT_SECRETS).exists():
        try:
            keys.append(kept_key(settings.data_dir, KEPT_SECRETS))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"data_dir: {error}") from None
    return keys


@contextlib.asynccontextmanager
async def _measured(
    settings: Settings, ledger: Ledger, sinks: Sinks
) -> AsyncIterator[None]:
    """Serve the metrics, if the settings say where."""
    if not settings.metrics.listen:
        yield
        return
    # Its library takes a while to load, and many do without.
    from exportd_server.api.http import HttpServer  # noqa: PLC0415 - see above
    from exportd_server.api.http_metrics import (  # noqa: PLC0415 - see above
        MOST_CONNECTIONS,
        add_metrics,
    )

    host, port = host_and_port("metrics.listen", settings.metrics.listen)
    server = HttpServer(add_metrics, max_connections=MOST_CONNECTIONS)
    try:
        await server.start(host, port)
    except OSError as error:
        raise ConfigurationError(
            f"metrics.listen: {error}; is another server on that port?"
        ) from None
    measuring = asyncio.create_task(
        Measuring(ledger, sinks.known(), _places(settings)).run()
    )
    try:
        yield
    finally:
        measuring.cancel()
        await asyncio.wait({measuring})
        await server.stop(_METRICS_SECONDS)


def _places(settings: Settings) -> dict[str, Path]:
    """Where files are kept, by their names in the metrics."""
    store = outputs(settings)
    return {"data": settings.data_dir} | (
        {"store": store} if isinstance(store, Path) else {}
    )


async def _claim(ledger: Ledger, store: OutputStore) -> None:
    """Make sure that no other ledger keeps its outputs here: each would sweep those of
    the other away."""
    try:
        mine = await ledger.identity()
    except LedgerUnavailable as error:
        raise ConfigurationError(
            "ledger: it has answered and does so no longer; look after its database "
            "(ledger.url) or, embedded, the disk of data_dir, and start this process again"
        ) from error
    try:
        holder = await store.claim(mine)
    except StoreFailed as error:
        if error.retryable:
            raise ConfigurationError(
                "store.url: the output store does not answer; correct it, or start it"
            ) from error
        # It is full, which must not keep the server from starting: it frees room.
        log.warning("the output store is full and does not say whose it is")
        return
    if holder != mine:
        raise ConfigurationError(
            f"store.url: the outputs there belong to another ledger ({holder}; this one is "
            f"{mine}); name another directory or prefix for this ledger's, or, if that "
            "ledger is gone for good, delete the file or object `.owner` there: what it "
            "left is deleted then"
        )


@dataclass(frozen=True, slots=True)
class _Http:
    """The HTTP port, listening."""

    server: HttpServer
    port: int
    address: str
    keys: LinkKeys


async def _open_http(
    parts: _Parts,
    manager: JobManager,
    limits: CallerLimits,
    audit: AuditLog,
    options: DownloadOptions,
    authenticator: Authenticator,
) -> _Http | None:
    settings = parts.settings
    if not settings.http.listen:
        return None
    from exportd_server.api.http import HttpServer  # noqa: PLC0415 - see above
    from exportd_server.api.http_audit import HttpAudit  # noqa: PLC0415 - see above
    from exportd_server.api.http_download import (  # noqa: PLC0415 - see above
        HttpDownloads,
    )

    host, port = host_and_port("http.listen", settings.http.listen)
    secrets = await asyncio.to_thread(_http_keys, settings)
    keys = LinkKeys(secrets)
    downloads = HttpDownloads(
        manager,
        parts.store,
        parts.readers,
        keys,
        options,
        SystemClock(),
        limits,
    )
    routes: list[AddRoutes] = [HttpAudit(audit).add_to, downloads.add_routes]
    max_form = 0
    if settings.http.console:
        from exportd_server.api.console.reading import (  # noqa: PLC0415 - see above
            MOST_FORM,
        )

        routes.append(_console(settings, manager, limits, audit, authenticator, secrets))
        max_form = MOST_FORM
    server = HttpServer(
        *routes,
        max_connections=settings.limits.max_http_connections,
        max_form=max_form,
    )
    try:
        port = await server.start(host, port)
    except OSError as error:
        raise ConfigurationError(
            f"http.listen: {error}; is another server on that port?"
        ) from None
    host_text = settings.http.listen.rpartition(":")[0]
    return _Http(server, port, f"{host_text}:{port}", keys)


def _console(
    settings: Settings,
    manager: JobManager,
    limits: CallerLimits,
    audit: AuditLog,
    authenticator: Authenticator,
    keys: Sequence[bytes],
) -> AddRoutes:
    # Its library takes a while to load, and most do without.
    from exportd_server.api.console.routes import (  # noqa: PLC0415 - see above
        Console,
        ConsoleOptions,
    )

    options = ConsoleOptions(
        settings.http.public_url or f"http://{settings.http.listen}",
        keys,
        timedelta(seconds=settings.http.console_session),
    )
    return Console(manager, authenticator, limits, audit, options, SystemClock()).add_routes


def _http_keys(settings: Settings) -> list[bytes]:
    """What signs download URLs, and seals what the console gives to browsers."""
    given = settings.http.signing_keys
    if given:
        return [key.get_secret_value().encode() for key in given]
    if not is_embedded(settings):
        raise ConfigurationError(
            "http.signing_keys: the processes of a fleet must accept each other's URLs; "
            "give all of them the same key, such as `openssl rand -base64 32` makes"
        )
    try:
        return [kept_key(settings.data_dir, KEPT_LINK_KEY)]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"data_dir: {error}") from None


def _download_urls(parts: _Parts, manager: JobManager, http: _Http | None) -> DownloadUrls:
    settings, links = parts.settings, None
    base = settings.http.public_url or (f"http://{http.address}" if http else "")
    if http is not None:
        links = HttpLinks(base, http.keys)
    elif base and settings.http.signing_keys:
        # Another process has the port, and accepts what the same keys have signed.
        links = HttpLinks(base, LinkKeys(_http_keys(settings)))
    return DownloadUrls(
        manager,
        SystemClock(),
        UrlOptions(
            timedelta(seconds=settings.download.url_lifetime),
            timedelta(seconds=settings.download.max_url_lifetime),
        ),
        signer=parts.store if isinstance(parts.store, UrlSigner) else None,
        links=links,
    )


def _download_options(settings: Settings) -> DownloadOptions:
    download = settings.download
    return DownloadOptions(
        ChunkMemory(download.chunk_bytes, download.bytes_in_flight), download.stall_timeout
    )


def migrate(settings: Settings) -> tuple[str | None, str]:
    """Bring the ledger's tables up to date; blocks. Returns their version before, None
    when there were none, and now. Raises `ConfigurationError`."""
    if is_embedded(settings):
        raise ConfigurationError(
            "ledger.url: the embedded ledger is brought up to date when it is opened; "
            "migrate is for EXPORTD_LEDGER__URL=postgresql://..."
        )
    from exportd_server.jobs.ledger.postgres import (  # noqa: PLC0415 - see above
        migrate_postgres_ledger,
    )

    return migrate_postgres_ledger(ledger_url(settings))


async def _open_ledger(settings: Settings, clock: Clock) -> SqlLedger:
    if not is_embedded(settings):
        from exportd_server.jobs.ledger.postgres import (  # noqa: PLC0415 - see above
            open_postgres_ledger,
        )

        return await open_postgres_ledger(
            ledger_url(settings),
            max_attempts=settings.worker.max_attempts,
            connections=settings.ledger.connections,
        )
    return await open_sqlite_ledger(
        ledger_file(settings), clock, max_attempts=settings.worker.max_attempts
    )


async def _open_store(settings: Settings) -> OutputStore:
    place = outputs(settings)
    if isinstance(place, Path):
        return LocalStore(place)
    # Its SDK takes a while to load, and most do without.
    from exportd_server.store.s3 import S3Store  # noqa: PLC0415 - see above

    return await S3Store.connect(place)


def _open_catalogue(settings: Settings) -> Catalogue:
    return load_catalogue(settings.catalogue or sample_catalogue(settings))


def _server_limits(settings: Settings) -> ServerLimits:
    limits = settings.limits
    return ServerLimits(
        max_calls=limits.max_calls,
        max_connections=limits.max_connections,
        max_request_bytes=limits.max_request_bytes,
        request_timeout=limits.request_timeout,
        max_open_seconds=limits.max_open_seconds,
        max_streams_per_connection=limits.max_streams_per_connection,
        ping_interval=limits.ping_seconds,
        ping_timeout=limits.ping_timeout,
        min_ping_interval=limits.min_ping_seconds,
        max_ping_strikes=limits.max_ping_strikes,
        max_idle=limits.max_idle_seconds,
        max_age=limits.max_age_seconds,
    )


def _caller_limits(settings: Settings) -> CallerLimits:
    limits = settings.limits
    rate = limits.requests_per_second
    return CallerLimits(
        rates=None if rate is None else RequestRates(rate, limits.request_burst),
        calls=Slots(
            "calls",
            limits.max_calls_per_tenant or max(1, limits.max_calls // 2),
            limits.max_calls,
        ),
        watches=Slots(
            "watches",
            limits.max_watches_per_tenant,
            limits.max_watches,
            metrics_service.watches_open,
        ),
        downloads=Slots(
            "downloads",
            limits.max_downloads_per_tenant,
            limits.max_downloads,
            metrics_service.downloads_open,
        ),
        stall_timeout=settings.download.stall_timeout,
    )


def _policy(settings: Settings) -> Policy:
    return Policy(
        default_ttl=timedelta(seconds=settings.retention.ttl),
        max_ttl=timedelta(seconds=settings.retention.max_ttl),
        text_part_bytes=settings.parts.text_bytes,
        parquet_part_bytes=settings.parts.parquet_bytes,
        max_active_jobs=settings.limits.max_active_jobs,
        max_rows=settings.limits.max_rows,
        max_bytes=settings.limits.max_bytes,
        max_queued_jobs=settings.limits.max_queued_jobs,
        max_seconds=settings.limits.max_seconds,
    )


def _worker_options(settings: Settings) -> WorkerOptions:
    return WorkerOptions(
        concurrency=settings.worker.concurrency,
        lease=settings.worker.lease,
        poll=settings.worker.poll,
        deliveries=settings.delivery.concurrency,
        running_per_tenant=settings.worker.running_per_tenant,
        export=ExportOptions(
            shard_rows=settings.worker.shard_rows,
            max_bytes_in_flight=settings.worker.bytes_in_flight,
            source_timeout=settings.worker.source_timeout,
            block_timeout=settings.delivery.block_timeout,
        ),
    )
