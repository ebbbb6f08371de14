"""Modules that take long to load and are not needed for a server to be ready."""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module, which is imported when something of it is first asked for. For
    types, import the module itself under `TYPE_CHECKING`.

    Unlike `importlib.util.LazyLoader` before Python 3.12.2, two threads may be the first.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)

    def load(self) -> None:
        """Import it now; blocks."""
        importlib.import_module(self._name)
