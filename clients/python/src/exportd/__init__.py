"""Client of exportd, the dataset export service.

    from exportd import Client

    with Client("localhost:50051") as client:
        job = client.export("token_transfers", format="parquet")
        job.wait().download("transfers.parquet")

`sinks=[to_file("reports"), ...]` has an export delivered, too.
`AsyncClient` has the same shape for asyncio. Errors are in `exportd.errors`, the
generated contract in `exportd.v1`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from exportd._audit import AuditOutcome, AuditRecord
from exportd._client import Client, Job
from exportd._connection import SERVICE_CONFIG, Retry, tls_from_files
from exportd._deliveries import (
    Delivery,
    DeliveryState,
    DeliveryStatus,
    SinkDelivery,
    SinkQueue,
)
from exportd._model import (
    CancelOutcome,
    Column,
    Dataset,
    DownloadUrl,
    DownloadUrls,
    ErrorPart,
    JobInfo,
    JobState,
    Manifest,
    Part,
    Progress,
)
from exportd._request import ExportOptions, Filter, FilterLike
from exportd._sinks import (
    Sink,
    SinkLike,
    to_database,
    to_file,
    to_plugin,
    to_s3,
    to_webhook,
)
from exportd.errors import ExportdError

if TYPE_CHECKING:
    from exportd._aio import AsyncClient, AsyncJob
    from exportd._download import Download, DownloadProgress

__all__ = [
    "SERVICE_CONFIG",
    "AsyncClient",
    "AsyncJob",
    "AuditOutcome",
    "AuditRecord",
    "CancelOutcome",
    "Client",
    "Column",
    "Dataset",
    "Delivery",
    "DeliveryState",
    "DeliveryStatus",
    "Download",
    "DownloadProgress",
    "DownloadUrl",
    "DownloadUrls",
    "ErrorPart",
    "ExportOptions",
    "ExportdError",
    "Filter",
    "FilterLike",
    "Job",
    "JobInfo",
    "JobState",
    "Manifest",
    "Part",
    "Progress",
    "Retry",
    "Sink",
    "SinkDelivery",
    "SinkLike",
    "SinkQueue",
    "tls_from_files",
    "to_database",
    "to_file",
    "to_plugin",
    "to_s3",
    "to_webhook",
]

_LATER = {
    "AsyncClient": "exportd._aio",
    "AsyncJob": "exportd._aio",
    "Download": "exportd._download",
    "DownloadProgress": "exportd._download",
}
"""What not every program needs is loaded when it is first asked for: it would be a fifth
of what the import takes."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
