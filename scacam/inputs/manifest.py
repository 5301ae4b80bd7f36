"""From an input to the manifest: one row per image, in a fixed order."""

import logging
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from scacam.errors import RunError
from scacam.inputs.containers import CONTAINERS, list_container, read_image
from scacam.inputs.contents import IMAGE_SUFFIXES, IMAGES, Contents
from scacam.inputs.labels import class_ids, parse_labels, refuse_rows
from scacam.inputs.listing import UNDECODABLE, File, Listing, list_files, suffix_of
from scacam.inputs.sheets import SHEETS, Sheet, read_sheet
from scacam.storage import absolute, locate, read_ahead
from scacam.tables import MANIFEST

__all__ = [
    "Ahead",
    "Manifest",
    "absolute_uris",
    "new_files",
    "read_manifest",
    "refuse_unknown_labels",
    "resolve_labels",
]

logger = logging.getLogger("scacam")

_FEW_IMAGES = 10_000
_TOLD_SUFFIXES = 5

_Listed = Callable[[str], Contents | None]
Ahead = Callable[[_Listed, Iterable[str]], Iterator[Contents | None]]
"""From how one container is listed, and many, to what they hold in their order: `read_ahead`."""

_CONTAINER = "|".join(re.escape(suffix) for suffix in CONTAINERS)


class Manifest(NamedTuple):
    """The images of a run.

    Attributes:
        table: as `scacam.tables.MANIFEST`; an image's id is its row.
        ignored: how many files of the input are no images by their names, or tables without any,
            by suffix.
        names: of labels that are names, or that a data set gives names, these, row by row:
            `resolve_labels` makes them a network's numbers.
    """

    table: pa.Table
    ignored: Mapping[str, int] = {}
    names: pa.ChunkedArray | None = None

    def left_out(self) -> str:
        """What was ignored in words, "5 files left out: 4 .heic, 1 .txt"; empty if nothing."""
        return _told(self.ignored)


def read_manifest(
    source: str,
    limit: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    ahead: Ahead = read_ahead,
) -> Manifest:
    """Find the images of an input.

    Args:
        source: a folder or prefix of images, of `.tar` shards (WebDataset, packed by gzip or not)
            and of `.parquet` tables with image bytes; one such shard or table; or a manifest,
            `.csv`, `.tsv` or `.parquet`, with a column `uri`, relative uris being relative to its
            folder, and perhaps `label`.
        limit: take only this many images, the first ones.
        image_column: the column of tables that holds the images; left out, the one that does.
        label_column: the column, or in `.json` of tar shards the key, that holds the labels; left
            out, `label`.
        ahead: how containers are listed beside one another, each read to its end or, of a table,
            as far as its labels need; `pipeline.tasks` has a way by Ray.

    Raises:
        RunError: there is no such input, it holds no images, or the manifest is wrong in itself.
    """
    listed = partial(list_container, limit=limit, image=image_column, label=label_column)
    ignored: Counter[str] = Counter()
    if limit is not None and limit <= _FEW_IMAGES:
        ahead = map  # of few images no container ahead of use
    try:
        listing = _listing(source)
        if listing is not None:
            images, ignored = _from_folder(listing, listed, limit, ahead)
        else:
            images = _from_file(source, listed, label_column, ahead)
        images = images.slice(0, limit)
        if not len(images):
            raise RunError(
                f"no images in {source}: {_told(ignored) or 'no files there'}; files of images end "
                f"in {', '.join(IMAGE_SUFFIXES + CONTAINERS)}, and a manifest is given by its path"
            )
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read input {source}: {error}") from error
    ids = pa.array(np.arange(len(images), dtype=np.int64))
    table = images.add_column(0, MANIFEST.field("image_id"), ids).select(MANIFEST.names)
    names = images["name"]
    named = names.null_count < len(names)
    return Manifest(table.cast(MANIFEST), ignored, names if named else None)


