"""The seam between exportd and what records its traces.

A trace context is that of W3C Trace Context, as callers send it and as it goes on to
others. Whether or not anything is recorded, work that a context came with is done within
it: log lines tell it, and it is handed on.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

Attributes = Mapping[str, str | int | bool]

_NONE: Attributes = MappingProxyType({})
_LONGEST_STATE = 512
"""Characters of a `tracestate` that is handed on, as many as the specification asks for;
a longer one is left out as a whole."""
_MOST_MEMBERS = 32
# W3C Trace Context, section 3.3.1.3: a key is a name, or a tenant's of a system. A value
# has no comma, no equals sign, no space at its end. The library that records spans would
# log a warning for each member that is laxer than that.
_MEMBER = re.compile(
    r"(?P<key>[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[ -+\--<>-~]{0,255}[!-+\--<>-~]"
)
# Later versions may have more at the end, behind another hyphen.
_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-[!-~]{0,200})?"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span of a trace, wherever it was made; ids in hexadecimal."""

    trace_id: str
    span_id: str
    flags: int
    """Bit 0: the trace is recorded."""
    state: str = ""
    """`tracestate`: what others have to tell each other, handed on as it came."""

    @classmethod
    def read(cls, traceparent: str, tracestate: str = "") -> TraceContext | None:
        """What the headers say; None when `traceparent` is none. A `tracestate` that is
        none is left out."""
        found = _PARENT.fullmatch(traceparent)
        if found is None or found["version"] == "ff":
            return None
        if found["version"] == "00" and found["more"] is not None:
            return None
        if not (found["trace"].strip("0") and found["span"].strip("0")):
            return None
        flags = int(found["flags"], 16)
        return cls(found["trace"], found["span"], flags, _read_state(tracestate))

    @property
    def traceparent(self) -> str:
        """The header."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    @property
    def headers(self) -> dict[str, str]:
        """What goes on to others."""
        state = {"tracestate": self.state} if self.state else {}
        return {"traceparent": self.traceparent, **state}

    @property
    def text(self) -> str:
        """Both in one, for the ledger."""
        return f"{self.traceparent} {self.state}".rstrip()

    @classmethod
    def of_text(cls, text: str) -> TraceContext | None:
        """What `text` wrote; None for an empty one."""
        parent, _, state = text.partition(" ")
        return cls.read(parent, state)


def _read_state(text: str) -> str:
    members = [each.strip(" \t") for each in text.split(",")] if text else []
    members = [each for each in members if each]
    found = [_MEMBER.fullmatch(each) for each in members]
    keys = {each["key"] for each in found if each is not None}
    if len(text) > _LONGEST_STATE or len(members) > _MOST_MEMBERS:
        return ""
    # One that is wrong spoils them all, as does a key that is there twice.
    return ",".join(members) if len(keys) == len(members) else ""


def read_metadata(metadata: Sequence[tuple[str, str | bytes]]) -> TraceContext | None:
    """The context among a call's metadata. One that is wrong, or there twice, is none."""
    parents = [value for key, value in metadata if key == "traceparent"]
    if len(parents) != 1:
        return None
    states = [value for key, value in metadata if key == "tracestate"]
    return TraceContext.read(str(parents[0]), ",".join(map(str, states)))


class Kind(enum.Enum):
    """What a span is to others."""

    INTERNAL = "internal"
    SERVER = "server"
    """It answers a call."""
    CLIENT = "client"
    """It calls somebody."""


class Span(Protocol):
    """A step of the work, from when it was begun. May be used from any thread."""

    @property
    def context(self) -> TraceContext | None:
        """Its place in a trace; None without any."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Tell of it. No secrets, no values of requests or of data."""
        ...

    def fail(self, reason: str) -> None:
        """It failed; `reason` is a word of the kind that `ErrorReason` has."""
        ...


class Tracer(Protocol):
    """Records spans. It never makes the work wait, and never makes it fail: what cannot be
    sent is dropped."""

    enabled: bool
    """Whether anything is recorded."""

    def span(
        self,
        name: str,
        *,
        parent: TraceContext | None = None,
        kind: Kind = Kind.INTERNAL,
        attributes: Attributes = _NONE,
        expected: tuple[type[BaseException], ...] = (),
    ) -> AbstractContextManager[Span]:
        """A span for as long as the context is open, which is current in it; without a
        parent it belongs to the one that is current, or begins a trace. An exception that
        comes out of it fails it unless it is one of those expected."""
        ...

    async def close(self, seconds: float) -> None:
        """Send what waits to be sent, in so many seconds at the most."""
        ...


class Elsewhere:
    """A span that is recorded by somebody else, or by nobody. See `Span`."""

    def __init__(self, context: TraceContext | None) -> None:
        self._context = context

    @property
    def context(self) -> TraceContext | None:
        """See `Span`."""
        return self._context

    def set(self, attributes: Attributes) -> None:
        """Nobody is told."""

    def fail(self, reason: str) -> None:
        """Nobody is told."""


NO_SPAN: Span = Elsewhere(None)

_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def current() -> Span:
    """The span within which this is asked."""
    return _current.get()


@contextmanager
def within(span: Span) -> Iterator[Span]:
    """Make a span the current one."""
    token = _current.set(span)
    try:
        yield span
    finally:
        _current.reset(token)


def continued(context: TraceContext | None) -> AbstractContextManager[Span]:
    """Work within a span of somebody else's; without one nothing changes."""
    return nullcontext(current()) if context is None else within(Elsewhere(context))


class NoTracer:
    """Records nothing; contexts are handed on as they came. See `Tracer`."""

    enabled = False

    def span(
        self,
        name: str,  # noqa: ARG002 - nobody is told
        *,
        parent: TraceContext | None = None,
        kind: Kind = Kind.INTERNAL,  # noqa: ARG002 - likewise
        attributes: Attributes = _NONE,  # noqa: ARG002 - likewise
        expected: tuple[type[BaseException], ...] = (),  # noqa: ARG002 - likewise
    ) -> AbstractContextManager[Span]:
        """See `Tracer`."""
        return continued(parent)

    async def close(self, seconds: float) -> None:
        """Nothing waits."""


NO_TRACER: Tracer = NoTracer()
