"""What memory a process holds, which only one that does nothing else can tell."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

P, T = ParamSpec("P"), TypeVar("T")


def held_now() -> int:
    """Bytes."""
    return _status("VmRSS")


def most_held() -> int:
    """Bytes. Not `ru_maxrss`, which a process inherits from the one that started it."""
    return _status("VmHWM")


def _status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0])


def alone(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a test module in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        return child.submit(function, *args, **kwargs).result()
