"""The proof that a run is whole, from its files alone, and the index that comes out of it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from pyarrow import fs

from scacam.errors import RunError
from scacam.runs.shards import shards_of
from scacam.storage import locate, read_ahead
from scacam.storage.parquet import read_columns
from scacam.tables import INDEX, embeddings_folder, explanations_folder, predictions_folder

__all__ = ["Proof", "explained_ids", "prove"]


class Proof(NamedTuple):
    """What the files hold.

    Attributes:
        explained: images explained by every network.
        errors: images in the errors table, by kind.
        index: one row per shard, as `scacam.tables.INDEX`.
    """

    explained: int
    errors: Counter[str]
    index: pa.Table


def prove(
    output: str, networks: Iterable[Mapping[str, Any]], images: int, embeddings: bool = False
) -> Proof:
    """Check that every image is explained by every layer of every network, or once in the errors.

    Explained is an image that one shard of the layer has, with one row for each of its classes and
    each method of the layer. Where a network's predictions are stored, and where embeddings are, it
    is in one shard of these as well. Reads the ids of one shard at a time; takes a few bytes of
    memory per image of the manifest.

    Args:
        output: the run's folder or prefix.
        networks: as `run.json` describes them.
        images: how many the manifest has.
        embeddings: whether they are stored.

    Raises:
        RunError: says what is missing or there twice.
    """
    failed = np.zeros(images, dtype=np.int16)
    errors: Counter[str] = Counter()
    index: list[dict[str, object]] = []
    for shard, table in _read(output, "errors", ["image_id", "error"]):
        if not len(table):
            continue
        ids = table["image_id"].to_numpy()
        np.add.at(failed, ids, 1)
        errors.update(table["error"].to_pylist())
        index.append({**shard, "network": None, "layer": None, **_statistics(ids)})
    for network in networks:
        name = network["name"]
        for layer, described in network["layers"].items():
            seen = failed.copy()
            folder = explanations_folder(name, layer)
            for shard, table in _read(output, folder, ["image_id", "class_id", "method"]):
                _refuse_other_rows(table, described["methods"], str(shard["path"]))
                ids = np.unique(table["image_id"].to_numpy())
                seen[ids] += 1
                index.append({**shard, "network": name, "layer": layer, **_statistics(ids)})
            _refuse_gaps(output, f"layer {layer} of {name}", seen)
        further = {predictions_folder(name): "class_id"} if "channels" in network else {}
        if embeddings:
            further[embeddings_folder(name)] = "image_id"
        for folder, key in further.items():
            seen = failed.copy()
            for shard, table in _read(output, folder, list(dict.fromkeys(["image_id", key]))):
                if len(table.group_by(["image_id", key]).aggregate([])) < len(table):
                    raise RunError(f"{shard['path']} has rows twice")
                ids = np.unique(table["image_id"].to_numpy())
                seen[ids] += 1
                index.append({**shard, "network": name, "layer": None, **_statistics(ids)})
            _refuse_gaps(output, folder, seen)
    explained = images - int(np.count_nonzero(failed))
    return Proof(explained, errors, pa.Table.from_pylist(index, INDEX))


def _refuse_gaps(output: str, what: str, seen: np.ndarray) -> None:
    """Refuse a run that has not every image once: by image, how often it was seen."""
    for wrong, how in ((seen < 1, "neither explained nor in the errors"), (seen > 1, "twice")):
        if wrong.any():
            raise RunError(
                f"{output} is not whole: of {what}, {int(wrong.sum())} images are there {how}, "
                f"the first is image {int(wrong.argmax())}"
            )


def _refuse_other_rows(table: pa.Table, methods: Sequence[str], path: str) -> None:
    """Refuse a shard that has not one row for each method of each class of its images."""
    places = pc.index_in(table["method"], pa.array(methods, pa.string()))
    if places.null_count:
        other = table["method"].filter(pc.is_null(places))[0]
        raise RunError(f"{path} has rows of {other}, which this layer has not")
    bits = table.append_column("bits", pa.array(1 << places.to_numpy().astype(np.int64)))
    classes = bits.group_by(["image_id", "class_id"]).aggregate(
        [("bits", "count"), ("bits", "sum")]
    )
    # Of as many powers of two as there are methods, only those of each of them have this sum.
    once = pc.equal(classes["bits_count"], len(methods))
    once = pc.and_(once, pc.equal(classes["bits_sum"], (1 << len(methods)) - 1))
    if not pc.all(once).as_py():
        first = classes.filter(pc.invert(once)).slice(0, 1).to_pylist()[0]
        raise RunError(
            f"{path} has not every method once, of class {first['class_id']} of image "
            f"{first['image_id']}"
        )


def explained_ids(output: str, folder: str) -> np.ndarray:
    """The ids of the images that the explanations in a folder of the output are of, sorted."""
    shards = [np.unique(t["image_id"].to_numpy()) for _, t in _read(output, folder, ["image_id"])]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *shards]))


def _read(
    output: str, folder: str, columns: list[str]
) -> Iterator[tuple[dict[str, object], pa.Table]]:
    filesystem, _ = locate(output)

    def read(info: fs.FileInfo) -> tuple[dict[str, object], pa.Table]:
        table = read_columns(filesystem, info.path, columns)
        shard = {"path": f"{folder}/{info.base_name}", "bytes": info.size, "rows": len(table)}
        return shard, table

    return read_ahead(read, shards_of(output, folder))


def _statistics(ids: np.ndarray) -> dict[str, int]:
    return {"images": len(ids), "first_image_id": int(ids.min()), "last_image_id": int(ids.max())}
