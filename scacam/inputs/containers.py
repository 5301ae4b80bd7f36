"""Images that lie inside other files: members of tar shards, rows of Parquet tables.

Their uri is `CONTAINER::MEMBER`, the member being its name in the tar; or in the table its row,
after `COLUMN/` if the column of the images was named.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scacam.errors import RunError
from scacam.inputs.image_tables import image_column, read_row
from scacam.inputs.labels import parse_labels
from scacam.inputs.listing import UNDECODABLE, is_utf8, suffix_of
from scacam.inputs.tar_shards import DamagedShard, entries, read_entry
from scacam.storage import is_transient, join, locate, read_bytes

__all__ = ["CONTAINERS", "IMAGES", "IMAGE_SUFFIXES", "Contents", "list_container", "read_image"]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)

_TARS = (".tar", ".tar.gz", ".tgz")
_TABLES = (".parquet",)
CONTAINERS = _TARS + _TABLES

IMAGES = pa.schema(
    [
        ("uri", pa.string()),
        ("size", pa.int64()),
        ("offset", pa.int64()),
        ("label", pa.int32()),
        ("name", pa.string()),
    ]
)
"""Images on their way into a manifest: a label is a class number or a name."""

_NOTES = ("cls", "json", "txt")
_LARGEST_NOTE = 1 << 20
_LABEL_KEYS = ("label", "cls")


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


def list_container(
    container: str,
    limit: int | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Contents | None:
    """The images of a tar shard (WebDataset) or a Parquet table, in its order.

    The label of a tar's member is in the member of the same key (its name up to the first dot of
    its last part) that ends in `.cls`, a number or a name; or in `.json`, a number of the key
    `label` or `cls`; or in `.txt`, if all of the shard hold whole numbers. Of a table's row it is
    in its column `label`.

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
    if container.lower().endswith(_TARS):
        return _tar(container, limit, label)
    return _table(container, limit, image, label)


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
    if not separator or not container.lower().endswith(CONTAINERS):
        if uri.lower().endswith(CONTAINERS):
            _refuse(uri)
        return read_bytes(uri)
    if container.lower().endswith(_TARS):
        if offset is None or size is None:
            return read_entry(container, member)
        return read_bytes(container, offset, size)
    column, _, row = member.rpartition("/")
    content, path = read_row(container, int(row), column or None)
    if content is not None:
        return content
    if not path:
        raise OSError(f"row {row} has neither bytes nor a path")
    is_absolute = "://" in path or path.startswith("/")
    return read_bytes(path if is_absolute else join(container.rpartition("/")[0], path))


def _tar(container: str, limit: int | None, label: str | None) -> Contents:
    places: list[tuple[str, int | None, int | None]] = []
    others: list[str] = []
    notes: dict[str, dict[str, str | None]] = {kind: {} for kind in _NOTES}
    left_out: Counter[str] = Counter()
    damaged = False
    try:
        for entry in entries(container, _is_note):
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
    images = _images([f"{container}::{name}" for name in names], sizes, offsets, labels, container)
    if damaged:
        images = pa.concat_tables([images, _unreadable(container)])
    return Contents(images.slice(0, limit), left_out)


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


def _table(
    container: str, limit: int | None, image: str | None, label: str | None
) -> Contents | None:
    filesystem, path = locate(container)
    with filesystem.open_input_file(path) as file:
        try:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            column = image_column(schema, image)
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
            return Contents(_unreadable(container), Counter())
    prefix = f"{container}::{image}/" if image else f"{container}::"
    rows = pa.array(np.arange(count))
    uris = pc.binary_join_element_wise(prefix, rows.cast(pa.string()), "")
    images = _images(uris, pa.nulls(count, pa.int64()), rows, labels, container)
    others = [] if label else [name for name in schema.names if "label" in name.lower()]
    return Contents(images, Counter(), others)


def _images(
    uris: Sequence[str] | pa.Array,
    sizes: Sequence[int | None] | pa.Array,
    offsets: Sequence[int | None] | pa.Array,
    labels: pa.ChunkedArray | None,
    container: str,
) -> pa.Table:
    count = len(uris)
    if labels is None:
        numbers, names = pa.nulls(count, pa.int32()), pa.nulls(count, pa.string())
    else:
        numbers, names = parse_labels(labels.slice(0, count), container)
    return pa.table([uris, sizes, offsets, numbers, names], schema=IMAGES)


def _unreadable(container: str) -> pa.Table:
    """A row for what cannot be read of a container, so that it ends as an error and is told."""
    return pa.Table.from_pylist([{"uri": container}], schema=IMAGES)


def _refuse(container: str) -> NoReturn:
    """Raise what is wrong with a container, or that it is no image."""
    if container.lower().endswith(_TARS):
        for _ in entries(container, lambda name, size: False):
            pass
    else:
        filesystem, path = locate(container)
        with filesystem.open_input_file(path) as file:
            pq.ParquetFile(file)
    raise OSError(f"{container} is a container, no image; or its labels cannot be read")
