"""What the streams of all sources share: batches of a fair size, and a stop that works.

Nothing here knows where batches come from.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pat

from exportd_server.errors import SourceFailed, ValueNotEncodable

BATCH_ROWS = 65_536
"""Most rows in a batch: 65 k to 262 k cost least, and smaller ones hold less memory."""

BATCH_BYTES = 4 * 2**20
"""A batch that has reached this many bytes takes no more rows."""

UNCOPIED_BYTES = 2**20
"""A batch of this many bytes goes on as it is: to join it costs a copy, which is more than
what larger batches save."""

_REPEAT_SECONDS = 0.1


def gather(
    batches: Iterable[pa.RecordBatch], *, rows: int = BATCH_ROWS, size: int = BATCH_BYTES
) -> Generator[pa.RecordBatch, None, None]:
    """Join small batches and cut large ones, keeping the order. Empty ones vanish."""
    held: list[pa.RecordBatch] = []
    held_rows = held_bytes = 0
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            piece = batch.slice(start, rows)
            weight = piece.nbytes
            ready = piece.num_rows == rows or weight >= UNCOPIED_BYTES
            full = held_rows + piece.num_rows > rows or held_bytes >= size
            if held and (ready or full):
                yield _joined(held)
                held, held_rows, held_bytes = [], 0, 0
            if ready:
                yield piece
            else:
                held.append(piece)
                held_rows += piece.num_rows
                held_bytes += weight
    if held:
        yield _joined(held)


def _joined(held: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return held[0] if len(held) == 1 else pa.concat_batches(held)


def conform(arrays: Sequence[pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    """A batch of exactly this schema; raises `ValueNotEncodable` naming the column when
    a value does not fit it.

    Values that the source holds but Arrow's type does not, such as a database's
    infinity, are refused here and never turned into another value. Whether text is UTF-8
    is not looked at: every encoder does, and once costs enough.
    """
    columns = [fitted(array, field) for array, field in zip(arrays, schema, strict=True)]
    try:
        return pa.RecordBatch.from_arrays(columns, schema=schema)
    except pa.ArrowException as error:
        raise SourceFailed from error


def fitted(array: pa.Array, field: pa.Field, *, check_text: bool = False) -> pa.Array:
    """One column of what `conform` makes. `check_text` also verifies UTF-8, for sources
    that do not, where the row must be told."""
    try:
        if array.type != field.type:
            array = array.cast(field.type, safe=True)
        if check_text and pat.is_string(field.type):
            array.validate(full=True)
    except pa.ArrowException as error:
        raise not_fitting(field.name) from error
    if not _in_range(array):
        raise not_fitting(field.name)
    return array


def not_fitting(column: str | None) -> ValueNotEncodable:
    """The error for a value that is not of its column's type; None: of some column."""
    return ValueNotEncodable(
        f"{f'column {column}' if column else 'a column'} holds a value that its type "
        "cannot carry; export the column as text, or leave it out",
        column=column,
    )


_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}
_DATE_LIMIT = 2**31 - 1
_TIMESTAMP_LIMIT = 2**63 - 1


def _in_range(array: pa.Array) -> bool:
    """False where a temporal column holds an infinity (engines keep them as the largest
    and smallest number) or a time of day past the end of the day."""
    kind = array.type
    if pat.is_timestamp(kind):
        view, low, high = pa.int64(), -_TIMESTAMP_LIMIT, _TIMESTAMP_LIMIT
    elif pat.is_date32(kind):
        view, low, high = pa.int32(), -_DATE_LIMIT, _DATE_LIMIT
    elif pat.is_time(kind):
        view = pa.int64() if pat.is_time64(kind) else pa.int32()
        low, high = -1, _DAY[kind.unit]
    else:
        return True
    extremes = pc.min_max(array.view(view))
    least, most = extremes["min"].as_py(), extremes["max"].as_py()
    return least is None or (low < least and most < high)


class Stop:
    """Stops work that another thread is blocked in.

    An interrupt that comes just before the blocking call begins is lost in every engine,
    so it is sent again until the work has ended. `stop` itself never blocks: sending may
    need the network.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._interrupt: Callable[[], None] | None = None
        self._sender: threading.Thread | None = None

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise `SourceFailed` once stopped."""
        if self.stopped:
            raise SourceFailed("reading was cancelled")

    def stop(self) -> None:
        """Stop the work, now or as soon as it begins. Idempotent, from any thread."""
        with self._changed:
            self._stopped.set()
            if self._interrupt is not None and self._sender is None:
                self._sender = threading.Thread(
                    target=self._send, name="source-stop", daemon=True
                )
                self._sender.start()

    @contextlib.contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """While this is open, `stop` calls `interrupt`, from a thread of its own. When
        it has closed, `interrupt` is not called any more."""
        with self._changed:
            self.check()
            self._interrupt = interrupt
        try:
            yield
        finally:
            with self._changed:
                self._interrupt = None
                self._changed.notify_all()
                sender = self._sender
            if sender is not None:
                sender.join()

    def _send(self) -> None:
        with self._changed:
            while (interrupt := self._interrupt) is not None:
                self._changed.release()
                try:
                    # An engine that cannot be interrupted just now is asked again.
                    with contextlib.suppress(Exception):
                        interrupt()
                finally:
                    self._changed.acquire()
                if self._interrupt is not None:
                    self._changed.wait(_REPEAT_SECONDS)
