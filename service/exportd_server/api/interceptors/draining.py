"""Refuses new calls of a server that is about to end, in a way that callers may repeat."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import Continuation, split
from exportd_server.api.status import error_status
from exportd_server.errors import ErrorReason, ExportdError

if TYPE_CHECKING:
    from exportd_server.api.interceptors.handlers import Handler

_NAP = 0.02
"""Seconds between two looks for new calls."""
_QUIET_NAPS = 5
"""Looks in a row without a new call after which it is quiet. Several, because a loop that
was held up sees the first of them late, and then the calls that came meanwhile."""
_LONG_NAPS = 50
"""Looks after which one without a new call will do: there are callers who do not wait."""


class DrainInterceptor(grpc.aio.ServerInterceptor):
    """Answers new calls of the services named with DRAINING once it is told to.

    The library cancels what it has taken in and not begun when it stops, without a word
    that tells a caller to try again: so calls are refused first, until hardly any come.
    """

    def __init__(self, services: frozenset[str]) -> None:
        self._services = services
        self._refusing = False
        self._refused = 0

    async def refuse(self) -> None:
        """From now on refuse new calls; returns once it is quiet. Those under way go on."""
        self._refusing = True
        naps = quiet = 0
        while quiet < (_QUIET_NAPS if naps < _LONG_NAPS else 1):
            before = self._refused
            await asyncio.sleep(_NAP)
            naps += 1
            quiet = quiet + 1 if self._refused == before else 0

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Give the method's handler, or one that refuses."""
        service, _ = split(handler_call_details)
        if not self._refusing or service not in self._services:
            return await continuation(handler_call_details)
        self._refused += 1
        # Of this kind, so that it answers at once and does not wait for a request.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_requests: object, context: Any) -> None:
    error = ExportdError(ErrorReason.DRAINING)
    await context.abort_with_status(rpc_status.to_status(error_status(error)))
