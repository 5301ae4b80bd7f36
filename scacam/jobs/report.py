"""Look through a run and write its report: one HTML file that opens anywhere.

    python jobs/report.py --run out/                    # out/report.html

Reads the run's Parquet and a few of its photos; needs neither the networks nor Ray.
"""

import argparse
import sys
from collections.abc import Sequence

import pyarrow as pa

from scacam.errors import ScacamError
from scacam.report.run import report
from scacam.runs.results import open_run
from scacam.storage import join, write_bytes


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", required=True, help="the output of an explain job")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it completed."""
    options = parse(arguments)
    try:
        page = report(open_run(options.run)).encode()
        path = join(options.run, "report.html")
        write_bytes(path, page)
    except (ScacamError, pa.ArrowException, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"report ({len(page) / 1e6:.1f} MB): {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
