"""Images that lie inside other files: members of tar shards, rows of Parquet tables.

Their uri is `CONTAINER::MEMBER`, the member being its name in the tar or its row in the table.
"""

import tarfile
from collections.abc import Iterator
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from scacam.storage import locate, read_bytes

__all__ = ["IMAGE_SUFFIXES", "Member", "image_column", "members", "read_image"]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)

_BYTES_COLUMNS = ("image", "img", "bytes", "content", "jpg", "jpeg", "png", "webp")
_one_at_a_time = Lock()


class Member(NamedTuple):
    """An image in a container: where its bytes begin (of a table: its row), how many, its label."""

    uri: str
    offset: int
    size: int | None
    label: int | None


def members(container: str) -> Iterator[Member]:
    """The images of a `.tar` shard or a `.parquet` table, in its order.

    The label of a tar's member `KEY.jpg` is the number in `KEY.cls` (WebDataset); of a table's row,
    its column `label`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no tar, or a table without a column of image bytes.
    """
    if container.lower().endswith(".tar"):
        return _tar_members(container)
    return _table_rows(container)


def read_image(uri: str, offset: int | None = None, size: int | None = None) -> bytes:
    """The bytes of an image, in a file of its own or in a container.

    Args:
        uri: its uri.
        offset: of an image in a container, where it begins; left out, it is looked for.
        size: how many bytes it has, where it begins at an offset of a tar.

    Raises:
        OSError: it cannot be read, as the filesystem says.
    """
    container, separator, member = uri.rpartition("::")
    if separator and container.lower().endswith(".parquet"):
        return _read_row(container, int(member))
    if separator and container.lower().endswith(".tar"):
        if offset is None or size is None:
            found = {one.uri: one for one in members(container)}.get(uri)
            if found is None:
                raise FileNotFoundError(f"{container} has no member {member}")
            offset, size = found.offset, found.size
        return read_bytes(container, offset, size)
    return read_bytes(uri)


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds images as bytes, or as a struct with a field `bytes`; None if none."""
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
    for name in _BYTES_COLUMNS:
        index = schema.get_field_index(name)
        if index >= 0 and (
            pa.types.is_binary(schema.types[index]) or pa.types.is_large_binary(schema.types[index])
        ):
            return name
    return None


def _tar_members(container: str) -> Iterator[Member]:
    filesystem, path = locate(container)
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with filesystem.open_input_file(path) as file, tarfile.open(fileobj=file) as tar:
            for entry in tar:
                key, _, suffix = entry.name.rpartition(".")
                if entry.isfile() and f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images.append((entry.name, entry.offset_data, entry.size))
                elif entry.isfile() and suffix == "cls":
                    content = tar.extractfile(entry)
                    labels[key] = int(content.read()) if content else -1
    except tarfile.TarError as error:
        raise ValueError(f"{container} is no tar file: {error}") from error
    for name, offset, size in images:
        yield Member(f"{container}::{name}", offset, size, labels.get(name.rpartition(".")[0]))


def _table_rows(container: str) -> Iterator[Member]:
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        table = pq.ParquetFile(file)
        if image_column(table.schema_arrow) is None:
            raise ValueError(
                f"{container} has neither a column 'uri' nor one of image bytes; it has "
                + ", ".join(table.schema_arrow.names)
            )
        labelled = "label" in table.schema_arrow.names
        row = 0
        for batch in table.iter_batches(columns=["label"] if labelled else []):
            labels = batch["label"].to_pylist() if labelled else [None] * len(batch)
            for label in labels:
                yield Member(f"{container}::{row}", row, None, label)
                row += 1


def _read_row(container: str, row: int) -> bytes:
    with _one_at_a_time:
        for group, (first, count) in enumerate(_row_groups(container)):
            if first <= row < first + count:
                value = _row_group(container, group)[row - first]
                break
        else:
            raise FileNotFoundError(f"{container} has no row {row}")
    content = value.as_py()
    content = content["bytes"] if isinstance(content, dict) else content
    return content or b""


@lru_cache(maxsize=8)
def _row_groups(container: str) -> list[tuple[int, int]]:
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        metadata = pq.read_metadata(file)
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return [(sum(counts[:group]), count) for group, count in enumerate(counts)]


@lru_cache(maxsize=2)
def _row_group(container: str, group: int) -> pa.ChunkedArray:
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        table = pq.ParquetFile(file)
        column = image_column(table.schema_arrow)
        return table.read_row_group(group, columns=[column])[column]
