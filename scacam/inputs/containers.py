"""Images that lie inside other files, and the kinds of such files: one row each.

Their uri is `CONTAINER::MEMBER`, the member being its name in a tar; or in a table its row, after
`COLUMN/` if the column of the images was named.

To add a kind: write how it is listed, read and checked, give it a row in `KINDS`, and test it.
"""

from collections.abc import Callable
from typing import NamedTuple

from scacam.inputs.contents import Contents
from scacam.inputs.image_tables import check_table, list_table, read_row
from scacam.inputs.tar_shards import check_tar, list_tar, read_member
from scacam.storage import read_bytes

__all__ = ["CONTAINERS", "KINDS", "Kind", "list_container", "read_image"]


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


def _kind_of(path: str) -> Kind | None:
    return next((kind for kind in KINDS if path.lower().endswith(kind.suffixes)), None)
