"""`python -m overpaint`: the command line."""

from overpaint.cli import main

main()
