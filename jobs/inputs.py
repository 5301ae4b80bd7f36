"""From an input to the manifest: one row per image, in a fixed order."""

from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from pyarrow import fs

from scacam.errors import RunError
from scacam.storage import locate
from scacam.tables import MANIFEST

__all__ = ["Manifest", "read_manifest", "refuse_unknown_labels"]

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_LABEL_RANGE = (0, 2**31 - 1)


class Manifest(NamedTuple):
    """The images of a run.

    Attributes:
        table: as `scacam.tables.MANIFEST`; an image's id is its row.
        ignored: how many files of the input are no images by their names.
    """

    table: pa.Table
    ignored: int


def read_manifest(source: str, limit: int | None = None) -> Manifest:
    """List the images of a folder or prefix, or read a `.csv` or `.parquet` manifest.

    Args:
        source: the input. A manifest has a column `uri`, relative uris being relative to the
            manifest's folder, and may have an integer column `label`.
        limit: take only this many images, the first ones.

    Raises:
        RunError: there is no such input, it holds no images, or the manifest is wrong in itself.
    """
    try:
        filesystem, path = locate(source)
        kind = filesystem.get_file_info(path.rstrip("/")).type
        if kind == fs.FileType.NotFound:
            raise RunError(f"no such input: {source}")
        if kind == fs.FileType.Directory:
            uris, ignored = _list_images(filesystem, path.rstrip("/"), source)
            labels = pa.nulls(len(uris), pa.int32())
        else:
            uris, labels = _read_table(filesystem, path, source)
            ignored = 0
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read input {source}: {error}") from error
    if not len(uris):
        raise RunError(
            f"no images in {source}: {ignored} files there, none ending in {', '.join(_IMAGES)}"
        )
    table = pa.table([pa.array(range(len(uris)), pa.int64()), uris, labels], schema=MANIFEST)
    return Manifest(table.slice(0, limit), ignored)


def _list_images(filesystem: fs.FileSystem, path: str, source: str) -> tuple[pa.Array, int]:
    scheme = source.partition("://")[0] + "://" if "://" in source else ""
    files = [
        info.path
        for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        if info.type == fs.FileType.File
    ]
    images = sorted(file for file in files if file.lower().endswith(_IMAGES))
    return pa.array([scheme + file for file in images], pa.string()), len(files) - len(images)


def _read_table(filesystem: fs.FileSystem, path: str, source: str) -> tuple[pa.Array, pa.Array]:
    suffix = path.rsplit(".", 1)[-1].lower()
    if suffix not in ("csv", "parquet"):
        raise RunError(f"{source} is neither a folder nor a .csv or .parquet manifest")
    with filesystem.open_input_file(path) as file:
        if suffix == "parquet":
            table = pyarrow.parquet.read_table(file)
        else:
            options = pyarrow.csv.ConvertOptions(column_types={"uri": pa.string()})
            parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(file, convert_options=options, parse_options=parsing)
    if "uri" not in table.column_names:
        raise RunError(
            f"manifest {source} has no column 'uri'; it has {', '.join(table.column_names)}"
        )
    uris = table["uri"].cast(pa.string()).combine_chunks()
    missing = pc.or_kleene(pc.is_null(uris), pc.equal(uris, ""))
    _refuse(table, pc.fill_null(missing, True), f"manifest {source} has rows without a uri")
    folder = source.rpartition("/")[0] or "."
    relative = pc.invert(pc.match_substring_regex(uris, r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"))
    uris = pc.if_else(relative, pc.binary_join_element_wise(_absolute(folder), uris, "/"), uris)
    return uris, _labels(table, source)


def _labels(table: pa.Table, source: str) -> pa.Array:
    if "label" not in table.column_names:
        return pa.nulls(len(table), pa.int32())
    labels = table["label"].combine_chunks()
    try:
        labels = labels.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise RunError(
            f"manifest {source}: labels are class numbers, not {labels.type} ({error})"
        ) from error
    low, high = _LABEL_RANGE
    outside = pc.or_(pc.less(labels, low), pc.greater(labels, high))
    _refuse(table, pc.fill_null(outside, False), f"manifest {source} has labels below 0")
    return labels.cast(pa.int32())


def refuse_unknown_labels(table: pa.Table, num_classes: int, network: str) -> None:
    """Raise RunError if a label is not a class of the network, with the first such rows."""
    outside = pc.fill_null(pc.greater_equal(table["label"], num_classes), False)
    _refuse(table, outside, f"{network} has {num_classes} classes, but there are labels beyond")


def _refuse(table: pa.Table, wrong: pa.Array, message: str) -> None:
    rows = table.filter(wrong)
    if len(rows):
        first = "; ".join(str(row) for row in rows.slice(0, 3).to_pylist())
        raise RunError(f"{message}: {len(rows)} rows, the first {first}")


def _absolute(folder: str) -> str:
    if "://" in folder:
        return folder
    return locate(folder)[1]
