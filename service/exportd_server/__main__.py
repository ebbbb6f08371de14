"""The command `exportd-server`, and `python -m exportd_server`."""

from __future__ import annotations

from exportd_server.platform.garbage import uncollected


def main() -> None:
    """Run the command line."""
    with uncollected():
        from exportd_server import cli  # noqa: PLC0415 - what it brings is what it is for
    cli.main()


if __name__ == "__main__":
    main()
