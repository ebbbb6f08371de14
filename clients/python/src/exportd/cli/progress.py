"""Progress on stderr: a live line on a terminal, now and then a plain one elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from exportd._download import DownloadProgress
from exportd._model import JobInfo, JobState
from exportd.cli.show import note, progress_text, size_text

_PLAIN_EVERY = 5.0  # seconds between plain lines
_BAR = 20  # cells
_BESIDE = _BAR + 8 + 3  # with the time left, and a blank between each two columns
_SHORT_NAME = 12  # cells that a long name keeps; then the details give way


def _one_line() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")


def fit(name: str, words: str, room: int) -> tuple[str, str]:
    """Both within so many cells: the name gives way first, then the words."""
    name = _shortened(name, max(room - cell_len(words), _SHORT_NAME))
    return name, _shortened(words, max(room - cell_len(name), 1))


def _shortened(text: str, width: int) -> str:
    shown = Text(text)
    shown.truncate(width, overflow="ellipsis")
    return shown.plain


class _Words(ProgressColumn):
    """What the task says of itself."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("words", "")))


class Reporter:
    """Shows how jobs and downloads go; silent when told so."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = ""
        self._last_time = float("-inf")
        self._begun: tuple[float, int] | None = None
        self._state: JobState | None = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            self._live = Progress(
                TextColumn("{task.description}", markup=False, table_column=_one_line()),
                BarColumn(bar_width=_BAR, table_column=_one_line()),
                _Words(table_column=_one_line()),
                TimeRemainingColumn(table_column=_one_line()),
                console=Console(stderr=True),
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def job(self, job: JobInfo) -> None:
        """A job has moved."""
        fraction = 1.0 if job.state is JobState.SUCCEEDED else job.progress.fraction
        self._show(
            job.dataset,
            progress_text(job),
            None if fraction is None else int(fraction * 1000),
            None if fraction is None else 1000,
            # Its end is told at once; what follows are deliveries, and their end.
            urgent=job.settled or (job.state.final and job.state is not self._state),
        )
        self._state = job.state

    def download(self, progress: DownloadProgress) -> None:
        """A download has moved."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, progress.done)
        since, before = self._begun
        words = size_text(progress.done)
        if progress.total is not None:
            words += f" of {size_text(progress.total)}"
        if now - since > 0.5:
            words += f", {size_text((progress.done - before) / (now - since))}/s"
        self._show(
            progress.file_name,
            words,
            progress.done,
            progress.total,
            urgent=progress.done == progress.total,
        )

    def _show(
        self, name: str, words: str, done: int | None, total: int | None, *, urgent: bool
    ) -> None:
        if self._quiet:
            return
        if self._live is not None:
            name, words = fit(name, words, self._live.console.width - _BESIDE)
            if self._task is None:
                self._task = self._live.add_task(name, total=total)
            self._live.update(
                self._task, description=name, completed=done or 0, total=total, words=words
            )
            return
        now = time.monotonic()
        line = f"{name}: {words}"
        if line != self._last_line and (urgent or now - self._last_time >= _PLAIN_EVERY):
            self._last_line, self._last_time = line, now
            note(line)
