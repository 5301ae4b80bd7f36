"""Work on many things at once, where it is no stream of images."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
import ray.exceptions

from scacam.pipeline.cluster import await_nodes, start_ray

__all__ = ["in_tasks"]

Item = TypeVar("Item")
Found = TypeVar("Found")

_AHEAD = 2


def in_tasks(work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """What each item comes to, in their order; no more are on the way than keep all CPUs busy.

    Ray is started if it was not, and of a cluster the first worker waited for.

    Raises:
        Exception: what the work raised, as it was raised there.
    """
    start_ray()
    if not ray.cluster_resources().get("CPU"):
        await_nodes(0)
    shared = ray.put(work)
    task: Any = ray.remote(lambda work, item: work(item))
    under_way: deque[ray.ObjectRef] = deque()
    try:
        for item in items:
            if len(under_way) >= _AHEAD * ray.cluster_resources().get("CPU", 1):
                yield ray.get(under_way.popleft())
            under_way.append(task.remote(shared, item))
        while under_way:
            yield ray.get(under_way.popleft())
    except ray.exceptions.RayTaskError as error:
        error.cause.add_note(str(error))  # where it was raised
        raise error.cause from None
    finally:
        for waiting in under_way:
            ray.cancel(waiting)
