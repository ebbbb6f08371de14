"""Small sample data and catalogues for tests."""

from __future__ import annotations

from pathlib import Path

from exportd_server import samples
from exportd_server.sources.base import Source
from exportd_server.sources.catalogue import Catalogue, Dataset

SAMPLE_ROWS = 20_000


def write_samples(directory: Path, rows: int) -> Path:
    """Generate the sample data; returns the path of its catalogue."""
    samples.generate(directory, rows)
    return directory / "datasets.toml"


def catalogue_of(**sources: Source) -> Catalogue:
    """A catalogue of sources made by a test."""
    return Catalogue(
        {
            name: Dataset(name=name, columns=source.columns(), source=source)
            for name, source in sources.items()
        }
    )
