"""Lets `python -m ftjax` do what the command `ftjax` does."""

from ftjax.cli import main

main()
