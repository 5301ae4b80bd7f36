"""Where files are: a path, local or on object storage, to a filesystem and the path on it."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

from pyarrow import fs

from scacam.storage import s3

__all__ = ["PATIENCE_S", "is_transient", "join", "locate", "patiently", "read_ahead", "read_bytes"]

Item = TypeVar("Item")
Content = TypeVar("Content")

_READERS = 16
_READ_AHEAD = 32

PATIENCE_S = 120.0
"""How long a store may fail before a job gives up on it."""

_TRANSIENT = (
    "NETWORK_CONNECTION", "SLOW_DOWN", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "THROTTLING",
    "REQUEST_TIMEOUT", "HTTP status 429", "HTTP status 50", "curlCode", "imed out",
)  # fmt: skip


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that holds a path, and the path as that filesystem wants it.

    Args:
        path: a local path, or `s3://bucket/key` with the key as it is, never percent-encoded.
            Credentials, region and `AWS_ENDPOINT_URL` are taken from the environment.

    Raises:
        OSError: the bucket cannot be reached.
        ValueError: the scheme is unknown.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return fs.LocalFileSystem(), os.path.abspath(path)
    host, _, key = rest.partition("/")
    return _filesystem(scheme, host), f"{host}/{key}" if scheme == "s3" else f"/{key}"


@lru_cache(maxsize=32)
def _filesystem(scheme: str, host: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(f"{scheme}://{host or '/'}")[0]


def join(folder: str, *names: str) -> str:
    """Join path components with `/`, on any filesystem."""
    return "/".join([folder.rstrip("/"), *names])


def read_bytes(path: str, offset: int | None = None, size: int | None = None) -> bytes:
    """The content of a file, or `size` bytes of it from an offset.

    Raises:
        OSError: it cannot be read; a FileNotFoundError if it is not there.
    """
    if size == 0:
        return b""
    filesystem, inner_path = locate(path)
    if isinstance(filesystem, fs.S3FileSystem) and s3.can_read(inner_path):
        bucket, _, key = inner_path.partition("/")
        return s3.read_object(bucket, filesystem.region, key, offset, size)
    with filesystem.open_input_file(inner_path) as file:
        return file.read() if offset is None or size is None else file.read_at(size, offset)


def read_ahead(read: Callable[[Item], Content], items: Iterable[Item]) -> Iterator[Content]:
    """What `read` gives for each item, in order, read by threads ahead of use but never much."""
    ahead: deque[Future[Content]] = deque()
    with ThreadPoolExecutor(_READERS) as threads:
        for item in items:
            ahead.append(threads.submit(read, item))
            if len(ahead) > _READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def is_transient(error: Exception) -> bool:
    """Whether reading again later may succeed: the store was throttling, or out of reach."""
    return isinstance(error, ConnectionError) or any(sign in str(error) for sign in _TRANSIENT)


def patiently(action: Callable[[], None]) -> None:
    """Do something that may be done again, until the store lets it or patience ends.

    Raises:
        OSError: the error is not transient, or the store has failed for `PATIENCE_S`.
    """
    deadline, wait = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return action()
        except OSError as error:
            if not is_transient(error) or time.monotonic() + wait > deadline:
                raise
            time.sleep(wait)
            wait = min(2 * wait, 10.0)
