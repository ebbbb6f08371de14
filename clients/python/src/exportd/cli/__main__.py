"""`python -m exportd.cli`."""

from exportd.cli.commands import main

main()
