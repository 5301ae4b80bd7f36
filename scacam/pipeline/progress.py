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
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scacam.errors import RunError

__all__ = [
    "BLANK",
    "Counts",
    "Held",
    "advance",
    "fall",
    "hold",
    "shares",
    "shown",
    "start_tally",
    "taken_up",
]

BLANK = -1
"""The image that every block begins with after a death: whoever dies of that dies of none."""

_DEATHS_MAX = 6
"""Of processes on one block. Finding an image that kills takes three, and two more for the next."""
_DEATHS_OF_NONE = 2

_ON_TERMINAL_S = 0.5
_IN_LOG_S = 15.0

logger = logging.getLogger("scacam")


class Counts(NamedTuple):
    """The tally at one moment. An image that was worked on twice, after a fault, counts once.

    Attributes:
        through: images that the last network is through with.
        written: images written, errors among them.
        errors: written errors by kind.
        busy: seconds of work by stage, over all processes, work done twice among it.
        wall: seconds since the first block entered a stage.
    """

    through: int
    written: int
    errors: Counter[str]
    busy: Counter[str]
    wall: float


@dataclass
class Held:
    """A block in the hands of a process, known by its first image.

    Attributes:
        stage, block: what of it the process does, and which it is.
        node: where the process runs, by Ray's id.
        image: the one image that the process looks at, or `BLANK`, if it said so.
        reason: why the process ended itself, if it said so.
        through: images that it is through with.
    """

    stage: str
    block: int
    node: str
    image: int | None = None
    reason: str | None = None
    through: int = 0


class Tally:
    """Counts what the workers report; one actor, on the driver's node."""

    def __init__(self) -> None:
        """Start at zero."""
        self.counts = Counts(0, 0, Counter(), Counter(), 0.0)
        self.through: dict[int, int] = {}
        self.shards: dict[int, tuple[int, Counter[str]]] = {}
        self.held: dict[str, Held] = {}
        self.began: float | None = None

    def enter(self, worker: str, held: Held) -> list[Held]:
        """Note that a process takes up a block.

        Returns:
            In whose hands it was before: of those that died with it, since whoever is through with
            a block leaves it. What went down with its node is left out, for that says nothing
            about the block; so is, by then, what was counted before its node was known to be lost.
        """
        self.began = self.began or time.monotonic()
        self.held.pop(worker, None)
        before = self._others(held)
        self.held[worker] = held
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if before else set()
        return [one for one in before.values() if one.node in nodes]

    def hold(self, worker: str, image: int) -> None:
        """Note which image of its block a process looks at."""
        self.held[worker].image = image

    def fall(self, worker: str, reason: str) -> None:
        """Note why a process is about to end itself."""
        self.held[worker].reason = reason

    def leave(self, worker: str, seconds: float) -> None:
        """Note that a process is through with its block, and what time it took."""
        held = self.held.pop(worker)
        for gone in self._others(held):
            del self.held[gone]
        self.counts.busy[held.stage] += seconds  # type: ignore[assignment]

    def _others(self, held: Held) -> dict[str, Held]:
        key = held.stage, held.block
        return {worker: one for worker, one in self.held.items() if (one.stage, one.block) == key}

    def advance(self, worker: str, images: int) -> None:
        """Note that a process of the last network is through with more images of its block."""
        held = self.held[worker]
        held.through += images
        before = self.through.get(held.block, 0)
        self.through[held.block] = after = max(before, held.through)
        self.counts = self.counts._replace(through=self.counts.through + after - before)

    def write(self, shard: int, images: int, errors: Counter[str]) -> Counts:
        """Note that a shard is written, perhaps anew; returns the counts so far."""
        images_before, errors_before = self.shards.get(shard, (0, Counter()))
        self.shards[shard] = images, errors
        self.counts = self.counts._replace(
            written=self.counts.written + images - images_before,
            errors=self.counts.errors + errors - errors_before,
        )
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
def shown(tally: Any, total: int, before: int = 0) -> Iterator[None]:
    """Show the progress of the job that runs inside this context on standard error.

    Args:
        tally: the actor.
        total: images of the run.
        before: of these, done before this job.
    """
    finished = threading.Event()
    terminal = sys.stderr.isatty()

    def show() -> None:
        first: tuple[float, int] | None = None
        while not finished.wait(_ON_TERMINAL_S if terminal else _IN_LOG_S):
            counts = ray.get(tally.get.remote())
            counts = counts._replace(through=before + counts.through)
            now = time.monotonic()
            if first is None and counts.through > before:
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
    done = counts.through
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
def taken_up(tally: Any, stage: str, batch: pa.Table) -> Iterator[list[Held]]:
    """Tell the tally, if there is one, that a stage works on a block, and for how long.

    Yields:
        The block as it was in the hands of processes that died with it.

    Raises:
        RunError: they are too many, and the block would be tried for ever; or it is not to blame.
    """
    if tally is None:
        yield []
        return
    began = time.monotonic()
    block = batch["image_id"][0].as_py()
    held = Held(stage, block, ray.get_runtime_context().get_node_id())
    deaths = ray.get(tally.enter.remote(_worker(), held))
    try:
        of_none = sum(one.image == BLANK for one in deaths)
        if len(deaths) >= _DEATHS_MAX or of_none >= _DEATHS_OF_NONE:
            raise RunError(_told(deaths))
        yield deaths
    finally:
        tally.leave.remote(_worker(), time.monotonic() - began)


def hold(tally: Any, image: int) -> None:
    """Tell the tally, before it is too late, which image of its block this process looks at."""
    ray.get(tally.hold.remote(_worker(), image))


def advance(tally: Any, images: int) -> None:
    """Tell the tally that the last network is through with some images of this process's block."""
    tally.advance.remote(_worker(), images)


def fall(tally: Any, reason: str) -> None:
    """Tell the tally why this process is about to end itself."""
    ray.get(tally.fall.remote(_worker(), reason))


def _worker() -> str:
    return ray.get_runtime_context().get_worker_id()


def _told(deaths: list[Held]) -> str:
    last = deaths[-1]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    reason = last.reason or "killed, as for lack of memory, or crashed"
    return (
        f"{len(deaths)} processes of {last.stage} died one after the other, with image "
        f"{last.block} and its block; the last, on node {addresses.get(last.node)}: {reason}"
    )
