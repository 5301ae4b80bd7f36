"""How far a job is: on a terminal a line that rewrites itself, elsewhere a log line at times."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

__all__ = ["Tally", "shown"]

_ON_TERMINAL_S = 0.5
_IN_LOG_S = 15.0

logger = logging.getLogger("scacam")


@ray.remote(num_cpus=0)
class Tally:
    """Counts the images that are through, as the workers report them."""

    def __init__(self) -> None:
        """Start at zero."""
        self.done = 0

    def add(self, images: int) -> None:
        """Count some more."""
        self.done += images

    def get(self) -> int:
        """The images so far; a batch that was computed twice counts twice."""
        return self.done


@contextmanager
def shown(tally: "ray.actor.ActorHandle", total: int) -> Iterator[None]:
    """Show the progress of the job that runs inside this context on standard error."""
    finished = threading.Event()
    terminal = sys.stderr.isatty()

    def show() -> None:
        first: tuple[float, int] | None = None
        while not finished.wait(_ON_TERMINAL_S if terminal else _IN_LOG_S):
            done = min(ray.get(tally.get.remote()), total)
            now = time.monotonic()
            if first is None and done:
                first = now, done
            line = _line(done, total, first, now)
            if terminal:
                print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            else:
                logger.info(line)
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _line(done: int, total: int, first: tuple[float, int] | None, now: float) -> str:
    line = f"{done:,} of {total:,} images ({done / total:.0%})"
    if first is None:
        return f"{line}, starting"
    elapsed, more = now - first[0], done - first[1]
    if elapsed > 0 and more > 0:
        rate = more / elapsed
        line += f", {rate:,.1f} images/s, {(total - done) / rate:,.0f} s left"
    return line
