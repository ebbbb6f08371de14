"""A real Chromium without a screen, driven by the WebDriver protocol of the W3C."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

MISSING = (
    ""
    if shutil.which("chromium") and shutil.which("chromedriver")
    else "needs chromium and chromedriver (apt-get install chromium chromium-driver)"
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""By this key the protocol gives elements."""
_SECONDS = 60.0
_FLAGS = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # Whoever tests as root has no other way.
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
)
_HOLDS = """
const [condition, done] = [new Function(`return ${arguments[0]}`), arguments[1]];
const look = () => { if (condition()) { observer.disconnect(); done(true); } };
const observer = new MutationObserver(look);
observer.observe(document, {
  subtree: true, childList: true, characterData: true, attributes: true });
look();
"""


class Browser:
    """One window."""

    def __init__(self, http: httpx.AsyncClient, session: str) -> None:
        self._http = http
        self._session = session

    async def _ask(self, method: str, path: str, **body: Any) -> Any:
        answer = await self._http.request(
            method,
            f"/session/{self._session}{path}",
            json=body if method == "POST" else None,
        )
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    async def open(self, url: str) -> None:
        await self._ask("POST", "/url", url=url)

    async def url(self) -> str:
        return str(await self._ask("GET", "/url"))

    async def run(self, script: str) -> Any:
        """What an expression in the page comes to."""
        return await self._ask("POST", "/execute/sync", script=f"return {script}", args=[])

    async def holds(self, condition: str) -> None:
        """Wait until an expression in the page holds, without loading it anew."""
        await self._ask("POST", "/execute/async", script=_HOLDS, args=[condition])

    async def text(self, css: str) -> str:
        """What the first such element reads; empty without one."""
        # In one step: a page may be replaced between two.
        return str(
            await self.run(f"document.querySelector({json.dumps(css)})?.innerText ?? ''")
        )

    async def reads(self, css: str, text: str) -> None:
        """Wait until the first such element reads so: a click may return before the page
        has begun to change."""
        read = await self.text(css)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SECONDS / 3):
                while read != text:
                    await asyncio.sleep(0.02)
                    read = await self.text(css)
        assert read == text

    async def source(self) -> str:
        """The page's markup; it takes no script in the page."""
        return str(await self._ask("GET", "/source"))

    async def click(self, css: str) -> None:
        await self._ask("POST", f"/element/{await self._find(css)}/click")

    async def type(self, css: str, text: str) -> None:
        await self._ask("POST", f"/element/{await self._find(css)}/value", text=text)

    async def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the keyboard is."""
        actions = [
            {"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")
        ]
        await self._ask(
            "POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}]
        )

    async def emulate(self, command: str, **parameters: Any) -> None:
        """Call the browser's own debugging protocol."""
        await self._ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    async def phone(self) -> None:
        """Be as small as a phone."""
        await self.emulate(
            "Emulation.setDeviceMetricsOverride",
            width=360,
            height=740,
            deviceScaleFactor=2,
            mobile=True,
        )

    async def dark(self) -> None:
        """Like it dark."""
        feature = {"name": "prefers-color-scheme", "value": "dark"}
        await self.emulate("Emulation.setEmulatedMedia", features=[feature])

    async def screenshot(self, path: Path) -> None:
        picture = base64.b64decode(await self._ask("GET", "/screenshot"))
        await asyncio.to_thread(path.write_bytes, picture)

    async def complaints(self) -> list[str]:
        """What the browser's console has, refused styles and scripts among it."""
        entries = await self._ask("POST", "/se/log", type="browser")
        return [entry["message"] for entry in entries]

    async def _find(self, css: str) -> str:
        found = await self._ask("POST", "/element", using="css selector", value=css)
        return str(found[_ELEMENT])


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Browser]:
    """A browser with a new profile; it and its driver are ended in the end."""
    driver = await asyncio.create_subprocess_exec(
        *("chromedriver", "--port=0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_SECONDS):
            port = await _port(driver)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=_SECONDS, trust_env=False
        ) as http:
            options = {
                "binary": shutil.which("chromium"),
                "args": [*_FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"],
            }
            wanted = {
                "browserName": "chrome",
                "timeouts": {"script": 30_000, "pageLoad": 60_000},
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            answer = await http.post(
                "/session", json={"capabilities": {"alwaysMatch": wanted}}
            )
            value = answer.json()["value"]
            assert answer.status_code == 200, value
            try:
                yield Browser(http, value["sessionId"])
            finally:
                await http.delete(f"/session/{value['sessionId']}")
    finally:
        driver.terminate()
        await driver.wait()


async def _port(driver: asyncio.subprocess.Process) -> int:
    assert driver.stdout is not None
    async for line in driver.stdout:
        if found := re.search(rb"successfully on port (\d+)", line):
            return int(found[1])
    raise RuntimeError("chromedriver ended before it listened")
