"""Images that lie inside other files, and the kinds of such files: one row each.

Their uri is `CONTAINER::MEMBER`, the member being its name in a tar; or in a table its row, after
`COLUMN/` if the column of the images was named.

To add a kind: write how it is listed, read and checked, give it a row in `KINDS`, and test it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from scacam.inputs.contents import Contents
from scacam.inputs.image_tables import check_table, list_table, read_row
from scacam.inputs.tar_shards import check_tar, list_tar, read_member
from scacam.storage import read_bytes

__all__ = [
    "CONTAINERS",
    "KINDS",
    "Kind",
    "Place",
    "list_container",
    "read_image",
    "read_together",
    "together",
]

_AT_ONCE = 1 << 20
_PASSED_OVER = 1 << 16


class Kind(NamedTuple):
    """A kind of container.

    Attributes:
        suffixes: those of its files, in lower case.
        list: its images, see `list_container`.
        read: the bytes of a member: of a container by the member, its offset and its size, which
            are None where they are not known.
        check: raises what is wrong with a container of which something cannot be read.
    """

    suffixes: tuple[str, ...]
    list: Callable[[str, int | None, str | None, str | None], Contents | None]
    read: Callable[[str, str, int | None, int | None], bytes]
    check: Callable[[str], None]


class Place(NamedTuple):
    """Where an image is: its uri, and what else `read_image` takes."""

    uri: str
    offset: int | None
    size: int | None


KINDS = (
    Kind((".tar", ".tar.gz", ".tgz"), list_tar, read_member, check_tar),
    Kind((".parquet",), list_table, read_row, check_table),
)

CONTAINERS = tuple(suffix for kind in KINDS for suffix in kind.suffixes)


def list_container(
    container: str,
    limit: int | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Contents | None:
    """The images of a tar shard (WebDataset) or a Parquet table, in its order.

    Args:
        container: where it is.
        limit: only this many images, the first ones.
        image: the column of the images, of a table.
        label: the column of the labels, or the key in `.json`.

    Returns:
        What it holds; None for a table without images.

    Raises:
        OSError: the container cannot be reached.
        RunError: a column that was named is not there; labels are none.
    """
    kind = _kind_of(container)
    assert kind is not None
    return kind.list(container, limit, image, label)


def read_image(uri: str, offset: int | None = None, size: int | None = None) -> bytes:
    """The bytes of an image, in a file of its own or in a container.

    Args:
        uri: its uri.
        offset: of an image in a tar, where it begins; left out, it is looked for.
        size: how many bytes it has, where it begins at an offset of a tar.

    Raises:
        OSError: it cannot be read, as the filesystem says; or it is no image but a container.
        ValueError: its container is none.
    """
    container, separator, member = uri.rpartition("::")
    if separator and (kind := _kind_of(container)):
        return kind.read(container, member, offset, size)
    if kind := _kind_of(uri):
        kind.check(uri)
        raise OSError(f"{uri} is a container, no image; or its labels cannot be read")
    return read_bytes(uri)


def together(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Images in their order, those that lie close behind one another in a tar as one group.

    A group takes one request, of at most 1 MB unless it is one image: so a shard is read from its
    beginning to its end, and what lies between its images with them.
    """
    group: list[Place] = []
    for place in places:
        if group and not _follows(group, place):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def read_together(group: Sequence[Place]) -> list[bytes]:
    """The bytes of images that are one group of `together`.

    Raises:
        OSError, ValueError: as `read_image`.
    """
    ends = [_end(place) for place in group]
    begin = group[0].offset
    if len(group) == 1 or begin is None:
        return [read_image(*place) for place in group]
    content = read_bytes(_container(group[0]), begin, ends[-1] - begin)
    return [
        content[end - (place.size or 0) - begin : end - begin]
        for place, end in zip(group, ends, strict=True)
    ]


def _follows(group: Sequence[Place], place: Place) -> bool:
    first, last = group[0], group[-1]
    if None in (*first, *last, *place) or _container(first) != _container(place):
        return False
    gap = (place.offset or 0) - _end(last)
    return 0 <= gap <= _PASSED_OVER and _end(place) - (first.offset or 0) <= _AT_ONCE


def _end(place: Place) -> int:
    """Where an image ends in its tar."""
    return (place.offset or 0) + (place.size or 0)


def _container(place: Place) -> str:
    return place.uri.rpartition("::")[0]


def _kind_of(path: str) -> Kind | None:
    return next((kind for kind in KINDS if path.lower().endswith(kind.suffixes)), None)
