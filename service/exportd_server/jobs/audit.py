"""Who did what to which job: the records that an auditor reads.

A call that is audited has an `Entry`. Whatever serves the call notes there what it learns,
wherever it is; without an entry, noting does nothing.
"""

from __future__ import annotations

import asyncio
import enum
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import uuid_utils

from exportd_server.errors import Code, ErrorReason, ExportdError
from exportd_server.identity.base import Principal
from exportd_server.jobs.model import Job
from exportd_server.platform.clock import Clock

OK = "OK"

BY_URL = "url"
"""How somebody was recognised who came with a signed download URL."""
OPERATOR = "operator"
"""Likewise somebody with a shell on a machine of the service."""

_MOST_TEXT = 200
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MOST_NAMES = 20

_OURS = frozenset({Code.INTERNAL.name, Code.UNAVAILABLE.name})
"""Failures that are not the caller's doing."""


class AuditMethod(enum.StrEnum):
    """What is audited: calls by their names in the contract, and what is no call."""

    CREATE_EXPORT = "CreateExport"
    CANCEL_JOB = "CancelJob"
    DELETE_JOB = "DeleteJob"
    STREAM_DOWNLOAD = "StreamDownload"
    GET_DOWNLOAD_URLS = "GetDownloadUrls"
    DOWNLOAD_BY_URL = "DownloadByUrl"
    """A request to the HTTP port by a URL of GetDownloadUrls."""
    REDRIVE_DELIVERIES = "RedriveDeliveries"
    ENABLE_SINK_QUEUE = "EnableSinkQueue"
    CREATE_API_KEY = "CreateApiKey"
    """`exportd-server keys create`."""
    REVOKE_API_KEY = "RevokeApiKey"
    """`exportd-server keys revoke`."""


class AuditOutcome(enum.StrEnum):
    """How it ended."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    """Refused or failed before anything was sent."""
    BROKEN_OFF = "BROKEN_OFF"
    """A download that began and did not get to its end."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One operation that has ended, at `time`. Texts that came from outside are clipped
    and have no characters that are not printable. An empty text and None: not known, or
    not of this kind of operation.

    `tenant` and `subject` are the caller's own, whatever was asked for; both are empty for
    one that nobody knows. `identity` is a `Method` of identity, `BY_URL` or `OPERATOR`.
    `code` is the canonical code's name, `OK` included. `bytes_sent` counts whole chunks.
    """

    record_id: str
    time: datetime
    duration: timedelta
    method: AuditMethod
    outcome: AuditOutcome
    code: str
    reason: str = ""
    tenant: str = ""
    subject: str = ""
    identity: str = ""
    peer: str = ""
    job_id: str = ""
    dataset: str = ""
    part: int | None = None
    error_part: int | None = None
    sinks: tuple[str, ...] = ()
    queue: str = ""
    delivery_id: str = ""
    key_id: str = ""
    validate_only: bool = False
    bytes_sent: int | None = None

    @property
    def refused(self) -> bool:
        """Whether it came to nothing because of the caller, who may have any number of
        such."""
        return self.outcome is AuditOutcome.FAILED and self.code not in _OURS


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """Conditions on records that must all hold; empty ones hold always."""

    tenant: str = ""
    subject: str = ""
    job_id: str = ""
    methods: frozenset[AuditMethod] = frozenset()
    outcomes: frozenset[AuditOutcome] = frozenset()
    from_time: datetime | None = None
    before_time: datetime | None = None


class Ending(NamedTuple):
    """How an operation ended: the canonical code's name, and the reason."""

    code: str
    reason: str = ""


ENDED_WELL = Ending(OK)


def ending_of(error: BaseException) -> Ending:
    """How an operation ended that raised this."""
    if isinstance(error, ExportdError):
        return Ending(error.code.name, error.reason.value)
    if isinstance(error, asyncio.CancelledError):
        # The caller has gone, or the server goes.
        return Ending(Code.CANCELLED.name)
    return Ending(Code.INTERNAL.name, ErrorReason.INTERNAL.value)


def new_record_id() -> str:
    """An id that sorts by the time it was made at."""
    return str(uuid_utils.uuid7())


