"""Look around in a run: a page on this machine, over the Parquet as it is.

    scacam browse --run out/                    # http://127.0.0.1:8765/

Needs `pip install scacam[browse]`, but neither the networks nor Ray. Ctrl-C ends it.
"""

import argparse
import logging
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from scacam.errors import RunError
from scacam.runs.results import open_run

logger = logging.getLogger("scacam")

_HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job, whose defaults are those of `run`."""
    parser.add_argument("--run", required=True, help="the output of an explain job")
    parser.add_argument("--port", type=int, help="of the page (default: 8765)")


@dataclass(frozen=True)
class Result:
    """The run that was looked at."""

    path: str
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"no longer shown: {self.path}"


def run(*, run: str, port: int = 8765) -> Result:
    """Serve the page of a run on this machine alone, until it is interrupted.

    Raises:
        RunError: there is no run, nothing in it was explained, or the page's packages are missing.
        OSError: the port is taken.
    """
    opened = open_run(run)
    try:
        import uvicorn

        from scacam.browse import make_app
    except ImportError as error:
        raise RunError(f"{error}; pip install 'scacam[browse]'") from error
    app = make_app(opened)
    with socket.create_server((_HOST, port)) as listening, suppress(KeyboardInterrupt):
        address = f"http://{_HOST}:{listening.getsockname()[1]}/"
        logger.info("%s: %s (Ctrl-C ends it)", run, address)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])
    return Result(opened.path)
