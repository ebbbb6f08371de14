"""What the blocking and the asyncio job handles have in common."""

from __future__ import annotations

from exportd._deliveries import DeliveryStatus
from exportd._model import JobInfo, JobState, Manifest, Progress
from exportd.errors import JobFailed


class JobHandle:
    """A job as last seen. The methods that ask the server update it."""

    def __init__(self, info: JobInfo) -> None:
        self._info = info

    @property
    def info(self) -> JobInfo:
        """Everything the server told, as one value."""
        return self._info

    @property
    def id(self) -> str:
        """The job's id; empty after `validate_only`."""
        return self._info.id

    @property
    def state(self) -> JobState:
        """Where it stands."""
        return self._info.state

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self._info.progress

    @property
    def manifest(self) -> Manifest | None:
        """What there is to download; None unless it succeeded, and in listings."""
        return self._info.manifest

    @property
    def row_errors(self) -> int:
        """Rows left out because they cannot be exported, with `on_row_error="skip"`."""
        return self._info.progress.row_errors

    @property
    def error(self) -> JobFailed | None:
        """Why it failed; None unless it did."""
        return self._info.error

    @property
    def delivery_status(self) -> DeliveryStatus | None:
        """How its delivery to all sinks stands; None when it has none. `info.deliveries`
        tells it of each sink."""
        return self._info.delivery_status

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id or '(not recorded)'} {self.state}>"