def resolve_labels(manifest: Manifest, categories: Mapping[str, Sequence[str] | None]) -> Manifest:
    """Turn labels that are names into the numbers of the networks' classes.

    Args:
        manifest: of an input.
        categories: of each network by its name, the names of its classes; None if it has none.

    Raises:
        RunError: a network has no such class, or the networks number them differently.
    """
    if manifest.names is None:
        return manifest
    table = manifest.table
    pairs = pa.table({"name": manifest.names, "number": table["label"]})
    pairs = pairs.filter(pc.field("name").is_valid()).group_by(["name", "number"]).aggregate([])
    told = dict(zip(pairs["name"].to_pylist(), pairs["number"].to_pylist(), strict=True))
    found = {network: class_ids(told, known, network) for network, known in categories.items()}
    (first, numbers), *others = found.items()
    for network, theirs in others:
        if theirs != numbers:
            raise RunError(
                f"labels are names, and {first} and {network} number their classes differently: "
                "explain them in runs of their own"
            )
    classes = pa.array([numbers[name] for name in told], pa.int32())
    resolved = classes.take(pc.index_in(manifest.names, pa.array(told)).combine_chunks())
    place = table.schema.get_field_index("label")
    labels = pc.coalesce(pa.chunked_array([resolved]), table["label"])
    return manifest._replace(table=table.set_column(place, "label", labels), names=None)


def refuse_unknown_labels(table: pa.Table, num_classes: int, network: str) -> None:
    """Raise RunError if a label is not a class of the network, with the first such rows."""
    outside = pc.fill_null(pc.greater_equal(table["label"], num_classes), False)
    refuse_rows(table, outside, f"{network} has {num_classes} classes, but there are labels beyond")


def new_files(source: str, manifest: pa.Table) -> int:
    """How many files of a folder or prefix hold images and are not in a manifest of it.

    Raises:
        RunError: the folder cannot be listed.
    """
    try:
        listing = _listing(source)
        if listing is None:
            return 0
        known = pc.unique(
            pc.replace_substring_regex(manifest["uri"], f"(?i)({_CONTAINER})::.*", r"\1")
        )
        files = [file for file in listing.files if _kind(file) != "other"]
        is_known = pc.is_in(pa.array([file.uri for file in files], pa.string()), known).to_pylist()
        new = [file for file, is_old in zip(files, is_known, strict=True) if not is_old]
        containers = [file.uri for file in new if _kind(file) == "container"]
        first = list(read_ahead(partial(list_container, limit=1), containers))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot list input {source}: {error}") from error
    empty = sum(contents is None or not len(contents.images) for contents in first)
    return len(new) - empty


