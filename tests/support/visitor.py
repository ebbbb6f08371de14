"""A browser without a screen or script: it keeps cookies and fills in forms."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Self

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL


@dataclass
class Form:
    """A form of a page, as it stands."""

    action: str
    method: str
    fields: dict[str, str] = field(default_factory=dict)


class Markup(HTMLParser):
    """Finds the forms of a page, and the names of all its elements and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[Form] = []
        self.names: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {tag, *given}
        if tag == "form":
            self.found.append(Form(given["action"], given["method"]))
        elif tag == "input" and self.found:
            self.found[-1].fields[given["name"]] = given.get("value", "")


@dataclass(frozen=True)
class Page:
    """What came back."""

    url: str
    status: int
    headers: CIMultiDictProxy[str]
    cookies: str
    text: str

    @property
    def title(self) -> str:
        found = re.search(r"<h1>(.*?)</h1>", self.text)
        assert found, self.text
        return found[1]

    @property
    def names(self) -> set[str]:
        """Those of its elements and attributes."""
        return Markup(self.text).names

    def forms(self, action: str) -> list[Form]:
        """The forms that send there."""
        found = Markup(self.text).found
        return [form for form in found if form.action.endswith(f"/console/{action}")]


class Visitor:
    """Visits one console; `base` is its address without a path."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._http = aiohttp.ClientSession(
            cookie_jar=aiohttp.CookieJar(unsafe=True),
            timeout=aiohttp.ClientTimeout(total=30),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    @property
    def cookies(self) -> dict[str, str]:
        """The values of the cookies, by name."""
        return {each.key: each.value for each in self._http.cookie_jar}

    def set_cookie(self, name: str, value: str) -> None:
        self._http.cookie_jar.clear()
        self._http.cookie_jar.update_cookies({name: value}, URL(self.base))

    async def get(self, path: str, **headers: str) -> Page:
        """A page, wherever that leads."""
        return await self._ask("GET", path, headers=headers)

    async def post(self, path: str, **fields: str) -> Page:
        """Send fields as a form does."""
        return await self._ask("POST", path, data=fields)

    async def post_bytes(self, path: str, body: bytes, type_: str) -> Page:
        return await self._ask("POST", path, data=body, headers={"Content-Type": type_})

    async def send(self, form: Form, *, follow: bool = True, **fields: str) -> Page:
        """Send a form of a page, with some of it filled in."""
        _, _, path = form.action.partition("/console")
        filled = {**form.fields, **fields}
        return await self._ask("POST", path, data=filled, allow_redirects=follow)

    async def sign_in(self, credential: str, path: str = "/jobs") -> Page:
        """Ask for a page, and sign in on what comes instead."""
        asked = await self.get(path)
        (form,) = asked.forms("sign-in")
        return await self.send(form, credential=credential)

    async def _ask(self, method: str, path: str, **options: object) -> Page:
        async with self._http.request(
            method,
            f"{self.base}/console{path}",
            **options,  # type: ignore[arg-type]
        ) as answer:
            return Page(
                answer.url.path_qs,
                answer.status,
                answer.headers,
                "; ".join(answer.headers.getall("Set-Cookie", [])),
                await answer.text(),
            )
