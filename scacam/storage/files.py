"""Where files are: a path, local or on object storage, to a filesystem and the path on it."""

import io
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, TypeVar
from urllib.parse import unquote

from pyarrow import fs

__all__ = [
    "OUT_OF_REACH", "PATIENCE_S", "absolute", "delete", "is_transient", "join", "locate",
    "patiently", "read_ahead", "read_bytes", "uri_of", "write_bytes", "writing",
]  # fmt: skip

Item = TypeVar("Item")
Content = TypeVar("Content")

_READERS = 16
_READ_AHEAD = 32

PATIENCE_S = 120.0
"""How long a store may fail before a job gives up on it."""

OUT_OF_REACH = "store out of reach"
"""How the message of a transient error begins, for who retries by messages."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PACKAGES = {
    "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "gcs": "gcsfs", "gs": "gcsfs",
    "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec",
}  # fmt: skip
_first_use = threading.Lock()  # lru_cache alone lets threads that come at once build one each


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that holds a path, and the path as that filesystem wants it.

    Args:
        path: a local path; `file://` with the path percent-encoded; `s3://bucket/key` (or `s3a://`)
            with the key as it is, never percent-encoded; or what the packages of fsspec know by
            `gs://`, `az://`, `abfs://`, `hf://`, `http://` and `https://`. Credentials, region and
            `AWS_ENDPOINT_URL` are taken from the environment.

    Raises:
        OSError: the bucket cannot be reached.
        ValueError: the scheme is unknown, or its package is not installed.
    """
    found = _SCHEME.match(path)
    if not found:
        return fs.LocalFileSystem(), os.path.abspath(path)
    scheme, rest = found[1].lower(), path[found.end() :]
    host, slash, inner_path = rest.partition("/")
    if scheme == "file":
        if host not in ("", "localhost"):
            raise ValueError(f"{path} is on another host")
        return fs.LocalFileSystem(), unquote(slash + inner_path)
    if scheme in ("s3", "s3a"):
        if not host:
            raise ValueError(f"{path} names no bucket")
        from scacam.storage.s3 import open_bucket  # half a second that local files need not cost

        with _first_use:
            return open_bucket(host), rest
    if scheme not in _PACKAGES:
        known = ", ".join(["file", "s3", "s3a", *_PACKAGES])
        raise ValueError(f"{path}: scheme {scheme}:// is unknown; known are {known}")
    from scacam.storage.stores import open_store

    with _first_use:
        return open_store(path, _PACKAGES[scheme])


def uri_of(source: str, inner_path: str) -> str:
    """What `locate` takes for a path on the filesystem of `source`."""
    found = _SCHEME.match(source)
    scheme = found[1].lower() if found else "file"
    if scheme == "file" or _SCHEME.match(inner_path):  # fsspec's paths of http:// begin with it
        return inner_path
    return f"{'s3' if scheme == 's3a' else scheme}://{inner_path}"


def absolute(path: str) -> str:
    """The same path for processes with another working folder, such as Ray's workers.

    Raises:
        OSError, ValueError: as `locate`.
    """
    return uri_of(path, locate(path)[1])


def join(folder: str, *names: str) -> str:
    """Join path components with `/`, on any filesystem."""
    return "/".join([folder.rstrip("/"), *names])


def read_bytes(path: str, offset: int | None = None, size: int | None = None) -> bytes:
    """The content of a file, or `size` bytes of it from an offset.

    Raises:
        FileNotFoundError: it is not there.
        PermissionError: the credentials do not allow it.
        ConnectionError: the store was throttling or out of reach; reading again may succeed.
        OSError: anything else.
    """
    if size == 0:
        return b""
    filesystem, inner_path = locate(path)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return filesystem.handler.read(inner_path, offset, size)
    with filesystem.open_input_file(inner_path) as file:
        return file.read() if offset is None or size is None else file.read_at(size, offset)


def write_bytes(path: str, content: bytes) -> None:
    """Write a file, all of it or nothing, in a folder that is made if need be.

    Raises:
        OSError: as `read_bytes`.
    """
    filesystem, inner_path = locate(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        with writing(f"{inner_path}.new") as file:
            file.write(content)
        os.replace(f"{inner_path}.new", inner_path)
    else:
        filesystem.handler.write(inner_path, content)


def delete(path: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing if it is not there.

    Raises:
        OSError: as `read_bytes`.
    """
    filesystem, inner_path = locate(path)
    kind = filesystem.get_file_info(inner_path).type
    if kind == fs.FileType.Directory:
        filesystem.delete_dir(inner_path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(inner_path)


@contextmanager
def writing(path: str) -> Iterator[IO[bytes]]:
    """A file to write, in a folder that is made if need be.

    On a store it is there when the context ends without an error, by one request.

    Raises:
        OSError: as `read_bytes`.
    """
    filesystem, inner_path = locate(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        os.makedirs(os.path.dirname(inner_path), exist_ok=True)
        with open(inner_path, "wb") as file:
            yield file
    else:
        buffer = io.BytesIO()
        yield buffer
        filesystem.handler.write(inner_path, buffer.getvalue())


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
    """Whether trying again later may succeed: the store was throttling, or out of reach."""
    return isinstance(error, ConnectionError)


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
