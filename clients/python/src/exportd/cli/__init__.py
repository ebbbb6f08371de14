"""The command line `exportd`."""

from exportd.cli.commands import main

__all__ = ["main"]
