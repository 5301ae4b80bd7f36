"""Stores other than the local disk, by fsspec, as the filesystems that pyarrow and Ray know."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import aiohttp
import fsspec
import pyarrow as pa
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import (
    HTTPClientError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
from botocore.parsers import ResponseParserError
from fsspec.implementations.http import HTTPFileSystem
from pyarrow import fs

from scacam.storage.files import OUT_OF_REACH

__all__ = ["Store", "errors_of_the_store", "http_status", "open_store"]

_TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=5, sock_read=15)
_SETTLING_S = 2.0
_THREADS = 16

_OUT_OF_REACH = (
    aiohttp.ClientError, BotoConnectionError, HTTPClientError, MetadataRetrievalError,
    ResponseParserError, TimeoutError,
)  # fmt: skip
_WRONG = aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError
_NOT_ALLOWED = (
    NoCredentialsError, PartialCredentialsError, TokenRetrievalError, UnauthorizedSSOTokenError,
)  # fmt: skip


def open_store(path: str, package: str) -> tuple[fs.FileSystem, str]:
    """The store that holds a path, by fsspec's implementation of its scheme, and the path there.

    Raises:
        ValueError: `package`, which implements the scheme, is not installed.
    """
    scheme = path.partition("://")[0].lower()
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ValueError(f"{scheme}:// takes a package: pip install {package}") from error
    return _store(kind, **kind._get_kwargs_from_urls(path)), kind._strip_protocol(path)


@lru_cache(maxsize=32)
def _store(kind: type[fsspec.AbstractFileSystem], **options: Any) -> fs.FileSystem:
    if issubclass(kind, HTTPFileSystem):
        options["client_kwargs"] = {"timeout": _TIMEOUT}
    with errors_of_the_store():
        return fs.PyFileSystem(Store(kind(use_listings_cache=False, **options)))


class Store(fs.FSSpecHandler):
    """One of fsspec's filesystems, its paths taken as they are and its errors as OSErrors.

    FSSpecHandler asks before it acts, and takes `*`, `?` and `[` in a path for a pattern.
    """

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """What is there."""
        with errors_of_the_store():
            return super().get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """What is in a folder."""
        with errors_of_the_store():
            return super().get_file_info_selector(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a store has no folders, and a role for some prefix may not ask for others."""

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        with errors_of_the_store():
            self.fs.rm_file(path)

    def delete_dir(self, path: str) -> None:
        """Delete all files of a folder."""
        with errors_of_the_store(), ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(self.fs.rm_file, self.fs.find(path)))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """The same, as the folder is nothing beside its files."""
        self.delete_dir(path)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy a file."""
        with errors_of_the_store():
            self.fs.cp_file(src, dest)

    def move(self, src: str, dest: str) -> None:
        """Copy a file, then delete it."""
        self.copy_file(src, dest)
        self.delete_file(src)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """A file to read from its beginning to its end."""
        with errors_of_the_store():
            return super().open_input_stream(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file to read here and there."""
        with errors_of_the_store():
            return super().open_input_file(path)

    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pa.NativeFile:
        """A file to write."""
        with errors_of_the_store():
            return super().open_output_stream(path, metadata)

    def read(self, path: str, offset: int | None = None, size: int | None = None) -> bytes:
        """A file, or `size` bytes of it from an offset, in one request."""
        end = None if offset is None or size is None else offset + size
        with errors_of_the_store():
            return self.fs.cat_file(path, start=None if end is None else offset, end=end)

    def write(self, path: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        with errors_of_the_store():
            self.fs.pipe_file(path, content)

    def fetch(self, path: str) -> tuple[bytes, str | None]:
        """A small file and the tag of this version of it; nothing and None if it is not there."""
        try:
            content = self.read(path)
        except FileNotFoundError:
            return b"", None
        return content, content.hex()

    def swap(self, path: str, content: bytes, tag: str | None) -> str | None:
        """Write a small file if its version is still the one of a tag (None: not there).

        Without the store's help: of two that write at once the last one stays, and either looks
        again after a while.

        Returns:
            The tag of the new version, or None if another was there or came in between.
        """
        if self.fetch(path)[1] != tag:
            return None
        self.write(path, content)
        return self.settled(path, content)

    def settled(self, path: str, content: bytes) -> str | None:
        """The tag of what was written, if it is still there after a while."""
        time.sleep(_SETTLING_S)
        found, tag = self.fetch(path)
        return tag if found == content else None


@contextmanager
def errors_of_the_store() -> Iterator[None]:
    """Whatever a store's library raises, as the OSError that says what it means.

    Raises:
        FileNotFoundError: there is no such file or bucket.
        PermissionError: the credentials do not allow it, or there are none.
        ConnectionError: the store was throttling or out of reach; trying again may succeed.
        OSError: anything else.
    """
    try:
        yield
    except Exception as error:
        kind = _kind(error)
        if isinstance(error, kind):
            raise
        told = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{OUT_OF_REACH}: {told}" if kind is ConnectionError else told) from error


def _kind(error: Exception) -> type[OSError]:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        gone = error.os_error.errno == socket.EAI_NONAME  # no such host, whenever one asks
        return OSError if gone else ConnectionError
    status = http_status(error) or http_status(error.__cause__)  # of s3fs's own error
    if status in (404, 410):
        return FileNotFoundError
    if status in (401, 403) or isinstance(error, _NOT_ALLOWED):
        return PermissionError
    if status in (408, 429) or (status >= 500 and status != 501):
        return ConnectionError
    passing = isinstance(error, _OUT_OF_REACH) and not isinstance(error, _WRONG)
    return ConnectionError if passing and not status else OSError


def http_status(error: Any) -> int:
    """The HTTP status behind an error of any of fsspec's libraries, 0 if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return 0
