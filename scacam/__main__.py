"""The command `scacam`; also `python -m scacam`."""

import sys

from scacam.jobs.command import main

if __name__ == "__main__":
    sys.exit(main())
