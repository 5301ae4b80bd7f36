"""Parquet tables that hold images: which of their columns does, and the bytes in a row of it."""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import lru_cache
from itertools import accumulate
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scacam.errors import RunError
from scacam.storage import locate

__all__ = ["image_column", "read_row"]

_NAMES = ("image", "img", "bytes", "content", "jpg", "jpeg", "png", "webp")
_KEPT_GROUPS = 2

_one_footer_at_a_time = Lock()
_lock = Lock()
_groups: dict[tuple[str, int, str], Future[pa.ChunkedArray]] = {}


def image_column(schema: pa.Schema, named: str | None = None) -> str | None:
    """The column that holds images as bytes, or as a struct with a field `bytes`; None if none.

    Args:
        schema: of the table.
        named: the column, where it was named; it may not be there.

    Raises:
        RunError: there are several, and none has a name that images usually have; or the column
            that was named holds something else.
    """
    structs = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    binaries = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    ]
    if named is not None and named in schema.names and named not in structs + binaries:
        raise RunError(f"column {named!r} holds no images but {schema.field(named).type}")
    for name in _NAMES if named is None else (named,):
        if name in structs or name in binaries:
            return name
    if named is None and len(structs) > 1:
        raise RunError(f"columns {' and '.join(structs)} hold images; name one by --image-column")
    return structs[0] if structs and named is None else None


def read_row(
    container: str, row: int, column: str | None = None
) -> tuple[bytes | None, str | None]:
    """The image in a row: its bytes, or where it has none perhaps its path.

    Row groups are read as a whole, each once for all threads, and the last ones are kept.

    Args:
        container: the table.
        row: counted from 0.
        column: left out, the one that holds images.

    Raises:
        FileNotFoundError: there is no such row.
        OSError: the table cannot be read.
        ValueError: it is no Parquet table.
    """
    with _one_footer_at_a_time:
        metadata, ends = _footer(container)
    if not ends or not 0 <= row < ends[-1]:
        raise FileNotFoundError(f"{container} has no row {row}")
    group = int(np.searchsorted(ends, row, side="right"))
    first = ends[group - 1] if group else 0
    column = column or image_column(metadata.schema.to_arrow_schema()) or ""
    value = _group(container, group, column, metadata)[row - first].as_py()
    if isinstance(value, dict):
        return value["bytes"], value.get("path")
    return value, None


@lru_cache(maxsize=8)
def _footer(container: str) -> tuple[pq.FileMetaData, Sequence[int]]:
    """What a table says of itself, and where its row groups end."""
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        metadata = pq.read_metadata(file)
    groups = range(metadata.num_row_groups)
    return metadata, list(accumulate(metadata.row_group(group).num_rows for group in groups))


def _group(container: str, group: int, column: str, metadata: pq.FileMetaData) -> pa.ChunkedArray:
    """A column of a row group, read by the first thread that asks for it while others wait."""
    key = container, group, column
    with _lock:
        found = _groups.get(key)
        if found is None:
            mine = _groups[key] = Future()
            for oldest in list(_groups)[:-_KEPT_GROUPS]:
                del _groups[oldest]
    if found is not None:
        return found.result()
    try:
        filesystem, path = locate(container)
        with filesystem.open_input_file(path) as file:
            table = pq.ParquetFile(file, metadata=metadata)
            mine.set_result(table.read_row_group(group, columns=[column])[column])
    except BaseException as error:
        with _lock:
            _groups.pop(key, None)
        mine.set_exception(error)
    return mine.result()
