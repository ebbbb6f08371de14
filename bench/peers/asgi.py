"""An ASGI file response under uvicorn: `python -m bench.peers.asgi FILE`."""

from __future__ import annotations

import asyncio
import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route


class Whole(FileResponse):
    """The file, in pieces as large as exportd's messages."""

    chunk_size = 2**20


async def serve(path: str) -> None:
    """Serve the file at `/file` until the process is ended."""

    def answer(_request: Request) -> Whole:
        return Whole(path)

    app = Starlette(routes=[Route("/file", answer)])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(f"127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        await server.serve(sockets=[listening])


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
