"""Metrics as Prometheus reads them: over HTTP."""

from __future__ import annotations

import asyncio
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Scrape:
    """Every series with its value."""

    series: dict[Key, float]

    def value(self, name: str, **labels: str) -> float:
        """The value of one series, which has to be there."""
        return self.series[name, frozenset(labels.items())]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        wanted = set(labels.items())
        return sum(v for (n, had), v in self.series.items() if n == name and wanted <= had)


async def scrape(address: str) -> Scrape:
    """Read the metrics at an address."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(read)
    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    )
