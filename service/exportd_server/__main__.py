"""The command `exportd-server`, and `python -m exportd_server`."""

from __future__ import annotations

from exportd_server.platform.garbage import uncollected
from exportd_server.platform.imports import without


def main() -> None:
    """Run the command line."""
    with uncollected():
        # It takes rich along where it is installed, and with it Pygments and attrs, for
        # tracebacks in colour that are not what is logged: as long as half of itself again.
        with without("rich"):
            import structlog  # noqa: F401, PLC0415

        from exportd_server import cli  # noqa: PLC0415 - what it brings is what it is for
    cli.main()


if __name__ == "__main__":
    main()
