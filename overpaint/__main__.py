"""`python -m overpaint`: the command line."""

from overpaint.cli.app import main

main()
