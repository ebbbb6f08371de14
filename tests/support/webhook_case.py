"""The webhook as a case of the suite that every sink is held to."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exportd_server.sinks.webhook import WebhookConnection, WebhookRequest, WebhookType
from tests.support.receiver import Received, Receiver
from tests.support.waits import ENOUGH

SECRET = f"whsec_{base64.b64encode(bytes(32)).decode()}"


class WebhookCase:
    """Requests to a receiver in a thread of its own, which keeps bodies in a folder and
    knows by the `webhook-id` what it has already. Close it."""

    sink_type = WebhookType()
    lists_parts = True

    def __init__(self, folder: Path) -> None:
        self._receiver = Receiver(keep=folder)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(ENOUGH)
        self.connection = _connection(self._receiver.url)
        self.request = WebhookRequest.model_validate(
            {"mode": "PUSH_PARTS", "secret": SECRET}
        )

    def close(self) -> None:
        """Stop the receiver."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(ENOUGH)

    @property
    def broken(self) -> WebhookConnection:
        # The port for discarding, at an address where nothing listens.
        return _connection("http://127.9.9.9:9/")

    def expected(self, parts: Mapping[str, bytes]) -> dict[str, bytes]:
        return dict(parts)

    def arrived(self) -> dict[str, bytes]:
        return {
            name: got.body for name, got in self._known().items() if name != "completion"
        }

    def listed(self) -> list[str] | None:
        completion = self._known().get("completion")
        if completion is None:
            return None
        parts: list[dict[str, Any]] = json.loads(completion.body)["data"]["parts"]
        return [part["file_name"] for part in parts]

    def remains(self) -> list[str]:
        return sorted(self._known())

    def _known(self) -> dict[str, Received]:
        first = {got.header("webhook-id"): got for got in reversed(self._receiver.requests)}
        named: dict[str, Received] = {}
        for got in first.values():
            name = dict(got.headers).get("x-exportd-file-name", "completion")
            # Two deliveries of one part, which the suite makes, bring the same.
            assert name not in named or named[name].sha256 == got.sha256
            named[name] = got
        return named

    def _run(self, ready: threading.Event) -> None:
        async def serve() -> None:
            async with self._receiver.listen():
                ready.set()
                await self._stop.wait()

        self._loop.run_until_complete(serve())
        self._loop.close()


def _connection(url: str) -> WebhookConnection:
    return WebhookConnection.model_validate(
        {"url": url, "allow_http": True, "allow_private": ["127.0.0.0/8"]}
    )
