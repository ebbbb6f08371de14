"""Secrets that can be told from everything else, and the search for them."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus


def forms(secret: bytes) -> set[bytes]:
    """A secret as it may be written: as it is, in hex, in base64 at each of the places in
    a longer text that it may begin at, encoded for URLs, and as JSON and Python have it."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for skip in range(3):
        text = base64.b64encode(b"\0" * skip + secret)
        # What depends on the bytes before and after is left out.
        first = (8 * skip + 5) // 6
        whole = text.rstrip(b"=")[first : (8 * (skip + len(secret))) // 6]
        found |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    try:
        plain = secret.decode()
    except UnicodeDecodeError:
        return found
    found |= {quote(plain, safe="").encode(), quote_plus(plain).encode()}
    found |= {quote(plain).encode(), quote(quote(plain, safe=""), safe="").encode()}
    found |= {json.dumps(plain)[1:-1].encode(), repr(plain)[1:-1].encode()}
    return found


@dataclass
class Canaries:
    """The secrets of a run, by the place that each was put."""

    secrets: dict[str, bytes] = field(default_factory=dict)

    def text(self, place: str) -> str:
        """A secret of 40 characters, some of which URLs and JSON must encode."""
        return self.add(place, f'Cn/+{secrets.token_urlsafe(24)}="é')

    def word(self, place: str) -> str:
        """One of letters and digits alone, for places that take no others."""
        return self.add(place, f"cnry{secrets.token_hex(18)}")

    def signing_key(self, place: str) -> str:
        """A key of webhooks. Neither its text nor its bytes may be seen."""
        key = secrets.token_bytes(32)
        self.secrets[f"{place} (bytes)"] = key
        text = base64.b64encode(key).decode()
        self.add(place, text)
        return f"whsec_{text}"

    def add(self, place: str, secret: str) -> str:
        """One that was made elsewhere."""
        self.secrets[place] = secret.encode()
        return secret

    def found_in(self, evidence: Evidence) -> list[str]:
        """Which secrets stand where."""
        needles = [
            (place, form) for place, key in self.secrets.items() for form in forms(key)
        ]
        return [
            f"{place} stands in {where} as {form!r}"
            for where, data in evidence.pieces.items()
            for place, form in needles
            if form in data
        ]


@dataclass
class Evidence:
    """Everything that a run let out, by where it stood."""

    pieces: dict[str, bytes] = field(default_factory=dict)

    def add(self, where: str, data: bytes | str) -> None:
        """Keep what was found somewhere, after what was found there before."""
        raw = data if isinstance(data, bytes) else data.encode(errors="surrogateescape")
        self.pieces[where] = self.pieces.get(where, b"") + b"\n" + raw

    def add_files(self, where: str, files: Iterable[Path]) -> None:
        """Keep the content and the names of files."""
        for path in files:
            self.add(where, str(path))
            self.add(where, path.read_bytes())

    def add_process(self, where: str, pid: int) -> None:
        """Keep what everybody on the machine may see of a process and its threads."""
        for name in ("cmdline", "comm", "status"):
            self.add(where, Path(f"/proc/{pid}/{name}").read_bytes())
        for thread in Path(f"/proc/{pid}/task").iterdir():
            self.add(where, (thread / "comm").read_bytes())


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
