"""Domain values to column values and back, without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from pydantic import TypeAdapter

from exportd_server.errors import ErrorRecord
from exportd_server.jobs.model import ExportSpec, ManifestColumn

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_KEPT = 256
"""How many texts of a kind are kept with what they say, of at most `_KEPT_LENGTH`
characters each: together a few MiB."""
_KEPT_LENGTH = 4096

_SPEC = TypeAdapter(ExportSpec)
_ERROR = TypeAdapter(ErrorRecord)
_COLUMNS = TypeAdapter(tuple[ManifestColumn, ...])


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 of an aware moment."""
    return (moment - _EPOCH) // _MICROSECOND


def to_moment(micros: int) -> datetime:
    """The moment, in UTC."""
    return _EPOCH + timedelta(microseconds=micros)


def to_moment_or_none(micros: int | None) -> datetime | None:
    """The moment, in UTC, if there is one."""
    return None if micros is None else to_moment(micros)


def span_to_micros(span: timedelta) -> int:
    """Whole microseconds."""
    return span // _MICROSECOND


def dump_spec(spec: ExportSpec) -> str:
    """JSON text of a request."""
    return _SPEC.dump_json(spec).decode()


def load_spec(text: str) -> ExportSpec:
    """A request from its JSON text. It is shared, like all that cannot be changed."""
    return _kept_spec(text) if len(text) <= _KEPT_LENGTH else _load_spec(text)


def _load_spec(text: str) -> ExportSpec:
    spec = _SPEC.validate_json(text)
    # The parser brings a time zone class of its own.
    return replace(spec, start_time=_utc(spec.start_time), end_time=_utc(spec.end_time))


def dump_error(error: ErrorRecord) -> str:
    """JSON text of an error."""
    return _ERROR.dump_json(error).decode()


def load_error(text: str | None) -> ErrorRecord | None:
    """An error from its JSON text, if there is one."""
    return None if text is None else _ERROR.validate_json(text)


def dump_columns(columns: Sequence[ManifestColumn]) -> str:
    """JSON text of a manifest's columns."""
    return _COLUMNS.dump_json(tuple(columns)).decode()


def load_columns(text: str | None) -> tuple[ManifestColumn, ...]:
    """A manifest's columns from their JSON text; none before the plan."""
    if text is None:
        return ()
    return _kept_columns(text) if len(text) <= _KEPT_LENGTH else _load_columns(text)


def _load_columns(text: str) -> tuple[ManifestColumn, ...]:
    return _COLUMNS.validate_json(text)


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.astimezone(UTC)


# Who watches a job reads the same texts again and again.
_kept_spec = lru_cache(_KEPT)(_load_spec)
_kept_columns = lru_cache(_KEPT)(_load_columns)
