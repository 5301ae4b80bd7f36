"""Look through a run and write its report.

    scacam report --run out/                    # out/report.html

Reads the run's Parquet and a few of its photos; needs neither the networks nor Ray.
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

from scacam.report.run import report
from scacam.runs.results import open_run
from scacam.storage import join, write_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job."""
    parser.add_argument("--run", required=True, help="the output of an explain job")


@dataclass(frozen=True)
class Result:
    """Where the page is, and how many bytes it has."""

    path: str
    size: int
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"report ({self.size / 1e6:.1f} MB): {self.path}"


def run(*, run: str) -> Result:
    """Write the report of a run.

    Raises:
        RunError: there is no run, or nothing in it was explained.
        OSError: the page cannot be written.
    """
    page = report(open_run(run)).encode()
    path = join(run, "report.html")
    write_bytes(path, page)
    return Result(path, len(page))
