"""From an input to the manifest: one row per image, in a fixed order."""

import posixpath
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from pyarrow import fs

from scacam.errors import RunError
from scacam.inputs.containers import IMAGE_SUFFIXES, Member, members
from scacam.storage import locate, uri_of
from scacam.tables import MANIFEST

__all__ = ["Manifest", "read_manifest", "refuse_unknown_labels"]

_CONTAINERS = (".tar", ".parquet")


class Manifest(NamedTuple):
    """The images of a run.

    Attributes:
        table: as `scacam.tables.MANIFEST`; an image's id is its row.
        ignored: how many files of the input are no images by their names.
    """

    table: pa.Table
    ignored: int


def read_manifest(source: str, limit: int | None = None) -> Manifest:
    """Find the images of an input.

    Args:
        source: a folder or prefix of images, of `.tar` shards (WebDataset) or of `.parquet` tables
            with image bytes; one such shard or table; or a manifest, `.csv` or `.parquet`, with a
            column `uri`, relative uris being relative to its folder, and perhaps `label`.
        limit: take only this many images, the first ones.

    Raises:
        RunError: there is no such input, it holds no images, or the manifest is wrong in itself.
    """
    try:
        filesystem, path = locate(source)
        path = path.rstrip("/")
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise RunError(f"no such input: {source}")
        if kind == fs.FileType.Directory:
            table, ignored = _from_folder(filesystem, path, source)
        else:
            table, ignored = _from_file(filesystem, path, source), 0
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read input {source}: {error}") from error
    if not len(table):
        raise RunError(
            f"no images in {source}: {ignored} files there, none ending in "
            + ", ".join(IMAGE_SUFFIXES + _CONTAINERS)
        )
    table = table.slice(0, limit)
    ids = pa.array(np.arange(len(table), dtype=np.int64))
    return Manifest(table.add_column(0, MANIFEST.field("image_id"), ids), ignored)


def _from_folder(filesystem: fs.FileSystem, path: str, source: str) -> tuple[pa.Table, int]:
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    files = sorted((i for i in infos if i.type == fs.FileType.File), key=lambda info: info.path)
    images = [info for info in files if info.path.lower().endswith(IMAGE_SUFFIXES)]
    if images:
        uris = [uri_of(source, info.path) for info in images]
        return _table(uris, sizes=[info.size for info in images]), len(files) - len(images)
    containers = [uri_of(source, i.path) for i in files if i.path.lower().endswith(_CONTAINERS)]
    inside = (member for container in containers for member in members(container))
    return _from_members(inside), len(files) - len(containers)


def _from_file(filesystem: fs.FileSystem, path: str, source: str) -> pa.Table:
    suffix = path.rsplit(".", 1)[-1].lower()
    if suffix == "tar":
        return _from_members(members(_absolute(source)))
    if suffix not in ("csv", "parquet"):
        raise RunError(f"{source} is neither a folder nor a .csv, .parquet or .tar file")
    with filesystem.open_input_file(path) as file:
        if suffix == "parquet":
            if "uri" not in pyarrow.parquet.read_schema(file).names:
                return _from_members(members(_absolute(source)))
            given = pyarrow.parquet.read_table(file)
        else:
            options = pyarrow.csv.ConvertOptions(column_types={"uri": pa.string()})
            parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
            given = pyarrow.csv.read_csv(file, convert_options=options, parse_options=parsing)
    if "uri" not in given.column_names:
        raise RunError(
            f"manifest {source} has no column 'uri'; it has {', '.join(given.column_names)}"
        )
    uris = given["uri"].cast(pa.string())
    missing = pc.or_kleene(pc.is_null(uris), pc.equal(uris, ""))
    _refuse(given, pc.fill_null(missing, True), f"manifest {source} has rows without a uri")
    folder = _absolute(source).rpartition("/")[0]
    relative = pc.invert(pc.match_substring_regex(uris, r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"))
    if pc.any(relative).as_py():
        joined = pc.binary_join_element_wise(folder, uris, "/")
        if "://" in folder:  # a disk follows ./ and ../ by itself, in a store they would be names
            joined = pa.array([_resolved(uri) for uri in joined.to_pylist()])
        uris = pc.if_else(relative, joined, uris)
    return _table(uris, labels=_labels(given, source))


def _from_members(inside: Iterable[Member]) -> pa.Table:
    found = list(inside)
    return _table(
        [member.uri for member in found],
        labels=pa.array([member.label for member in found], pa.int32()),
        sizes=[member.size for member in found],
        offsets=[member.offset for member in found],
    )


def _table(
    uris: pa.ChunkedArray | list[str],
    labels: pa.ChunkedArray | pa.Array | None = None,
    sizes: list[int | None] | None = None,
    offsets: list[int] | None = None,
) -> pa.Table:
    count = len(uris)
    columns = {
        "uri": uris,
        "label": pa.nulls(count, pa.int32()) if labels is None else labels,
        "size": pa.nulls(count, pa.int64()) if sizes is None else sizes,
        "offset": pa.nulls(count, pa.int64()) if offsets is None else offsets,
    }
    return pa.table(columns, schema=MANIFEST.remove(0))


def _labels(given: pa.Table, source: str) -> pa.ChunkedArray | None:
    if "label" not in given.column_names:
        return None
    labels = given["label"]
    try:
        labels = labels.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise RunError(
            f"manifest {source}: labels are class numbers, not {labels.type} ({error})"
        ) from error
    outside = pc.or_(pc.less(labels, 0), pc.greater(labels, 2**31 - 1))
    _refuse(given, pc.fill_null(outside, False), f"manifest {source} has labels below 0 or beyond")
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


def _resolved(uri: str) -> str:
    scheme, separator, path = uri.partition("://")
    dotted = not {".", ".."}.isdisjoint(path.split("/"))
    return scheme + separator + posixpath.normpath(path) if dotted else uri


def _absolute(source: str) -> str:
    return uri_of(source, locate(source)[1])
