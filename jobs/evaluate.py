"""The same as `scacam evaluate`."""

import sys

from scacam.jobs.evaluate import main

if __name__ == "__main__":
    sys.path.pop(0)  # this folder would hide modules of the same names
    sys.exit(main())
