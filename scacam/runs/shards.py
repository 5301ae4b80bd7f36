"""The shards of a run: where those of a layer lie, which may hold some images, how to read them."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from scacam.errors import RunError
from scacam.storage import join, locate
from scacam.storage.parquet import read_columns
from scacam.tables import explanations_folder

__all__ = ["Shards", "among", "mended", "shards_of"]

_MENDED = {
    "class_name": pc.coalesce(
        pc.field("class_name"),
        pc.binary_join_element_wise(
            pc.scalar("class"), pc.field("class_id").cast(pa.string()), pc.scalar(" ")
        ),
    ),
    "label": pc.if_else(
        pc.field("label") >= 0, pc.field("label"), pc.scalar(pa.scalar(None, pa.int32()))
    ),
}
"""Columns that runs may hold as they should not be read."""


def shards_of(output: str, folder: str) -> list[fs.FileInfo]:
    """The Parquet files of a folder of the output, none if it is not there."""
    filesystem, path = locate(join(output, folder))
    selector = fs.FileSelector(path, allow_not_found=True)
    return [info for info in filesystem.get_file_info(selector) if info.extension == "parquet"]


def mended(names: Sequence[str]) -> dict[str, pc.Expression]:
    """Columns by their names, as they should be read."""
    return {name: _MENDED.get(name, pc.field(name)) for name in names}


def among(ids: np.ndarray) -> pc.Expression:
    """A condition on `image_id`, whose first part can be judged by the statistics of a shard."""
    field = pc.field("image_id")
    if not len(ids):
        return pc.scalar(False)
    return (field >= int(ids[0])) & (field <= int(ids[-1])) & field.isin(pa.array(ids))


class Shards:
    """The shards of a run, found folder by folder and only once."""

    def __init__(self, output: str, *, by_layer: bool) -> None:
        """Look below an output.

        Args:
            output: the run's folder or prefix.
            by_layer: whether each layer has a folder. In a run of schema version 1 a network has
                one layer and its folder.
        """
        self.output, self.by_layer = output, by_layer
        self._found: dict[str, _Shards] = {}

    def folder(self, network: str, layer: str) -> str:
        """Where those of a layer lie, below the output."""
        folder = explanations_folder(network, layer)
        return folder if self.by_layer else folder.rpartition("/")[0]

    def dataset(
        self, layers: Sequence[tuple[str, str]], ids: np.ndarray | None, *, heatmaps: bool
    ) -> ds.Dataset:
        """The explanations of some layers, with the columns `network` and `layer`.

        Args:
            layers: by network and name.
            ids: of the images that are wanted, sorted; None for all.
            heatmaps: whether they are wanted: tensors if all have one shape, else flat lists.

        Raises:
            RunError: there are none, or a shard cannot be read.
        """
        found = [self._in(self.folder(*layer)) for layer in layers]
        paths: list[str] = []
        partitions: list[pc.Expression] = []
        for (network, layer), shards in zip(layers, found, strict=True):
            chosen = shards.paths if ids is None else shards.paths[shards.may_hold(ids)]
            here = (pc.field("network") == network) & (pc.field("layer") == layer)
            paths += chosen.tolist()
            partitions += [here] * len(chosen)
        # Anew each time: the fragments of a dataset keep the metadata of their files.
        return ds.FileSystemDataset.from_paths(
            paths,
            schema=self._schema(found, heatmaps),
            format=ds.ParquetFileFormat(),
            filesystem=locate(self.output)[0],
            partitions=partitions,
        )

    def _schema(self, found: "Iterable[_Shards]", heatmaps: bool) -> pa.Schema:
        schemas = [shards.schema for shards in found if shards.schema is not None]
        if not schemas:
            raise RunError(f"{self.output} has no explanations: there are no shards of them")
        schema = schemas[0]
        place = schema.get_field_index("heatmap")
        if not heatmaps:
            schema = schema.remove(place)
        elif len({str(other.field("heatmap").type) for other in schemas}) > 1:
            schema = schema.set(place, pa.field("heatmap", pa.list_(pa.float16())))
        for name in ("network", "layer"):
            schema = schema.append(pa.field(name, pa.string()))
        return schema

    def predictions(self, folder: str, ids: np.ndarray | None) -> ds.Dataset | None:
        """What is stored beside explanations, in a folder of the output; None if nothing is.

        Args:
            folder: of predictions or embeddings.
            ids: of the images that are wanted, sorted; None for all.
        """
        shards = self._in(folder)
        if shards.schema is None:
            return None
        return ds.FileSystemDataset.from_paths(
            (shards.paths if ids is None else shards.paths[shards.may_hold(ids)]).tolist(),
            schema=shards.schema,
            format=ds.ParquetFileFormat(),
            filesystem=locate(self.output)[0],
        )

    def _in(self, folder: str) -> "_Shards":
        if folder not in self._found:
            filesystem, _ = locate(self.output)
            files = sorted(shards_of(self.output, folder), key=lambda info: info.path)
            schema = None
            if files:
                try:
                    schema = ds.ParquetFileFormat().inspect(files[0].path, filesystem)
                except (OSError, pa.ArrowInvalid) as error:
                    raise RunError(f"cannot read {join(self.output, folder)}: {error}") from error
            # A shard that the index does not know may hold any image.
            anywhere = 0, np.iinfo(np.int64).max
            ends = [self._ends.get(f"{folder}/{info.base_name}", anywhere) for info in files]
            paths = np.array([info.path for info in files], dtype=object)
            first, last = np.array(ends, dtype=np.int64).reshape(-1, 2).T
            self._found[folder] = _Shards(paths, first, last, schema)
        return self._found[folder]

    @cached_property
    def _ends(self) -> dict[str, tuple[int, int]]:
        """The first and the last image id of each shard, by its path, as far as the index says."""
        filesystem, path = locate(join(self.output, "index.parquet"))
        if filesystem.get_file_info(path).type == fs.FileType.NotFound:
            return {}
        columns = ("path", "first_image_id", "last_image_id")
        index = read_columns(filesystem, path, columns)
        rows = zip(*(index[name].to_pylist() for name in columns), strict=True)
        return {path: (first, last) for path, first, last in rows}


class _Shards(NamedTuple):
    """The shards of a folder: their paths, their first and last image ids, and their schema."""

    paths: np.ndarray
    first: np.ndarray
    last: np.ndarray
    schema: pa.Schema | None

    def may_hold(self, ids: np.ndarray) -> np.ndarray:
        """Which of them may hold some of these ids, which are sorted: bool `[shards]`."""
        return np.searchsorted(ids, self.first) < np.searchsorted(ids, self.last, "right")
