"""Structured logs: one line an event, JSON for machines or colours for a terminal."""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TextIO

import structlog

from exportd_server.platform import tracing

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

log = structlog.get_logger(__name__)

_GRPC = "grpc._cython.cygrpc"
"""The logger of gRPC's core for Python."""
AUDIT = "exportd_server.audit"
"""The logger of audit lines, which are written whatever the level."""


def configure_logging(
    level: str, style: Literal["json", "console"], stream: TextIO | None = None
) -> None:
    """Send every event of exportd, and what libraries log as a warning or worse, to
    `stream` (standard error)."""
    target = stream or sys.stderr
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if style == "json":
        final: list[structlog.types.Processor] = [
            # Without locals: they may hold secrets.
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.JSONRenderer(),
        ]
    else:
        final = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
    structlog.configure(
        processors=[
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelName(level.upper())
        ),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *final,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("psycopg").addFilter(_is_not_raised)
    logging.getLogger(_GRPC).addFilter(_tells_no_metadata)
    logging.getLogger("exportd_server").setLevel(level.upper())
    logging.getLogger(AUDIT).setLevel(logging.INFO)


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Whether the driver of PostgreSQL tells what it does not raise as well, as it does
    what broke a pipeline."""
    return not str(record.msg).startswith("error ignored terminating")


def _tells_no_metadata(record: logging.LogRecord) -> bool:
    # It tells of every value that is not UTF-8, with the value, be it half a token, and as
    # an error, as often as callers like. What needs the value takes it for a wrong one.
    return not str(record.msg).startswith("Invalid encoding")


def _add_trace(
    _logger: object, _method: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    """Tell within which span the line was written, by the names that OpenTelemetry has."""
    context = tracing.current().context
    if context is not None:
        event["trace_id"] = context.trace_id
        event["span_id"] = context.span_id
    return event


def log_everything() -> None:
    """Have a process log what would be written to standard error past the log, which is
    one event a line: warnings, exceptions that nobody catches, and gRPC's core, which
    writes lines of its own and is told not to. It has not been loaded before, or else does
    as it likes. What event loops complain of goes to the log by itself."""
    # An operator who looks for the cause of failed handshakes sets it to ERROR.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable
    threading.excepthook = _uncaught_in_thread


def _uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("uncaught exception", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or args.exc_type is SystemExit:
        return
    thread = args.thread.name if args.thread else None
    log.error("uncaught exception in a thread", thread=thread, exc_info=args.exc_value)


def _unraisable(args: UnraisableHookArgs) -> None:
    # Without the object, whose text may hold anything.
    log.error("ignored exception", where=args.err_msg, exc_info=args.exc_value)
