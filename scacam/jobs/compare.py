"""Compare two runs of the same images: which predictions changed, and whose attention moved.

    python jobs/compare.py --runs before/ after/        # after/metrics/comparison.parquet
                                                        # after/comparison.html

Reads the runs' Parquet and a few of their photos; needs neither the networks nor Ray.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import pyarrow as pa

from scacam.audit.compare import COMPARISON, compare_runs
from scacam.errors import ScacamError
from scacam.report.comparison import Summary
from scacam.runs.results import open_run
from scacam.storage import join, write_bytes
from scacam.storage.parquet import write_tables


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--runs",
        required=True,
        nargs=2,
        metavar=("A", "B"),
        help="the outputs of two explain jobs; what is found is written below B",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it completed."""
    options = parse(arguments)
    try:
        compare(*options.runs)
    except (ScacamError, pa.ArrowException, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(f"page:  {join(options.runs[1], 'comparison.html')}")
    print(f"table: {join(options.runs[1], 'metrics/comparison.parquet')}")
    return 0


def compare(first_path: str, second_path: str) -> None:
    """Write the table and the page."""
    first, second = open_run(first_path), open_run(second_path)
    summary = Summary(first, second)

    def summarised() -> Iterator[pa.Table]:
        for table in compare_runs(first, second):
            summary.add(table)
            yield table

    schema = COMPARISON.with_metadata({"run_a": first_path, "run_b": second_path})
    write_tables(join(second_path, "metrics/comparison.parquet"), summarised(), schema)
    write_bytes(join(second_path, "comparison.html"), summary.page().encode())


if __name__ == "__main__":
    sys.exit(main())
