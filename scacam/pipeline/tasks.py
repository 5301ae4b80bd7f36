"""Work on many things at once, where it is no stream of images."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import ray
import ray.exceptions

from scacam.pipeline.cluster import await_nodes, start_ray

__all__ = ["added_in_tasks", "in_tasks"]

Item = TypeVar("Item")
Found = TypeVar("Found")

_AHEAD = 2
_ADDED = 16


def in_tasks(work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """What each item comes to, in their order; no more are on the way than keep all CPUs busy.

    Ray is started if it was not, and of a cluster the first worker waited for.

    Raises:
        Exception: what the work raised, as it was raised there.
    """
    _start()
    shared = ray.put(work)
    task: Any = ray.remote(lambda work, item: work(item))
    under_way: deque[ray.ObjectRef] = deque()
    with _ending(under_way):
        for item in items:
            if len(under_way) >= _room():
                yield ray.get(under_way.popleft())
            under_way.append(task.remote(shared, item))
        while under_way:
            yield ray.get(under_way.popleft())


def added_in_tasks(
    work: Callable[[Item], Found], add: Callable[..., Found], items: Iterable[Item]
) -> Callable[[], Found]:
    """What all items come to, added up in tasks as well: nothing of it is held here.

    Args:
        work: what is made of an item.
        add: the sum of several of these, which are given in the order of their items.
        items: at least one.

    Returns:
        A call that gets the sum, in this process or in tasks.

    Raises:
        Exception: what the work raised, as it was raised there.
    """
    _start()
    each, several = ray.put(work), ray.put(add)
    # The first of what a task returns says only how it ended.
    task: Any = ray.remote(num_returns=2)(lambda work, *given: (None, work(*given)))
    under_way: deque[ray.ObjectRef] = deque()

    def begin(*given: object) -> ray.ObjectRef:
        end, found = task.remote(*given)
        under_way.append(end)
        return found

    parts: list[ray.ObjectRef] = []
    with _ending(under_way):
        for item in items:
            while len(under_way) >= _room():
                ray.get(under_way.popleft())
            parts.append(begin(each, item))
            if len(parts) == _ADDED:
                parts = [begin(several, *parts)]
        if len(parts) > 1:
            parts = [begin(several, *parts)]
        while under_way:
            ray.get(under_way.popleft())
    get: Callable[..., Any] = ray.get
    return partial(get, parts[0])


def _start() -> None:
    start_ray()
    if not ray.cluster_resources().get("CPU"):
        await_nodes(0)


def _room() -> float:
    """For so many tasks at a time."""
    return _AHEAD * ray.cluster_resources().get("CPU", 1)


@contextmanager
def _ending(under_way: Iterable[ray.ObjectRef]) -> Iterator[None]:
    """Raise what tasks raise as they did, and let none go on in vain."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        error.cause.add_note(str(error))  # where it was raised
        raise error.cause from None
    finally:
        for waiting in under_way:
            ray.cancel(waiting)
