"""The command line of all jobs: one way to start, and one way to fail."""

import argparse
import atexit
import gc
import logging
import os
import platform
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pyarrow import fs

from scacam.errors import ScacamError
from scacam.jobs import JOBS, ON_RAY
from scacam.storage import join, locate, write_bytes
from scacam.version import __version__

__all__ = ["Result", "main", "run_job"]

_STREAM = "StreamingExecutor"
"""How Ray Data calls the threads that its streams run in."""
_STREAM_ENDS_S = 10

logger = logging.getLogger("scacam")


class Result(Protocol):
    """What a job returns; as text, its last words."""

    @property
    def ok(self) -> bool:
        """Whether the exit code is 0; else it is 1, for what the job's documentation says."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """`scacam NAME …`: run a job by its name, and return its exit code, as `run_job`."""
    width = max(map(len, JOBS))
    parser = argparse.ArgumentParser(
        prog="scacam",
        usage="scacam JOB …",
        description="Class activation maps for whole image collections. The jobs:\n\n"
        + "\n".join(f"  {name:<{width}}  {does}" for name, does in JOBS.items()),
        epilog="scacam JOB --help says what a job takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"scacam {__version__}")
    given = sys.argv[1:] if arguments is None else arguments
    job = parser.parse_args(given[:1]).job
    return _run_alone(job, given[1:]) if arguments is None else run_job(job, given[1:])


def run_job(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a job from its command line.

    Standard output is for the result alone. Whatever goes wrong is one line on standard error. What
    is no plain refusal of the input has its traceback, and those of the workers, in `OUT/logs/`.

    Args:
        name: of `JOBS`.
        arguments: left out, those of this process.

    Returns:
        0 when the job completed; 1 when it did, but not well (`Result.ok`); 2 when it could not
        run or was stopped.
    """
    if arguments is None:
        return _run_alone(name, sys.argv[1:])
    atexit.register(gc.freeze)  # else the interpreter looks through all of torch before it ends
    gc.disable()  # what imports make is no garbage, and there is much of it
    job = import_module(f"scacam.jobs.{name}")
    gc.enable()
    # What is not given is left out, so that the defaults are those of `run`.
    parser = argparse.ArgumentParser(
        prog=f"scacam {name}", description=JOBS[name], argument_default=argparse.SUPPRESS
    )
    job.add_arguments(parser)
    parser.add_argument(
        "--verbose", action="store_true", help="tracebacks, and the logs of the workers, as well"
    )
    options = vars(parser.parse_args(arguments))
    verbose = options.pop("verbose", False)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with redirect_stdout(sys.stderr):  # Ray and networks print as well
            result: Result = job.run(**options)
    except (Exception, KeyboardInterrupt) as error:
        line = " ".join(_told(error).split())
        if verbose:
            traceback.print_exception(error)
        elif _is_worth_a_log(error):
            line += f" (traceback: {_logged(name, options, error)})"
        print(f"{name}: {line}", file=sys.stderr)
        return 2
    print(result)
    return 0 if result.ok else 1


def _run_alone(name: str, arguments: Sequence[str]) -> int:
    """`run_job` in a process that is there for this job alone: Ray starts as it is imported."""
    if name not in ON_RAY or {"-h", "--help", "--dry-run"} & set(arguments):
        return run_job(name, arguments)
    from scacam.pipeline.cluster import ray_starting

    ray_starting()
    code = run_job(name, arguments)
    # A stream that was cut off runs on for a while, and would end the process with 1 once Ray is
    # shut down under it.
    streams = [thread for thread in threading.enumerate() if thread.name.startswith(_STREAM)]
    for thread in streams:
        thread.join(_STREAM_ENDS_S)
    if any(thread.is_alive() for thread in streams):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # Ray's processes see that this one is gone
    return code


def _told(error: BaseException) -> str:
    """What went wrong, by its innermost cause."""
    if isinstance(error, ScacamError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on"
    if isinstance(error, OSError):
        return str(error) or type(error).__name__
    from scacam.pipeline.cluster import root_cause

    return root_cause(error)


def _is_worth_a_log(error: BaseException) -> bool:
    """Not what its message says all of: a refusal, a file that is not there, Ctrl-C."""
    if isinstance(error, ScacamError):
        return not isinstance(error.__cause__, OSError | None)
    return not isinstance(error, OSError | KeyboardInterrupt)


def _logged(name: str, options: dict[str, Any], error: BaseException) -> str:
    """Write a traceback with all its causes below the output, or where that is not there, aside."""
    now = datetime.now(UTC)
    file_name = f"{name}-{now:%Y%m%dT%H%M%S}.log"
    content = "".join(
        [
            f"scacam {__version__}, Python {platform.python_version()}, {now.isoformat()}\n",
            f"{name}: {options}\n\n",
            *traceback.format_exception(error),
        ]
    ).encode()
    output = options.get("output") or options.get("run") or options["runs"][-1]
    path = join(output, "logs", file_name)
    try:
        if locate(output)[0].get_file_info(locate(output)[1]).type == fs.FileType.NotFound:
            raise FileNotFoundError(output)
        write_bytes(path, content)
    except (OSError, ValueError):
        path = str(Path(tempfile.gettempdir()) / f"scacam-{file_name}")
        Path(path).write_bytes(content)
    return path
