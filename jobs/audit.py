"""The same as `scacam audit`."""

import sys

from scacam.jobs.command import run_job

if __name__ == "__main__":
    sys.path.pop(0)  # this folder would hide modules of the same names
    sys.exit(run_job("audit"))
