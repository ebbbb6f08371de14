"""What a PromQL expression names: its series, and the labels it knows of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SELECTOR = re.compile(r"([A-Za-z_:][\w:]*)\s*\{([^}]*)\}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"[A-Za-z_:][\w:]*(?!\w)(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset"}
_SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds by itself."""


@dataclass(frozen=True)
class Named:
    """The series of an expression, and every label it asks for by name."""

    series: frozenset[str]
    matched: frozenset[tuple[str, str]]
    """Pairs of series and label."""
    grouped: frozenset[str]

    def unknown(self, known: dict[str, frozenset[str]]) -> list[str]:
        """What is not among the series and labels that there are."""
        return list(self._unknown(known))

    def _unknown(self, known: dict[str, frozenset[str]]) -> Iterator[str]:
        for name in sorted(self.series - known.keys()):
            yield f"no metric {name}"
        for name, label in sorted(self.matched):
            if label not in known.get(name, frozenset()) | _SCRAPED:
                yield f"{name} has no label {label}"
        # Whatever is grouped by, each of the series has to have.
        for label in sorted(self.grouped - _SCRAPED):
            for name in sorted(self.series & known.keys()):
                if label not in known[name]:
                    yield f"{name} is grouped by {label}, which it has not"


def named(expression: str) -> Named:
    """Read an expression."""
    # Texts may hold anything, ranges and variables name nothing.
    text = re.sub(r'"(?:\\.|[^"\\])*"', '""', expression)
    text = re.sub(r"\[[^\]]*\]|\$\w+", "", text)
    series: set[str] = set()
    matched: set[tuple[str, str]] = set()
    grouped: set[str] = set()

    def selector(found: re.Match[str]) -> str:
        series.add(found[1])
        labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", found[2])
        matched.update((found[1], label) for label in labels)
        return " "

    def grouping(found: re.Match[str]) -> str:
        grouped.update(filter(None, map(str.strip, found[1].split(","))))
        return " "

    text = _GROUPING.sub(grouping, _SELECTOR.sub(selector, text))
    text = re.sub(r"\b\d[\w.]*", " ", text)
    series.update(set(_NAME.findall(text)) - _WORDS)
    return Named(frozenset(series), frozenset(matched), frozenset(grouped))
