"""Tar shards (WebDataset), packed by gzip or not: their images with labels, and what is damaged."""

import gzip
import io
import json
import os
import posixpath
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from threading import Lock
from typing import IO, Any, NamedTuple

import pyarrow as pa

from scacam.inputs.contents import IMAGE_SUFFIXES, Contents, images_of, unreadable
from scacam.inputs.listing import UNDECODABLE, is_utf8, suffix_of
from scacam.storage import locate, read_bytes

__all__ = ["check_tar", "list_tar", "read_member"]

_BUFFER = 4 << 20
_GZIP = b"\x1f\x8b"
_NOTES = ("cls", "json", "txt")
_LARGEST_NOTE = 1 << 20
_LABEL_KEYS = ("label", "cls")
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


def list_tar(container: str, limit: int | None, image: str | None, label: str | None) -> Contents:
    """The images of a shard, in its order.

    The label of a member is in the member of the same key (its name up to the first dot of its last
    part) that ends in `.cls`, a number or a name; or in `.json`, a number of the key `label` or
    `cls`; or in `.txt`, if all of the shard hold whole numbers.

    Args:
        container, limit, label: as for `containers.list_container`.
        image: nothing that a shard has.
    """
    places: list[tuple[str, int | None, int | None]] = []
    others: list[str] = []
    notes: dict[str, dict[str, str | None]] = {kind: {} for kind in _NOTES}
    left_out: Counter[str] = Counter()
    damaged = False
    try:
        for entry in _entries(container, _is_note):
            stem, _, suffix = entry.name.rpartition(".")
            if not is_utf8(entry.name):
                left_out[UNDECODABLE] += 1
            elif entry.content is not None:
                notes[suffix.lower()][stem] = _note(suffix.lower(), entry.content, label)
                others.append(entry.name)
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                others.append(entry.name)
            elif entry.size is None:
                left_out["linking to nothing"] += 1
            else:
                places.append((entry.name, entry.offset, entry.size))
                if limit is not None and len(places) > limit:
                    break  # one more, as the notes of an image may come after it
    except DamagedShard:
        damaged = True
    keys = {_key(name) for name, _, _ in places}
    left_out.update(suffix_of(name) for name in others if _key(name) not in keys)
    names, offsets, sizes = zip(*places, strict=True) if places else ((), (), ())
    labels = pa.chunked_array([pa.array(_labels(names, notes), pa.string())])
    images = images_of(
        [f"{container}::{name}" for name in names], sizes, offsets, labels, container
    )
    if damaged:
        images = pa.concat_tables([images, unreadable(container)])
    return Contents(images.slice(0, limit), left_out)


def read_member(container: str, name: str, offset: int | None, size: int | None) -> bytes:
    """The bytes of a file in a tar, by its place, or where that is not known by its name.

    A packed tar is unpacked on the disk first.

    Raises:
        FileNotFoundError: there is none of this name.
        OSError: the tar cannot be read.
    """
    if offset is not None and size is not None:
        return read_bytes(container, offset, size)
    with _one_at_a_time:
        index, unpacked = _index(container)
    entry = index.get(name)
    if entry is None or entry.offset is None or entry.size is None:
        raise FileNotFoundError(f"{container} has no member {name}")
    if unpacked is None:
        return read_bytes(container, entry.offset, entry.size)
    return os.pread(unpacked.fileno(), entry.size, entry.offset)


def check_tar(container: str) -> None:
    """Raise DamagedShard if a tar cannot be read to its end."""
    for _ in _entries(container, lambda name, size: False):
        pass


def _entries(container: str, wanted: Callable[[str, int], bool]) -> Iterator[Entry]:
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


def _is_note(name: str, size: int) -> bool:
    return size <= _LARGEST_NOTE and name.rpartition(".")[2].lower() in _NOTES


def _note(kind: str, content: bytes, key: str | None) -> str | None:
    """What a member says as a label; None if nothing."""
    if kind == "json":
        try:
            found = json.loads(content)
        except ValueError:
            return None
        if not isinstance(found, dict):
            return None
        if key is not None:
            return None if found.get(key) is None else _text(found[key])
        values = [found[one] for one in _LABEL_KEYS if isinstance(found.get(one), int | float)]
        return _text(values[0]) if values else None
    text = content.decode("utf-8-sig", errors="replace").strip()
    return text if text and (kind == "cls" or text.isdecimal()) else None


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _labels(
    names: Sequence[str], notes: Mapping[str, Mapping[str, str | None]]
) -> list[str | None]:
    """The label of each image: that of its stem, or else the only one of its key."""
    stems = {name.rpartition(".")[0] for name in names}
    by_key: dict[tuple[str, str], set[str]] = {}
    for kind, by_stem in notes.items():
        for stem, text in by_stem.items():
            key = _key(stem)
            if text is not None and (stem == key or stem not in stems):
                by_key.setdefault((kind, key), set()).add(text)
    kinds = [kind for kind in _NOTES if kind != "txt" or None not in notes["txt"].values()]
    found: list[str | None] = []
    for name in names:
        stem, key = name.rpartition(".")[0], _key(name)
        meant = [notes[kind].get(stem) or _only(by_key.get((kind, key))) for kind in kinds]
        found.append(next(filter(None, meant), None))
    return found


def _only(texts: set[str] | None) -> str | None:
    return next(iter(texts)) if texts and len(texts) == 1 else None


def _key(name: str) -> str:
    """What the members of a sample have in common: all up to the first dot of the last part."""
    folder, separator, base = name.rpartition("/")
    return folder + separator + base.partition(".")[0]
