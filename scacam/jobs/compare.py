"""Compare two runs of the same images: which predictions changed, and whose attention moved.

    scacam compare --runs before/ after/        # after/metrics/comparison.parquet
                                                        # after/comparison.html

Reads the runs' Parquet and a few of their photos; needs neither the networks nor Ray.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from scacam.audit.compare import COMPARISON, compare_runs
from scacam.report.comparison import Summary
from scacam.runs.results import open_run
from scacam.storage import join, write_bytes
from scacam.storage.parquet import write_tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job."""
    parser.add_argument(
        "--runs",
        required=True,
        nargs=2,
        metavar=("A", "B"),
        help="the outputs of two explain jobs; what is found is written below B",
    )


@dataclass(frozen=True)
class Result:
    """Where the page and the table are."""

    page: str
    table: str
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"page:  {self.page}\ntable: {self.table}"


def run(*, runs: Sequence[str]) -> Result:
    """Compare two runs; writes the table and the page below the second one.

    Raises:
        RunError: there is no such run, or the two have no network, method or image in common.
        OSError: the results cannot be written.
    """
    first_path, second_path = runs
    first, second = open_run(first_path), open_run(second_path)
    tables = compare_runs(first, second)
    summary = Summary(first, second)

    def summarised() -> Iterator[pa.Table]:
        for table in tables:
            summary.add(table)
            yield table

    schema = COMPARISON.with_metadata({"run_a": first_path, "run_b": second_path})
    result = Result(
        join(second_path, "comparison.html"), join(second_path, "metrics/comparison.parquet")
    )
    write_tables(result.table, summarised(), schema)
    write_bytes(result.page, summary.page().encode())
    return result
