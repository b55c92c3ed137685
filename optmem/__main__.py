"""The entry of `optmem` and of `python -m optmem`: Ctrl-C while the command line is being imported is no error either."""

from __future__ import annotations

import sys


def main() -> None:
    """Imports the command line, which takes seconds, and runs it."""
    try:
        from optmem.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
