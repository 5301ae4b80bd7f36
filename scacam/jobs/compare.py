"""Compare two runs of the same images: which predictions changed, and whose attention moved.

    scacam compare --runs before/ after/        # after/comparison.html
                                                # after/metrics/comparison{,_classes}.parquet

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
from scacam.storage.parquet import write_table, write_tables

_TOLD = 12


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
    """What changed, where the page and the tables are, and what is seen elsewhere.

    Attributes:
        page, table, classes: where they are.
        told: in words, of each pair of networks, what changed.
        elsewhere: the classes that B sees elsewhere.
        tested: of how many.
    """

    page: str
    table: str
    classes: str
    told: Sequence[str]
    elsewhere: Sequence[str]
    tested: int
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        names = ", ".join(self.elsewhere[:_TOLD]) + ", …" * (len(self.elsewhere) > _TOLD)
        return (
            "".join(f"{line}\n" for line in self.told)
            + f"seen elsewhere: {len(self.elsewhere)} of {self.tested} classes"
            + f" ({names})" * bool(self.elsewhere)
            + f"\npage:   {self.page}\ntables: {self.table}, {self.classes}"
        )


def run(*, runs: Sequence[str]) -> Result:
    """Compare two runs; writes the table and the page below the second one.

    Raises:
        RunError: there is no such run, or the two have no network, method or image in common.
        OSError: the results cannot be written.
    """
    first_path, second_path = runs
    first, second = open_run(first_path), open_run(second_path)
    compared = compare_runs(first, second)
    summary = Summary(first, second)

    def summarised() -> Iterator[pa.Table]:
        for found in compared:
            summary.add(found)
            yield found.table

    told = {"run_a": first_path, "run_b": second_path}
    table = join(second_path, "metrics/comparison.parquet")
    write_tables(table, summarised(), COMPARISON.with_metadata(told))
    shifts = summary.shifts.table()
    classes = join(second_path, "metrics/comparison_classes.parquet")
    write_table(classes, shifts.replace_schema_metadata(told))
    page = join(second_path, "comparison.html")
    write_bytes(page, summary.page().encode())
    elsewhere = shifts["class_name"].filter(shifts["elsewhere"]).to_pylist()
    return Result(page, table, classes, summary.told(), elsewhere, len(shifts))
