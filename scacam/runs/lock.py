"""One job at a time on an output: an flock on local disk, a lease on object storage.

A lock of a dead job never blocks the next: the kernel drops an flock with its process, and a lease
that nobody has renewed for its duration is taken over.
"""

import _thread
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyarrow import fs

from scacam.errors import RunError
from scacam.storage import join, locate

__all__ = ["locked"]

_LEASE_S = 30.0
_RENEWAL_S = 8.0
_SETTLING_S = 2.0
_BUSY = "another job is writing to {}; wait until it has ended"

logger = logging.getLogger("scacam")


@contextmanager
def locked(output: str) -> Iterator[None]:
    """Hold the output's lock inside this context.

    Raises:
        RunError: another job holds it.
    """
    filesystem, path = locate(join(output, ".lock"))
    if isinstance(filesystem, fs.LocalFileSystem):
        with _flock(path, output):
            yield
    else:
        with _lease(filesystem, path, output):
            yield


@contextmanager
def _flock(path: str, output: str) -> Iterator[None]:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(_BUSY.format(output)) from error
        yield


@contextmanager
def _lease(filesystem: fs.FileSystem, path: str, output: str) -> Iterator[None]:
    owner = f"{os.uname().nodename} {uuid.uuid4()}"
    _wait_out(filesystem, path, output)
    _write(filesystem, path, owner)
    time.sleep(_SETTLING_S)  # of two that began at once, the one that wrote last stays
    if not _read(filesystem, path).startswith(owner):
        raise RunError(_BUSY.format(output))
    released = threading.Event()

    def renew() -> None:
        while not released.wait(_RENEWAL_S):
            try:
                if not _read(filesystem, path).startswith(owner):
                    logger.critical("lost the lease of %s to another job; stopping", output)
                    _thread.interrupt_main()
                    return
                _write(filesystem, path, owner)
            except OSError as error:
                logger.warning("cannot renew the lease of %s: %s", output, error)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        with suppress(OSError):  # a store that is gone: the lease runs out by itself
            filesystem.delete_file(path)


def _wait_out(filesystem: fs.FileSystem, path: str, output: str) -> None:
    """Return when no lease is held: at once, or when an abandoned one has run out."""
    first = _read(filesystem, path)
    if not first:
        return
    logger.info("waiting up to %.0f s to see whether the last job on %s lives", _LEASE_S, output)
    deadline = time.monotonic() + _LEASE_S
    while time.monotonic() < deadline:
        time.sleep(1)
        now = _read(filesystem, path)
        if not now:
            return
        if now != first:
            raise RunError(_BUSY.format(output))


def _read(filesystem: fs.FileSystem, path: str) -> str:
    try:
        with filesystem.open_input_stream(path) as file:
            return file.read().decode()
    except FileNotFoundError:
        return ""


def _write(filesystem: fs.FileSystem, path: str, owner: str) -> None:
    with filesystem.open_output_stream(path) as file:
        file.write(f"{owner} {time.time()}".encode())
