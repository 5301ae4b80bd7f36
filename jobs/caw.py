"""The same as `scacam caw`."""

import sys

from scacam.jobs.caw import main

if __name__ == "__main__":
    sys.path.pop(0)  # this folder would hide modules of the same names
    sys.exit(main())