def absolute_uris(uris: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    """The uris in a table, relative ones being relative to the table's folder.

    Raises:
        RunError: some are missing.
    """
    uris = uris.cast(pa.string())
    missing = pc.fill_null(pc.equal(uris, ""), True)
    refuse_rows(pa.table({"uri": uris}), missing, f"{source} has rows without a uri")
    relative = pc.invert(pc.match_substring_regex(uris, r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"))
    if not pc.any(relative).as_py():
        return uris
    folder = absolute(source).rpartition("/")[0]
    joined = pc.binary_join_element_wise(folder, uris, "/")
    if "://" in folder:  # a disk follows ./ and ../ by itself, in a store they would be names
        joined = pa.array([_resolved(uri) for uri in joined.to_pylist()])
    return pc.if_else(relative, joined, uris)


def _listing(source: str) -> Listing | None:
    """What lies below a folder or prefix; None of a file."""
    filesystem, path = locate(source)
    found = filesystem.get_file_info(path.rstrip("/"))
    if found.type == fs.FileType.NotFound:
        raise RunError(f"no such input: {source}")
    if found.type == fs.FileType.Directory:
        return list_files(source)
    if found.size == 0 and not isinstance(filesystem, fs.LocalFileSystem):
        with suppress(FileNotFoundError):  # as a rule; but an object may be named as a prefix is
            return list_files(source)
    return None


def _kind(file: File) -> str:
    name = file.uri.lower()
    if name.endswith(IMAGE_SUFFIXES) or (file.size is None and name.endswith(CONTAINERS)):
        return "image"  # a container whose link leads nowhere ends as missing, as an image does
    return "container" if name.endswith(CONTAINERS) else "other"


def _from_folder(
    listing: Listing, listed: _Listed, limit: int | None, ahead: Ahead
) -> tuple[pa.Table, Counter[str]]:
    """Images and the members of containers, in the order of the files."""
    ignored = Counter(suffix_of(file.uri) for file in listing.files if _kind(file) == "other")
    ignored += Counter({UNDECODABLE: listing.undecodable})
    others: dict[str, str] = {}
    parts, count = [IMAGES.empty_table()], 0
    for contents in _contents(listing, listed, ahead):
        parts.append(contents.images)
        ignored += contents.left_out
        others |= dict.fromkeys(contents.other_columns, "")
        count += len(contents.images)
        if limit is not None and count >= limit:
            break
    _say_columns(others)
    images = pa.concat_tables(parts)
    _say_unreadable(images)
    return images, ignored


def _contents(listing: Listing, listed: _Listed, ahead: Ahead) -> Iterator[Contents]:
    """Of each run of images and of each container."""
    files = [file for file in listing.files if _kind(file) != "other"]
    containers = [file.uri for file in files if _kind(file) == "container"]
    opened = ahead(listed, containers) if containers else iter(())
    for kind, run in groupby(files, key=_kind):
        if kind == "image":
            yield Contents(_plain_images(list(run)), Counter())
            continue
        for file, contents in zip(run, opened, strict=False):
            yield contents or Contents(IMAGES.empty_table(), Counter([suffix_of(file.uri)]))


def _plain_images(files: Sequence[File]) -> pa.Table:
    uris, sizes = zip(*files, strict=True)
    nulls = [pa.nulls(len(uris), kind) for kind in IMAGES.types[2:]]
    return pa.table([pa.array(uris), pa.array(sizes, pa.int64()), *nulls], schema=IMAGES)


def _from_file(source: str, listed: _Listed, label_column: str | None, ahead: Ahead) -> pa.Table:
    name = source.lower()
    if not name.endswith(SHEETS + CONTAINERS):
        raise RunError(
            f"{source} is neither a folder nor a file ending in {', '.join(SHEETS + CONTAINERS)}"
        )
    if name.endswith(SHEETS):
        sheet = read_sheet(source, ["uri", label_column or "label"])
        if "uri" in sheet.names or not name.endswith(CONTAINERS):
            return _from_sheet(source, sheet, label_column)
    (contents,) = ahead(listed, [absolute(source)])
    if contents is None:
        raise RunError(
            f"{source} has neither a column 'uri' nor one of image bytes; it has "
            + ", ".join(sheet.names)
        )
    _say_columns(contents.other_columns)
    _say_unreadable(contents.images)
    return contents.images


def _from_sheet(source: str, sheet: Sheet, label_column: str | None) -> pa.Table:
    for name in ("uri", label_column):
        if name is not None and name not in sheet.names:
            raise RunError(
                f"manifest {source} has no column {name!r}; it has {', '.join(sheet.names)}"
            )
    uris = absolute_uris(sheet.table["uri"], source)
    numbers, names = pa.nulls(len(uris), pa.int32()), pa.nulls(len(uris), pa.string())
    if (label_column or "label") in sheet.names:
        numbers, names = parse_labels(sheet.table[label_column or "label"], source)
    else:
        _say_columns([name for name in sheet.names if "label" in name.lower()])
    nulls = pa.nulls(len(uris), pa.int64())
    return pa.table([uris, nulls, nulls, numbers, names], schema=IMAGES)


def _say_columns(names: Iterable[str]) -> None:
    if found := ", ".join(names):
        logger.warning("no column 'label', so no labels; --label-column may name one of: %s", found)


def _say_unreadable(images: pa.Table) -> None:
    """Refuse an input of which nothing can be read; tell of containers that cannot be, to the end.

    The latter are rows, too, so that they end as rows of the errors table.
    """
    wrong = images.filter(pc.match_substring_regex(images["uri"], f"(?i)({_CONTAINER})$"))["uri"]
    if 0 < len(wrong) == len(images):
        read_image(wrong[0].as_py())
    if len(wrong):
        told = ", ".join(wrong.slice(0, 3).to_pylist())
        logger.warning(
            "%d containers cannot be read to their end, each a row of errors: %s", len(wrong), told
        )


def _told(ignored: Mapping[str, int]) -> str:
    total = sum(ignored.values())
    if not total:
        return ""
    most = sorted(ignored.items(), key=lambda one: (-one[1], one[0]))
    words = [f"{count:,} {suffix}" for suffix, count in most[:_TOLD_SUFFIXES]]
    rest = sum(count for _, count in most[_TOLD_SUFFIXES:])
    words += [f"{rest:,} others"] if rest else []
    return f"{total:,} file{'s' * (total > 1)} left out: {', '.join(words)}"


def _resolved(uri: str) -> str:
    scheme, separator, path = uri.partition("://")
    dotted = not {".", ".."}.isdisjoint(path.split("/"))
    return scheme + separator + posixpath.normpath(path) if dotted else uri
