"""Ray: where the job runs, and what of it each network gets."""

import ctypes
import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import ray.exceptions

from scacam.errors import RunError

__all__ = [
    "ENVIRONMENT",
    "TASK_CPUS",
    "Allotment",
    "allot",
    "cores",
    "divide",
    "keep_freed_memory",
    "root_cause",
    "rows_per_shard",
    "start_ray",
]

_ACTORS_PER_GPU = 2
_EMBEDDED_CPUS_MIN = 4
_NODE_CPUS_MIN = 2
_RAISED = re.compile(r"[\w.]+(Error|Exception): ")
_SHARD_ROWS_MAX = 512

TASK_CPUS = 0.45
"""What a task that decodes or writes reserves: it shares its core with an explaining actor.

As much as such an actor reserves, half a core, and Ray would run decoding inside of it. Less, and
so many processes start that they cost more than they do.
"""

_KEPT = 1 << 30

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # Ray calls an actor in a thread, and only the main arena grows freely
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
}
"""For processes that have not started yet: memory that one batch frees is kept for the next.

By default glibc gives the tensors of a batch back to the system, and the next batch takes them
anew, page by page: up to half of the CPU time of a network. On other systems nothing changes.
"""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


class Allotment(NamedTuple):
    """What a network's pool gets: so many actors, each with so many CPUs and GPUs."""

    actors: int
    num_cpus: float
    num_gpus: float


def start_ray() -> None:
    """Join the cluster of `RAY_ADDRESS`, which `ray job submit` sets, or start one of our own.

    Ray's own search for a cluster is left out: it also finds one inside another job of this
    machine, which ends with that job.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"env_vars": ENVIRONMENT}, **quiet)
    else:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are for operators
        cpus = max(os.cpu_count() or 1, _EMBEDDED_CPUS_MIN)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def allot(costs: Sequence[float]) -> list[Allotment]:
    """Divide the cluster among the pools of a chain, which all hold their actors at once.

    The slowest pool sets the pace of all, so a network that costs more gets more actors. On a GPU
    there are two actors, or more where networks outnumber them: while one packs its heatmaps, the
    other computes. Without GPUs, there are as many actors as cores, each with one thread, and half
    of the logical CPUs are left to the tasks that decode and write.

    Args:
        costs: what an image costs each network, in any unit.

    Raises:
        RunError: no node has a CPU to spare for Ray Data's own tasks; the job would wait for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if max(resources.get("CPU", 0) for resources in nodes) < _NODE_CPUS_MIN:
        raise RunError(
            f"no node of the cluster has {_NODE_CPUS_MIN} CPUs; give one at least so many logical "
            "CPUs (ray start --num-cpus)"
        )
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus:
        per_gpu = max(_ACTORS_PER_GPU, math.ceil(len(costs) / gpus))
        share = _share(1, per_gpu)
        return [Allotment(actors, share, share) for actors in divide(gpus * per_gpu, costs)]
    cpus = cores()
    sizes = divide(cpus, costs)
    num_cpus = min(0.5, _share(cpus, 2 * sum(sizes)))
    return [Allotment(actors, num_cpus, 0.0) for actors in sizes]


def divide(workers: int, costs: Sequence[float]) -> list[int]:
    """So many workers among pools of these costs, at least one each: the fastest chain there is."""
    sizes = [1] * len(costs)
    for _ in range(workers - len(costs)):
        slowest = max(range(len(costs)), key=lambda pool: costs[pool] / sizes[pool])
        sizes[slowest] += 1
    return sizes


def cores() -> int:
    """The cores of the cluster."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    # An embedded Ray may have been given more logical CPUs than there are cores.
    nodes = ray.nodes()
    return min(cpus, os.cpu_count() or 1) if len(nodes) == 1 else cpus


def _share(whole: float, parts: int) -> float:
    return math.floor(1000 * whole / parts) / 1000


def rows_per_shard(images: int, actors: int) -> int:
    """Images per shard: four shards per actor in a small run, a bounded size in a large one."""
    return max(1, min(math.ceil(images / (4 * actors)), _SHARD_ROWS_MAX))


def root_cause(error: BaseException) -> str:
    """What Ray's errors, wrapped into one another, go back to, in one line."""
    chain = [error]
    while inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__:
        chain.append(inner)
    told = next((one for one in reversed(chain) if str(one).strip()), error)
    lines = str(told).strip().splitlines() or ["no message"]
    if isinstance(told, ray.exceptions.RayError):  # it carries a worker's traceback as its text
        raised = [line for line in lines if _RAISED.match(line)]
        return (raised or lines)[-1]
    # Ray appends lines of its own to the message.
    return lines[0] if isinstance(told, RunError) else f"{type(told).__name__}: {lines[0]}"


def keep_freed_memory() -> None:
    """What `ENVIRONMENT` does, for this process and what its main thread allocates."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_MAX, 0)
