"""What lies below a folder or prefix: its files, and what by its name cannot be one of a run."""

import os
import stat
from typing import NamedTuple

from pyarrow import fs

from scacam.storage import locate, uri_of

__all__ = ["UNDECODABLE", "File", "Listing", "is_utf8", "list_files", "suffix_of"]

UNDECODABLE = "with a name that is no UTF-8"
"""How files are counted whose uris no table can hold."""

_LONGEST_SUFFIX = 12


class File(NamedTuple):
    """A file: its uri, and its size in bytes; None where it is a link to nothing."""

    uri: str
    size: int | None


class Listing(NamedTuple):
    """What lies below a folder.

    Attributes:
        path: the folder, as the uris begin.
        files: all files in it and below, sorted by uri.
        folders: all folders below.
        undecodable: how many files have names that are no UTF-8, so that no table can hold them.
    """

    path: str
    files: list[File]
    folders: list[str]
    undecodable: int


def list_files(source: str) -> Listing:
    """List a folder or prefix with all that lies below. Links are followed, but not in circles.

    Raises:
        OSError: it is not there, or cannot be listed.
        ValueError: the scheme is unknown.
    """
    filesystem, path = locate(source)
    path = path.rstrip("/") or "/"
    if isinstance(filesystem, fs.LocalFileSystem):
        return _walk(path)
    files, folders = [], []
    for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
        if info.type == fs.FileType.File:
            files.append(File(uri_of(source, info.path), info.size))
        elif info.type == fs.FileType.Directory:
            folders.append(uri_of(source, info.path))
    return Listing(uri_of(source, path), sorted(files), folders, 0)


def suffix_of(path: str) -> str:
    """The suffix of a file in lower case, `.jpg`; "without suffix" if it has none."""
    _, dot, suffix = path.rpartition("/")[2].rpartition(".")
    known = dot and suffix and len(suffix) <= _LONGEST_SUFFIX  # the rest of a sentence is none
    return f".{suffix.lower()}" if known else "without suffix"


def _walk(root: str) -> Listing:
    """Arrow's own listing passes over links to nothing, stops at names that are no UTF-8, and
    follows a link to a folder above 40 times."""
    files: list[File] = []
    folders: list[str] = []
    undecodable = 0
    ahead = [(root, frozenset({_identity(os.stat(root))}))]
    while ahead:
        folder, above = ahead.pop()
        for entry in os.scandir(folder):
            try:
                found = entry.stat()
            except OSError:
                found = None
            if found and stat.S_ISDIR(found.st_mode):
                if _identity(found) not in above:
                    folders.append(entry.path)
                    ahead.append((entry.path, above | {_identity(found)}))
            elif not is_utf8(entry.path):
                undecodable += 1
            elif found is None or stat.S_ISREG(found.st_mode):
                files.append(File(entry.path, found and found.st_size))
    return Listing(root, sorted(files), folders, undecodable)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def is_utf8(path: str) -> bool:
    """Whether a path that the system gave is text, not bytes that are none."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
