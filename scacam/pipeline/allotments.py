"""What of the cluster each pool of a chain gets, and how many images travel together."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scacam.pipeline.cluster import cores

__all__ = ["Allotment", "Allotments", "allot", "divide", "rows_per_shard"]

_ACTOR_S = 5
"""What it takes a core to start an actor: torch is loaded, and the network."""
_ACTORS_PER_GPU = 2
_BLOCK_BYTES = 64_000_000
_BLOCK_S = 60
_BLOCK_MIN_S = 0.5
_CORES_PER_GPU = 10
"""What any GPU is worth at least: the costs are measured on a core, where there may be no GPU."""
_GPU_DECODE_S = 0.001
"""About what an image takes an actor that decodes on a GPU, with reading it."""
_SHARD_ROWS_MAX = 512
_SPARE = 1.2
"""Actors for each that its pool's costs ask for: these were measured on a few images."""


class Allotment(NamedTuple):
    """What a pool gets: so many actors, each with so many CPUs and GPUs."""

    actors: int
    num_cpus: float
    num_gpus: float


class Allotments(NamedTuple):
    """What all pools of a chain get: each network's, and that which decodes if tasks do not."""

    networks: list[Allotment]
    decoding: Allotment | None = None


def allot(costs: Sequence[float], gpus: int, images: int, gpu_decode: bool = False) -> Allotments:
    """Divide the cluster among the pools of a chain, which all hold their actors at once.

    The slowest pool sets the pace of all, so a network that costs more gets more actors. On a GPU
    there are two actors, or more where networks outnumber them: while one packs its heatmaps, the
    other computes. Without GPUs, an actor has one thread, and all of them share the cores: each
    pool has so many that it does not hold up the others, and half of the logical CPUs are left to
    the tasks that decode and write. In a small run there are fewer: each further actor is worth
    what it takes to start.

    Args:
        costs: seconds that an image takes each network on one core.
        gpus: how many of the cluster's GPUs to use.
        images: how many there are.
        gpu_decode: whether GPUs decode as well, with two actors to a GPU too: while one reads, the
            other decodes. All shares are alike, so that there is a place for each in whatever order
            they come; which GPU that is on, is left to Ray.
    """
    busy = [1 + int(images * cost / _ACTOR_S) for cost in costs]
    if gpus:
        per_gpu = max(_ACTORS_PER_GPU, math.ceil(len(costs) / gpus))
        share = _share(1, per_gpu + _ACTORS_PER_GPU * gpu_decode)
        decoders = min(gpus * _ACTORS_PER_GPU, 1 + int(images * _GPU_DECODE_S / _ACTOR_S))
        return Allotments(
            [
                Allotment(min(sizes), share, share)
                for sizes in zip(divide(gpus * per_gpu, costs), busy, strict=True)
            ],
            Allotment(decoders, share, share) if gpu_decode else None,
        )
    cpus = cores()
    needed = [math.ceil(_SPARE * cpus * cost / sum(costs)) for cost in costs]
    sizes = [min(cpus, *sizes) for sizes in zip(needed, busy, strict=True)]
    num_cpus = min(0.5, _share(cpus, 2 * sum(sizes)))
    return Allotments([Allotment(actors, num_cpus, 0.0) for actors in sizes])


def divide(workers: int, costs: Sequence[float]) -> list[int]:
    """So many workers among pools of these costs, at least one each: the fastest chain there is."""
    sizes = [1] * len(costs)
    for _ in range(workers - len(costs)):
        slowest = max(range(len(costs)), key=lambda pool: costs[pool] / sizes[pool])
        sizes[slowest] += 1
    return sizes


def _share(whole: float, parts: int) -> float:
    return math.floor(1000 * whole / parts) / 1000


def rows_per_shard(
    images: int, image_bytes: int, costs: Sequence[float], allotments: Sequence[Allotment]
) -> int:
    """Images per shard, and per block on its way there.

    Four shards per actor of the chain in a small run, if each is half a second of work: for less
    it does not pay that another process starts. In a large one a bounded number, of 64 MB and a
    minute of work at most: so many blocks fit into the memory beside one another, no lost one costs
    much, and none takes as long as the watchdog waits for a sign of life.

    Args:
        images: how many there are.
        image_bytes: of one image, as it travels through the stages.
        costs: seconds that an image takes each network on one core.
        allotments: what each network gets.
    """
    actors = max(allotment.actors for allotment in allotments)
    seconds = max(
        cost / (_CORES_PER_GPU if allotment.num_gpus else 1)
        for cost, allotment in zip(costs, allotments, strict=True)
    )
    bounds = _SHARD_ROWS_MAX, _BLOCK_BYTES // image_bytes, int(_BLOCK_S / seconds)
    everywhere = sum(allotment.actors for allotment in allotments)
    wanted = max(math.ceil(images / (4 * everywhere)), int(_BLOCK_MIN_S / seconds))
    rows = max(1, min(images, wanted, *bounds))
    if rows == images:
        return rows
    rounds = math.ceil(images / (rows * actors))
    return math.ceil(images / (rounds * actors))  # else in the last round some would have none
