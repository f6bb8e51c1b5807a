"""`python -m overpaint`: the command line."""

import sys

try:
    from overpaint.cli import main
except KeyboardInterrupt:  # before `main` handles it
    sys.stderr.write("overpaint: stopped by Ctrl-C\n")
    sys.exit(130)

main()