def printable(text: str, most: int = _MOST_TEXT) -> str:
    """The text as it may stand in a log, on a terminal and in any database: what is not
    printable is escaped, and what is too long is cut."""
    # Only as much as can be kept is looked at: callers send megabytes.
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]
    )
    return shown if len(text) <= most and len(shown) <= most else shown[: most - 1] + "…"


def uuid_or_nothing(text: str) -> str:
    """The UUID in its canonical form. What is none may be anything, a secret that went
    into the wrong field for one, and is left out."""
    # Only as much as can be one is looked at, as above.
    canonical = text[:64].lower()
    return canonical if _UUID.fullmatch(canonical) else ""


def printable_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names, each printable; the last one is `…` when there are more."""
    shown = tuple(printable(name, 64) for name in names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else (*shown, "…")


@dataclass(slots=True)
class Entry:
    """What is known so far of an operation that is under way; see `AuditRecord`."""

    method: AuditMethod
    peer: str
    tenant: str = ""
    subject: str = ""
    identity: str = ""
    job_id: str = ""
    dataset: str = ""
    part: int | None = None
    error_part: int | None = None
    sinks: tuple[str, ...] = ()
    queue: str = ""
    delivery_id: str = ""
    key_id: str = ""
    validate_only: bool = False
    bytes_sent: int | None = None
    ending: Ending | None = None
    """How it ended, where that is not what its caller got to see."""

    def by(self, principal: Principal) -> None:
        """Note who does it."""
        self.tenant = principal.tenant
        self.subject = principal.subject
        self.identity = principal.method.value

    def record(self, ending: Ending, now: datetime, duration: timedelta) -> AuditRecord:
        """The record of the operation, which has ended so, unless `ending` of the entry
        knows better."""
        ending = self.ending or ending
        if ending.code == OK:
            outcome = AuditOutcome.SUCCEEDED
        elif self.bytes_sent is None:
            outcome = AuditOutcome.FAILED
        else:
            outcome = AuditOutcome.BROKEN_OFF
        return AuditRecord(
            record_id=new_record_id(),
            time=now,
            duration=duration,
            method=self.method,
            outcome=outcome,
            code=ending.code,
            reason=printable(ending.reason),
            tenant=printable(self.tenant),
            subject=printable(self.subject),
            identity=self.identity,
            peer=printable(self.peer),
            job_id=self.job_id,
            dataset=printable(self.dataset),
            part=self.part,
            error_part=self.error_part,
            sinks=printable_names(self.sinks),
            queue=printable(self.queue, 300),
            delivery_id=self.delivery_id,
            key_id=printable(self.key_id),
            validate_only=self.validate_only,
            bytes_sent=self.bytes_sent,
        )


_entry: ContextVar[Entry | None] = ContextVar("audit_entry", default=None)


def current() -> Entry | None:
    """The entry of the operation that is under way, if it is audited."""
    return _entry.get()


@contextmanager
def under(entry: Entry) -> Iterator[None]:
    """Make it the current entry."""
    token = _entry.set(entry)
    try:
        yield
    finally:
        _entry.reset(token)


@contextmanager
def auditing(
    entry: Entry,
    clock: Clock,
    keep: Callable[[AuditRecord], None],
    classify: Callable[[BaseException], Ending] = ending_of,
) -> Iterator[None]:
    """Leave one record of what is done in this context, however it ends. `classify` says
    how by the exception that ends it."""
    started = time.monotonic()
    ending = ENDED_WELL
    try:
        with under(entry):
            yield
    except BaseException as error:
        ending = classify(error)
        raise
    finally:
        duration = timedelta(seconds=time.monotonic() - started)
        keep(entry.record(ending, clock.now(), duration))


def note_job(job: Job) -> None:
    """The operation is about this job, which the caller may know of."""
    entry = _entry.get()
    if entry is None:
        return
    entry.job_id = job.job_id
    entry.dataset = job.spec.dataset
    if entry.method is AuditMethod.CREATE_EXPORT:
        entry.sinks = tuple(sink.name for sink in job.spec.sinks)


def note_sent(size: int) -> None:
    """So many more bytes went out; 0 when the answer begins."""
    entry = _entry.get()
    if entry is not None:
        entry.bytes_sent = (entry.bytes_sent or 0) + size
