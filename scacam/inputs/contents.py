"""What the containers of images have in common: what one holds, as a table of images."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from scacam.inputs.labels import parse_labels

__all__ = ["IMAGES", "IMAGE_SUFFIXES", "Contents", "images_of", "unreadable"]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)

IMAGES = pa.schema(
    [
        ("uri", pa.string()),
        ("size", pa.int64()),
        ("offset", pa.int64()),
        ("label", pa.int32()),
        ("name", pa.string()),
    ]
)
"""Images on their way into a manifest: a label is a class number or a name, or a number with the
name that the data set itself gives it."""


class Contents(NamedTuple):
    """What a container holds.

    Attributes:
        images: as `IMAGES`. What of a container cannot be read is a row, too: the container's uri.
        left_out: the members that are no images, by suffix.
        other_columns: of a table without labels, its columns that might be labels.
    """

    images: pa.Table
    left_out: Counter[str]
    other_columns: Sequence[str] = ()


def images_of(
    uris: Sequence[str] | pa.Array,
    sizes: Sequence[int | None] | pa.Array,
    offsets: Sequence[int | None] | pa.Array,
    labels: pa.ChunkedArray | None,
    container: str,
) -> pa.Table:
    """Images of a container as `IMAGES`, their labels as people write them; more are left out."""
    count = len(uris)
    if labels is None:
        numbers, names = pa.nulls(count, pa.int32()), pa.nulls(count, pa.string())
    else:
        numbers, names = parse_labels(labels.slice(0, count), container)
    return pa.table([uris, sizes, offsets, numbers, names], schema=IMAGES)


def unreadable(container: str) -> pa.Table:
    """A row for what cannot be read of a container, so that it ends as an error and is told."""
    return pa.Table.from_pylist([{"uri": container}], schema=IMAGES)
