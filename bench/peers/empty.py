"""A bare grpc.aio server with one method that does nothing: `python -m
bench.peers.empty`. The least that a call costs in Python."""

from __future__ import annotations

import asyncio

import grpc

from bench.load import GET_JOB


async def _nothing(_request: bytes, _context: object) -> bytes:
    return b""


async def serve() -> None:
    """Answer GetJob's calls with nothing until the process is ended."""
    _, service, method = GET_JOB.split("/")
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        method: grpc.unary_unary_rpc_method_handler(_nothing)
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
