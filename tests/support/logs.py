"""What a process logs, as it would write it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from exportd_server.platform.logging import configure_logging


@contextmanager
def json_log(level: str = "info") -> Iterator[io.StringIO]:
    """What the process logs as JSON meanwhile."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, above = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging(level, "json", stream)
    try:
        yield stream
    finally:
        root.handlers[:] = handlers
        root.setLevel(above)
        structlog.configure(**before)
