"""Ray: where the job runs, and what of it each network gets."""

import atexit
import ctypes
import itertools
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
from ray.autoscaler.sdk import request_resources

from scacam.errors import NetworkError, RunError

if TYPE_CHECKING:
    from scacam.networks import Network

__all__ = [
    "ENVIRONMENT",
    "TASK_CPUS",
    "await_nodes",
    "cores",
    "keep_freed_memory",
    "own_cores",
    "ray_starting",
    "root_cause",
    "share",
    "start_ray",
]

_EMBEDDED_CPUS_MIN = 4
_JOINING_S = 15 * 60
_LOOK_S = 2
_NODE_CPUS_MIN = 2
_EXCEPTION = re.compile(r"([A-Za-z_][\w.<>]*)(?:: (.*))?")

TASK_CPUS = 0.4505
"""What a task that decodes or writes reserves: it shares its core with an explaining actor.

No actor reserves as much, for these reserve whole thousandths: Ray would run decoding inside of it.
Less, and so many processes start that they cost more than they do.
"""

_KEPT = 1 << 30

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # Ray calls an actor in a thread, and only the main arena grows freely
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # asks for pages of 2 MB where there are any
}
"""For processes that have not started yet: memory that one batch frees is kept for the next.

By default glibc gives the tensors of a batch back to the system, and the next batch takes them
anew, page by page: up to half of the CPU time of a network. Large pages take off another 4 to 13 %.
On other systems nothing changes.
"""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h

logger = logging.getLogger("scacam")

_started: Future[None] | None = None


def start_ray() -> None:
    """Join the cluster of `RAY_ADDRESS`, which `ray job submit` sets, or start one of our own.

    Ray's own search for a cluster is left out: it also finds one inside another job of this
    machine, which ends with that job.
    """
    ray_starting()()


def ray_starting() -> Callable[[], object]:
    """Do what `start_ray` does beside something else: what is returned waits for its end.

    It takes seconds, and most of them go by in other processes.
    """
    global _started
    if _started is None or (_started.done() and not ray.is_initialized()):
        _started = Future()
        threading.Thread(target=_start, args=(_started,), daemon=True).start()
        atexit.register(_started.exception)  # waits: to end a Ray that is half there may crash
    return _started.result


def _start(started: Future[None]) -> None:
    try:
        if not ray.is_initialized():
            _init()
    except BaseException as error:
        started.set_exception(error)
    else:
        started.set_result(None)
        threading.Event().wait()  # Ray's processes end with the thread that started them


def _init() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"env_vars": ENVIRONMENT}, **quiet)
    else:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are for operators
        cpus = max(own_cores(), _EMBEDDED_CPUS_MIN)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as well


def await_nodes(gpus: int | None) -> int:
    """Wait until the cluster has what the job was promised.

    A cluster that was just started is its head alone, without CPUs, and its workers join one by
    one over some minutes. If it can grow, it is told what is waited for. What its configuration
    allows for, Ray does not tell a job: only `gpus` says how many to wait for.

    Args:
        gpus: how many GPUs to wait for; None for those that are there with the first worker.

    Returns:
        How many GPUs to use.

    Raises:
        RunError: they do not come, or no node has a CPU to spare for Ray Data's own tasks, without
            which the job would wait for ever.
    """
    grows = bool(os.environ.get("RAY_ADDRESS"))
    wanted = [{"CPU": _NODE_CPUS_MIN}] + [{"GPU": 1}] * (gpus or 0)
    deadline = time.monotonic() + (_JOINING_S if grows else 0)
    asked = False
    try:
        while lacking := _lacking(gpus):
            if time.monotonic() >= deadline:
                waited = f"after {_JOINING_S / 60:.0f} minutes of waiting, " if grows else ""
                raise RunError(waited + lacking)
            if not asked:
                logger.info("%s; waiting for nodes to join", lacking)
                request_resources(bundles=wanted)
                asked = True
            time.sleep(_LOOK_S)
    finally:
        if asked:  # else the cluster would stay as large after the job
            request_resources(bundles=[])
    there = int(ray.cluster_resources().get("GPU", 0))
    if gpus is None and grows:
        logger.info(
            "%d GPUs and %d cores are there, and the run is made for these; --gpus N waits for N",
            there,
            cores(),
        )
    return there if gpus is None else gpus


