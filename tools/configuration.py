"""Writes docs/configuration.md from the settings; with --check, says if it is stale."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from exportd_server.settings import Section, Settings, variable

TARGET = Path(__file__).resolve().parent.parent / "docs/configuration.md"

HEAD = """\
# Configuration

`exportd-server serve` and `exportd-server worker` read their settings from a TOML file
(`--config FILE`), then from `EXPORTD_*` environment variables, then from flags; the later
wins. A key that does not exist is refused, with the nearest one that does. What may be
exported stands in a file of its own: see [catalogue.md](catalogue.md).

```toml
listen = "127.0.0.1:50051"
data_dir = "/var/lib/exportd"
catalogue = "/etc/exportd/datasets.toml"

[worker]
concurrency = 4

[limits]
max_rows = 50_000_000
```

Sizes are in bytes and times in seconds. This page is made from the settings themselves by
`tools/configuration.py`.

| Key | Variable | Default | Meaning |
|---|---|---|---|
"""


def rows(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """A row of the table for each key."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from rows(inner, f"{prefix}{name}.")
        else:
            key = f"{prefix}{name}"
            yield (
                f"| `{key}` | `{variable(key)}` | {_default(field)} | {field.description} |"
            )


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value in {"", ()}:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int):
        return f"`{value:_}`"
    return f"`{value}`"


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(rows()) + "\n"


def main() -> int:
    """Write or check; returns the exit code."""
    if sys.argv[1:] != ["--check"]:
        TARGET.write_text(page(), encoding="utf-8")
        return 0
    if TARGET.read_text(encoding="utf-8") != page():
        print("docs/configuration.md is not current: run make gen")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
