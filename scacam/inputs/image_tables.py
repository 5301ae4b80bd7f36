"""Parquet tables that hold images: their images with labels, and the bytes in a row."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from functools import lru_cache
from itertools import accumulate
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scacam.errors import RunError
from scacam.inputs.contents import Contents, images_of, unreadable
from scacam.storage import is_transient, join, locate, read_bytes

__all__ = ["check_table", "list_table", "read_row"]

_NAMES = ("image", "img", "bytes", "content", "jpg", "jpeg", "png", "webp")
_KEPT_GROUPS = 2

_one_footer_at_a_time = Lock()
_lock = Lock()
_groups: dict[tuple[str, int, str], Future[pa.ChunkedArray]] = {}


def list_table(
    container: str, limit: int | None, image: str | None, label: str | None
) -> Contents | None:
    """The images of a table in its order, as for `containers.list_container`.

    The offset of an image is its row.
    """
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        try:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            column = _image_column(schema, image)
            if column is None:
                return None
            if label is not None and label not in schema.names:
                raise RunError(
                    f"{container} has no column {label!r}; it has {', '.join(schema.names)}"
                )
            if label is None and "label" in schema.names:
                label = "label"
            counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            begins = [0, *accumulate(counts)]
            count = begins[-1] if limit is None else min(limit, begins[-1])
            groups = [group for group, begin in enumerate(begins[:-1]) if begin < count]
            labels = table.read_row_groups(groups, [label])[label] if label else None
        except (OSError, pa.ArrowInvalid) as error:
            if is_transient(error):
                raise
            return Contents(unreadable(container), Counter())
    prefix = f"{container}::{image}/" if image else f"{container}::"
    rows = pa.array(np.arange(count))
    uris = pc.binary_join_element_wise(prefix, rows.cast(pa.string()), "")
    images = images_of(uris, pa.nulls(count, pa.int64()), rows, labels, container)
    if label and (names := _class_names(schema, label)):
        known = pc.if_else(pc.less(images["label"], len(names)), images["label"], None)
        named = pa.array(names, pa.string()).take(known.combine_chunks())
        place = images.schema.get_field_index("name")
        images = images.set_column(place, "name", pc.coalesce(named, images["name"]))
    others = [] if label else [name for name in schema.names if "label" in name.lower()]
    return Contents(images, Counter(), others)


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """What the classes of a column are called, if Hugging Face's `datasets` wrote it, by number."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        names = told["info"]["features"][column]["names"]
        is_list = all(isinstance(name, str) for name in names)
    except (KeyError, TypeError, ValueError):
        return None
    return names if is_list and len(set(names)) == len(names) else None


def _image_column(schema: pa.Schema, named: str | None = None) -> str | None:
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


def read_row(container: str, member: str, offset: int | None, size: int | None) -> bytes:
    """The image in a row, by its number, or by `COLUMN/` and its number.

    Row groups are read as a whole, each once for all threads, and the last ones are kept.

    Raises:
        FileNotFoundError: there is no such row.
        OSError: the table cannot be read, or the row is empty.
        ValueError: it is no Parquet table.
    """
    column, _, row = member.rpartition("/")
    content, path = _value(container, int(row), column)
    if content is not None:
        return content
    if not path:
        raise OSError(f"row {row} has neither bytes nor a path")
    is_absolute = "://" in path or path.startswith("/")
    return read_bytes(path if is_absolute else join(container.rpartition("/")[0], path))


def check_table(container: str) -> None:
    """Raise what is wrong with a table, if anything is."""
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        pq.ParquetFile(file)


def _value(container: str, row: int, column: str) -> tuple[bytes | None, str | None]:
    """The image in a row, counted from 0: its bytes, or where it has none perhaps its path."""
    with _one_footer_at_a_time:
        metadata, ends = _footer(container)
    if not ends or not 0 <= row < ends[-1]:
        raise FileNotFoundError(f"{container} has no row {row}")
    group = int(np.searchsorted(ends, row, side="right"))
    first = ends[group - 1] if group else 0
    column = column or _image_column(metadata.schema.to_arrow_schema()) or ""
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
