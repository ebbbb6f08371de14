"""What exportd counts of calls, downloads, the output store, the ledger and the process.

Those of gRPC have the names and labels that go-grpc-prometheus made known, so that
dashboards and alerts for any gRPC service fit.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, ProcessCollector

from exportd_server.platform.metrics import REGISTRY

_METHOD = ("grpc_type", "grpc_service", "grpc_method")

started = Counter(
    "grpc_server_started",
    "Calls that began. Methods that are not served are `unknown`.",
    _METHOD,
    registry=REGISTRY,
)
handled = Counter(
    "grpc_server_handled",
    "Calls that ended, streams among them, by the code they ended with. One that has a "
    "single answer ends when that is made, whether or not it still reaches its caller.",
    (*_METHOD, "grpc_code"),
    registry=REGISTRY,
)
handling_seconds = Histogram(
    "grpc_server_handling_seconds",
    "How long calls took, streams to their end.",
    _METHOD,
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 600),
    registry=REGISTRY,
)

watches_open = Gauge(
    "exportd_watches_open",
    "Calls of WatchJob that are under way.",
    registry=REGISTRY,
)
downloads_open = Gauge(
    "exportd_downloads_open",
    "Downloads that are under way, over gRPC and HTTP. Those from S3 by URL are not seen.",
    registry=REGISTRY,
)
download_bytes = Counter(
    "exportd_download_bytes",
    "Bytes of outputs that were sent to callers, by how: grpc, http. Those from S3 by URL "
    "are not seen.",
    ("via",),
    registry=REGISTRY,
)
grpc_bytes, http_bytes = map(download_bytes.labels, ("grpc", "http"))

store_operations = Counter(
    "exportd_store_operations",
    "Operations of the output store by what they came to: ok, missing, full, failed. "
    "`write` and `read` are all of a part's together; the other parts of a writer's life "
    "are `create` and `finalize`.",
    ("operation", "outcome"),
    registry=REGISTRY,
)
store_seconds = Histogram(
    "exportd_store_operation_seconds",
    "How long operations of the output store took, those that failed included.",
    ("operation",),
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300),
    registry=REGISTRY,
)
uploads_open = Gauge(
    "exportd_store_uploads_open",
    "Parts that this process is writing to the output store; the first of an export from "
    "when its source is asked for rows.",
    registry=REGISTRY,
)

ledger_up = Gauge(
    "exportd_ledger_up",
    "1 when the ledger answered this process the last time it was asked how it stands, "
    "every few seconds; else 0.",
    registry=REGISTRY,
)
ledger_errors = Counter(
    "exportd_ledger_errors",
    "Transactions that the ledger could not do: out of reach, restarting, its disk full.",
    registry=REGISTRY,
)
audit_waiting = Gauge(
    "exportd_audit_waiting",
    "Audit records that wait to be kept in the ledger: 0.1 s each, or until it is back.",
    registry=REGISTRY,
)

disk_free_bytes = Gauge(
    "exportd_disk_free_bytes",
    "Bytes that this user may yet write where this process keeps files: `data` is "
    "data_dir, `store` a local output store.",
    ("place",),
    registry=REGISTRY,
)
disk_size_bytes = Gauge(
    "exportd_disk_size_bytes",
    "Size of the file systems of exportd_disk_free_bytes.",
    ("place",),
    registry=REGISTRY,
)
tls_not_after = Gauge(
    "exportd_tls_not_after_timestamp_seconds",
    "Until when the certificates of the gRPC port are valid, the first of the chain to "
    "end, in seconds since 1970; 0 without TLS.",
    registry=REGISTRY,
)
build_info = Gauge(
    "exportd_build_info",
    "1, with the release that runs.",
    ("version",),
    registry=REGISTRY,
)
ProcessCollector(registry=REGISTRY)

OPERATIONS = (
    *("create", "write", "finalize", "open", "read", "size", "delete", "delete_job"),
    *("list_job", "list_jobs", "sweep_unfinished", "claim", "signed_url"),
)
STORE_OUTCOMES = ("ok", "missing", "full", "failed")

for _operation in OPERATIONS:
    store_seconds.labels(_operation)
    for _outcome in STORE_OUTCOMES:
        store_operations.labels(_operation, _outcome)
