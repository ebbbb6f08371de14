"""Refuses new calls of a server that is about to end, in a way that callers may repeat."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from grpc_status import rpc_status

from exportd_server.api.interceptors.handlers import (
    Behaviour,
    Continuation,
    split,
    wrapped,
)
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

    Belongs outside the interceptor that has methods called before a request is there, so
    that refusals do not wait for one.
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
        """Give the method's handler, which then refuses."""
        handler = await continuation(handler_call_details)
        if split(handler_call_details)[0] not in self._services:
            return handler
        if handler is None:
            # One that this release does not have, and another one may.
            return (
                grpc.stream_stream_rpc_method_handler(self._refuse)
                if self._refusing
                else None
            )
        return wrapped(handler, unary=self._unless_refusing, stream=self._unless_refusing)

    def _unless_refusing(self, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Any) -> Any:
            if self._refusing:
                await self._refuse(request, context)
            return await behaviour(request, context)

        return call

    async def _refuse(self, _requests: object, context: Any) -> None:
        self._refused += 1
        error = ExportdError(ErrorReason.DRAINING)
        await context.abort_with_status(rpc_status.to_status(error_status(error)))
