"""Tar files, packed by gzip or not: where their members lie, and what cannot be read."""

import gzip
import io
import os
import posixpath
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from threading import Lock
from typing import IO, Any, NamedTuple

import pyarrow as pa

from scacam.storage import locate, read_bytes

__all__ = ["DamagedShard", "Entry", "entries", "read_entry"]

_BUFFER = 4 << 20
_GZIP = b"\x1f\x8b"
_DAMAGES = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError)

_one_at_a_time = Lock()


class DamagedShard(OSError):
    """A shard is cut short, or no tar, or has something in it that is none."""


class Entry(NamedTuple):
    """A file in a tar.

    Attributes:
        name: its path there.
        offset: where its bytes begin; None in a packed tar, and of a link to nothing.
        size: how many; None of a link to nothing.
        content: its bytes, if they were wanted.
    """

    name: str
    offset: int | None
    size: int | None
    content: bytes | None


def entries(container: str, wanted: Callable[[str, int], bool]) -> Iterator[Entry]:
    """The files in a tar, in its order, links resolved.

    The tar is read from its beginning to its end in large pieces; members that are larger are
    passed over.

    Args:
        container: where it is.
        wanted: whether the content of a file of this name and size is wanted, too.

    Raises:
        DamagedShard: at the end of what can be read.
        OSError: it cannot be read, as the filesystem says.
    """
    with _opened(container) as (file, is_packed):
        for entry in _scan(container, file, wanted):
            yield entry._replace(offset=None) if is_packed else entry


def read_entry(container: str, name: str) -> bytes:
    """The bytes of a file in a tar, by its name there; a packed tar is unpacked on the disk first.

    Raises:
        FileNotFoundError: there is none of this name.
        OSError: the tar cannot be read.
    """
    with _one_at_a_time:
        index, unpacked = _index(container)
    entry = index.get(name)
    if entry is None or entry.offset is None or entry.size is None:
        raise FileNotFoundError(f"{container} has no member {name}")
    if unpacked is None:
        return read_bytes(container, entry.offset, entry.size)
    return os.pread(unpacked.fileno(), entry.size, entry.offset)


@lru_cache(maxsize=2)
def _index(container: str) -> tuple[dict[str, Entry], IO[bytes] | None]:
    """The entries by name; of a packed tar also the temporary file that it was unpacked to."""
    with _opened(container) as (file, is_packed):
        unpacked = _unpack(file) if is_packed else None
        index = {}
        with suppress(DamagedShard):
            for entry in _scan(container, unpacked or file, lambda name, size: False):
                index[entry.name] = entry
    return index, unpacked


def _unpack(file: IO[bytes]) -> IO[bytes]:
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115, closed when it is forgotten
    with suppress(*_DAMAGES):  # what lies before a damage is good
        while piece := file.read1(_BUFFER):  # type: ignore[attr-defined]
            unpacked.write(piece)
    unpacked.seek(0)
    return unpacked


@contextmanager
def _opened(container: str) -> Iterator[tuple[IO[bytes], bool]]:
    """A tar to read from, and whether it is packed, whatever its name says."""
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        # A request each time that the buffer is empty.
        buffered: Any = io.BufferedReader(_Seekable(file), _BUFFER)
        is_packed = buffered.peek(len(_GZIP)).startswith(_GZIP)
        opened: Any = gzip.GzipFile(fileobj=buffered) if is_packed else buffered
        yield opened, is_packed


class _Seekable(io.RawIOBase):
    """A file beyond whose end one may seek, as in a cut tar; object stores refuse it."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file, self._size = file, file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(min(offset, self._size), whence)

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)


def _scan(container: str, file: IO[bytes], wanted: Callable[[str, int], bool]) -> Iterator[Entry]:
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (found := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # which would hold the whole index
                offset: int | None = found.offset_data
                size: int | None = found.size
                content = None
                if found.isreg():
                    places[found.name] = found.offset_data, found.size
                    if wanted(found.name, found.size):
                        opened = tar.extractfile(found)
                        content = opened.read() if opened else None
                elif found.islnk() or found.issym():
                    target = found.linkname
                    if found.issym():
                        folder = posixpath.dirname(found.name)
                        target = posixpath.normpath(posixpath.join(folder, target))
                    offset, size = places.get(target, (None, None))
                else:
                    continue
                yield Entry(found.name, offset, size, content)
            file.seek(tar.offset)
            while piece := file.read(_BUFFER):
                if piece.strip(b"\0"):  # tarfile ends without a word at what is no header
                    raise DamagedShard(f"{container} is damaged: no member begins at {tar.offset}")
    except _DAMAGES as error:
        raise DamagedShard(
            f"{container} is no tar file, or it is damaged or cut short: {error}"
        ) from error
