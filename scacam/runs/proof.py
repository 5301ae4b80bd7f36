"""The proof that a run is whole, from its files alone, and the index that comes out of it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pyarrow import fs

from scacam.errors import RunError
from scacam.storage import join, locate, read_ahead
from scacam.storage.parquet import read_columns
from scacam.tables import INDEX

__all__ = ["Proof", "explained_ids", "prove", "shards_of"]


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


def prove(output: str, networks: Sequence[str], images: int) -> Proof:
    """Check that every image is once in the explanations of every network, or once in the errors.

    Reads the ids of one shard at a time; takes a few bytes of memory per image of the manifest.

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
        index.append({**shard, "network": None, **_statistics(ids)})
    for network in networks:
        seen = failed.copy()
        folder = f"explanations/network={network}"
        for shard, table in _read(output, folder, ["image_id", "class_id", "method"]):
            if table.group_by(table.column_names).aggregate([]).num_rows != len(table):
                raise RunError(f"{shard['path']} has an (image, class, method) twice")
            ids = np.unique(table["image_id"].to_numpy())
            seen[ids] += 1
            index.append({**shard, "network": network, **_statistics(ids)})
        for wrong, what in ((seen < 1, "neither explained nor in the errors"), (seen > 1, "twice")):
            if wrong.any():
                raise RunError(
                    f"{output} is not whole: of {network}, {int(wrong.sum())} images are there "
                    f"{what}, the first is image {int(wrong.argmax())}"
                )
    explained = images - int(np.count_nonzero(failed))
    return Proof(explained, errors, pa.Table.from_pylist(index, INDEX))


def explained_ids(output: str, network: str) -> np.ndarray:
    """The ids of the images that a network has explained, sorted."""
    folder = f"explanations/network={network}"
    shards = [np.unique(t["image_id"].to_numpy()) for _, t in _read(output, folder, ["image_id"])]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *shards]))


def shards_of(output: str, folder: str) -> list[fs.FileInfo]:
    """The Parquet files of a folder of the output, none if it is not there."""
    filesystem, path = locate(join(output, folder))
    selector = fs.FileSelector(path, allow_not_found=True)
    return [info for info in filesystem.get_file_info(selector) if info.extension == "parquet"]


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