def _lacking(gpus: int | None) -> str | None:
    """What the cluster has not, and what to do about it; None if nothing."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if max(resources.get("CPU", 0) for resources in nodes) < _NODE_CPUS_MIN:
        return (
            f"no node of the cluster has {_NODE_CPUS_MIN} CPUs; give one at least so many logical "
            "CPUs (ray start --num-cpus)"
        )
    there = int(sum(resources.get("GPU", 0) for resources in nodes))
    if there < (gpus or 0):
        return (
            f"the cluster has {there} of {gpus} GPUs; `ray status` says why the others do not "
            f"come, and --gpus {there} does without them"
        )
    return None


def cores() -> int:
    """The cores of the cluster."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    # An embedded Ray may have been given more logical CPUs than there are cores.
    nodes = ray.nodes()
    return min(cpus, own_cores()) if len(nodes) == 1 else cpus


def own_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may use: of a container or a batch job, not of its machine.

    Args:
        cgroup: where Linux tells of the control group, in version 2 or 1.
    """
    allowed = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if int(quota) > 0:
                return min(len(allowed), math.ceil(int(quota) / int(period)))
    return len(allowed)


def share(network: "Network") -> "Callable[[], Network]":
    """What a process calls to get a network.

    Args:
        network: one that can be pickled, or that `load_network` made: a module that holds a lock or
            a parametrization is built anew from its name and weights in each process.

    Raises:
        NetworkError: in that process, if what is built there has other weights.
    """
    try:
        held = ray.put(network)
        return lambda: ray.get(held)
    except Exception as error:  # whatever a module holds may raise anything
        if network.rebuild is None:
            raise
        reason = str(error.__cause__ or error).partition("\n")[0]
        logger.info("%s is built anew in each process (%s)", network.name, reason)
        return partial(_rebuilt, network.rebuild, network.digest())


def _rebuilt(rebuild: "Callable[[], Network]", digest: str) -> "Network":
    network = rebuild()
    if network.digest() != digest:
        raise NetworkError(
            f"{network.name} cannot be pickled and has other weights each time that it is made; "
            "give them as a checkpoint"
        )
    return network


def root_cause(error: BaseException) -> str:
    """What Ray's errors, wrapped into one another, go back to, in one line.

    Of our own errors that is the message alone, of others their type with it.
    """
    chain = [error]
    while inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__:
        chain.append(inner)
    told = [one for one in reversed(chain) if str(one).strip()]
    for one in told:
        if found := _raised(one):
            module, _, name = found[0].rpartition(".")
            message = found[1]
            return message if module == RunError.__module__ else f"{name}: {message}".strip(": ")
    gone = told[0] if told else error  # no exception was raised: a process, a node or an object is
    lines = str(gone).strip().splitlines() or [type(gone).__name__]
    last = isinstance(gone, ray.exceptions.RayActorError)  # whose first lines are about the actor
    return lines[-1 if last else 0].partition(" Worker exit type:")[0]


def _raised(error: BaseException) -> tuple[str, str] | None:
    """The full name of the exception that an error stands for, and its message's first line.

    Of what was raised in a worker there may be no more than the text of its traceback: stack by
    stack, each with its exception at its end. What Ray wraps it into comes after it.
    """
    lines = str(error).strip().splitlines()
    if not isinstance(error, ray.exceptions.RayError):  # Ray appends lines to its message
        return f"{type(error).__module__}.{type(error).__qualname__}", lines[0]
    found = [
        match
        for above, line in itertools.pairwise(lines)
        if above.startswith(" ") and (match := _EXCEPTION.fullmatch(line))
    ]
    theirs = [match for match in found if not match[1].startswith("ray.")] or found[:1]
    return (theirs[-1][1], theirs[-1][2] or "") if theirs else None


def keep_freed_memory() -> None:
    """What `ENVIRONMENT` does, but for large pages, for this process and its main thread."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_MAX, 0)
