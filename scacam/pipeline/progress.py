"""How far a job is and where its time goes: a tally that the workers report to, shown as it grows.

On a terminal the progress is a line that rewrites itself, elsewhere a log line now and then.
"""

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["Counts", "shares", "shown", "start_tally", "taken_up"]

_ON_TERMINAL_S = 0.5
_IN_LOG_S = 15.0

logger = logging.getLogger("scacam")


class Counts(NamedTuple):
    """The tally at one moment; what was computed twice after a fault is counted twice.

    Attributes:
        through: images that the last network is through with.
        written: images written, errors among them.
        errors: written errors by kind.
        busy: seconds of work by stage, over all processes.
        wall: seconds since the first block entered a stage.
    """

    through: int
    written: int
    errors: Counter[str]
    busy: Counter[str]
    wall: float


class Tally:
    """Counts what the workers report; one actor, on the driver's node."""

    def __init__(self) -> None:
        """Start at zero."""
        self.counts = Counts(0, 0, Counter(), Counter(), 0.0)
        self.entries: Counter[tuple[str, int]] = Counter()
        self.began: float | None = None

    def enter(self, stage: str, block: int) -> int:
        """Note that a process takes up a block, known by its first image.

        Returns:
            How often this stage has taken up the block before: more than none if the process that
            did so died.
        """
        self.began = self.began or time.monotonic()
        self.entries[stage, block] += 1
        return self.entries[stage, block] - 1

    def advance(self, images: int) -> None:
        """Note that the last network is through with some images."""
        self.counts = self.counts._replace(through=self.counts.through + images)

    def spend(self, stage: str, seconds: float) -> None:
        """Note the time that a stage took for a block."""
        self.counts.busy[stage] += seconds  # type: ignore[assignment]

    def write(self, images: int, errors: Counter[str]) -> Counts:
        """Note that a shard is written; returns the counts so far."""
        self.counts.errors.update(errors)
        self.counts = self.counts._replace(written=self.counts.written + images)
        return self.get()

    def get(self) -> Counts:
        """The counts so far."""
        wall = time.monotonic() - self.began if self.began else 0.0
        return self.counts._replace(wall=wall)


def start_tally() -> Any:
    """The actor, where it lives as long as the driver does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Tally).options(num_cpus=0, scheduling_strategy=here).remote()


@contextmanager
def shown(tally: Any, total: int) -> Iterator[None]:
    """Show the progress of the job that runs inside this context on standard error."""
    finished = threading.Event()
    terminal = sys.stderr.isatty()

    def show() -> None:
        first: tuple[float, int] | None = None
        while not finished.wait(_ON_TERMINAL_S if terminal else _IN_LOG_S):
            counts = ray.get(tally.get.remote())
            now = time.monotonic()
            if first is None and counts.through:
                first = now, counts.through
            line = _line(counts, total, first, now)
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


def _line(counts: Counts, total: int, first: tuple[float, int] | None, now: float) -> str:
    done = min(counts.through, total)
    line = f"{done:,} of {total:,} images ({done / max(total, 1):.0%})"
    if first is None:
        return f"{line}, starting"
    elapsed, more = now - first[0], done - first[1]
    if elapsed > 0 and more > 0:
        rate = more / elapsed
        line += f", {rate:,.1f} images/s, {(total - done) / rate:,.0f} s left"
    if counts.errors:
        line += ", errors: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.errors.most_common())
    return line


def shares(counts: Counts, capacities: dict[str, int]) -> dict[str, float]:
    """How busy each stage was while the job ran, from 0 to 1.

    Args:
        counts: the tally at the end.
        capacities: by stage, how many processes it had, or how many cores it shared.
    """
    return {
        stage: counts.busy[stage] / (counts.wall * capacity) if counts.wall else 0.0
        for stage, capacity in capacities.items()
    }


@contextmanager
def taken_up(tally: Any, stage: str, batch: pa.Table) -> Iterator[int]:
    """Tell the tally, if there is one, that a stage works on a block, and for how long.

    Yields:
        How often the block was taken up before, by processes that did not live to finish it.
    """
    if tally is None:
        yield 0
        return
    began = time.monotonic()
    block = batch["image_id"][0].as_py()
    yield ray.get(tally.enter.remote(stage, block))
    tally.spend.remote(stage, time.monotonic() - began)
