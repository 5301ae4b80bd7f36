"""One job at a time on an output: an flock on local disk, a lease on object storage.

A lock of a dead job never blocks the next: the kernel drops an flock with its process, and a lease
that nobody has renewed for its duration is taken over. A lease changes hands by compare-and-swap:
of two jobs that want it one wins, at once, and neither writes over the other's.
"""

import _thread
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from pyarrow import fs

from scacam.errors import RunError
from scacam.storage import join, locate

__all__ = ["locked"]

_LEASE_S = 30.0
_RENEWAL_S = 8.0
_FREE = b""
_BUSY = "another job is writing to {}; wait until it has ended"

logger = logging.getLogger("scacam")


@contextmanager
def locked(output: str) -> Iterator[None]:
    """Hold the output's lock inside this context.

    Raises:
        RunError: another job holds it, or has taken it over; or the output cannot be written.
    """
    with ExitStack() as held:
        try:
            filesystem, path = locate(join(output, ".lock"))
            if isinstance(filesystem, fs.LocalFileSystem):
                held.enter_context(_flock(path, output))
            else:
                held.enter_context(_lease(filesystem.handler, path, output))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot write to output {output}: {error}") from error
        yield


@contextmanager
def _flock(path: str, output: str) -> Iterator[None]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(_BUSY.format(output)) from error
        yield


@contextmanager
def _lease(store: Any, path: str, output: str) -> Iterator[None]:
    owner = f"{os.uname().nodename} {uuid.uuid4()}"

    def stamped() -> bytes:
        return f"{owner} {time.time()}".encode()

    tag = store.swap(path, stamped(), _tag_when_free(store, path, output))
    if tag is None:
        raise RunError(_BUSY.format(output))
    released, own = threading.Event(), True

    def put(content: bytes) -> bool:
        """Write over this job's own lease; False when it is another's by now."""
        nonlocal tag
        swapped = store.swap(path, content, tag)
        if swapped is None:  # also when an earlier renewal was written but not answered
            held, current = store.fetch(path)
            if not held.startswith(owner.encode()):
                return False
            swapped = store.swap(path, content, current)
        tag = swapped
        return swapped is not None

    def renew() -> None:
        nonlocal own
        while not released.wait(_RENEWAL_S):
            try:
                own = put(stamped())
                if not own:
                    _thread.interrupt_main()
                    return
            except OSError as error:
                logger.warning("cannot renew the lease of %s: %s", output, error)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            released.set()
            thread.join()
            with suppress(OSError):  # a store that is gone: the lease runs out by itself
                own = own and put(_FREE)
    except KeyboardInterrupt:
        if own:
            raise
    if not own:
        raise RunError(f"stopped: another job has taken over {output}")


def _tag_when_free(store: Any, path: str, output: str) -> str | None:
    """What to swap when no lease is held: at once, or when an abandoned one has run out."""
    content, first = store.fetch(path)
    if content == _FREE:
        return first
    logger.info("waiting up to %.0f s to see whether the last job on %s lives", _LEASE_S, output)
    deadline = time.monotonic() + _LEASE_S
    while time.monotonic() < deadline:
        time.sleep(1)
        content, tag = store.fetch(path)
        if content == _FREE:
            return tag
        if tag != first:
            raise RunError(_BUSY.format(output))
    return first
