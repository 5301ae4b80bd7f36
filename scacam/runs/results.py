"""Read a run back: its explanations, heatmaps, errors and configuration.

Needs neither torch nor Ray, works on local folders and object storage, and never executes anything
that a file holds.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image
from pyarrow import fs

from scacam.drawing import grey
from scacam.errors import ImageError, RunError
from scacam.images import decode
from scacam.inputs.containers import Place, read_image
from scacam.runs.images import Images
from scacam.runs.overlays import Row, drawn, unpacked
from scacam.runs.overlays import on_image as placed
from scacam.runs.record import layers_of, read_record
from scacam.runs.shards import Shards, among, mended, shards_of
from scacam.storage import absolute, join, locate, uri_of
from scacam.tables import (
    ERRORS,
    claimant_names,
    embeddings_folder,
    predictions_folder,
)

__all__ = ["Claimant", "Row", "Run", "open_run"]


class Claimant(NamedTuple):
    """What says where the network looked: a method of one layer.

    Attributes:
        method: as in `scacam.methods.METHODS`.
        layer: the layer under whose name its maps stand.
        name: what it is called: the method, with its layer where the network has several of it.
        map_shape: height and width of its maps.
    """

    method: str
    layer: str
    name: str
    map_shape: tuple[int, int]


def open_run(path: str) -> "Run":
    """Open the results of a run.

    Args:
        path: the output of a job, a folder or `s3://bucket/key`.

    Raises:
        RunError: there is no run, it cannot be read, or a newer version of scacam wrote it.
    """
    config = read_record(path)
    if config is None:
        raise RunError(f"{path} holds no run: no run.json there; name a job's output")
    return Run(path, config)


class Run:
    """A run, read lazily.

    Attributes:
        path: where it is, absolute.
        config: what `run.json` says: networks, methods, view, counts, versions.
    """

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        self.path = absolute(path)
        self.config = config
        self._datasets: dict[str, ds.Dataset] = {}

    @cached_property
    def networks(self) -> dict[str, dict[str, Any]]:
        """What `run.json` says of each network, by name, with its `layers` in any run."""
        return {
            network["name"]: {**network, "layers": layers_of(network)}
            for network in self.config["networks"]
        }

    def claimants(self, network: str) -> list[Claimant]:
        """What has maps of a network, layer by layer, in the order of `run.json`."""
        self._check_known("network", network, self.networks)
        layers = self.networks[network]["layers"]
        names = claimant_names(
            (layer, method)
            for layer, described in layers.items()
            for method in described["methods"]
        )
        return [
            Claimant(method, layer, names[layer, method], tuple(described["map_shape"]))
            for layer, described in layers.items()
            for method in described["methods"]
        ]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """What `run.json` says of each method, by name."""
        return self.config["methods"]

    @cached_property
    def manifest(self) -> pa.Table:
        """The images of the run: image_id, uri, label, and as far as known size and offset."""
        manifest = self._dataset("manifest.parquet")
        return manifest.scanner(mended(manifest.schema.names)).to_table()

    @cached_property
    def images(self) -> Images:
        """The images of the run, of which a few can be looked up without reading them all."""
        return Images(self.path)

    @cached_property
    def image_ids(self) -> np.ndarray:
        """The ids of all images of the run, int64, in the order of the manifest."""
        return np.arange(self.images.count)

    @cached_property
    def errors(self) -> pa.Table:
        """The images that could not be explained, and why: one row each."""
        return self._dataset("errors").to_table() if self._has("errors") else ERRORS.empty_table()

    def explanations(
        self,
        network: str | None = None,
        method: str | None = None,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
        image_ids: Sequence[int] | np.ndarray | None = None,
        *,
        layer: str | None = None,
    ) -> ds.Scanner:
        """Explanations, one row per image, network, layer, class and method. Nothing is read yet.

        A class without a name is called "class 7", and a label below 0 is none, whatever is stored.

        Args:
            network: only this one's. Left out, those of all, without their heatmaps.
            method: only this one's, of all layers that have it.
            columns: only these; left out, all there are.
            where: a further condition, such as `pyarrow.compute.field("rank") == 1`.
            image_ids: only these images'. In a complete run, other shards are not opened.
            layer: only this one's.

        Returns:
            A scanner: `to_batches()` streams it, `to_table().to_pandas()` makes it a frame.
            Heatmaps are tensors of their shape if all are of one shape, else flat lists of
            `map_height · map_width` cells.

        Raises:
            RunError: there is no such network, method, layer or column, there are no explanations,
                or heatmaps are asked for without a network: networks differ in their size.
        """
        condition = pc.scalar(True) if where is None else where
        known = self.networks
        if network is not None:
            self._check_known("network", network, known)
            known = {network: known[network]}
        if method is not None:
            self._check_known("method", method, self.methods)
            condition = condition & (pc.field("method") == method)
        if layer is not None:
            of_known = [name for described in known.values() for name in described["layers"]]
            self._check_known("layer", layer, of_known)
        layers = {
            (name, each): maps["methods"]
            for name, described in known.items()
            for each, maps in described["layers"].items()
            if layer in (None, each)
        }
        having = [each for each, methods in layers.items() if method is None or method in methods]
        if network is None and "heatmap" in (columns or ()):
            raise RunError("networks differ in the size of heatmaps: read one at a time")
        ids = None if image_ids is None else np.unique(np.asarray(image_ids, dtype=np.int64))
        if ids is not None:
            condition = condition & among(ids)
        explanations = self._shards.dataset(
            having or list(layers), ids, heatmaps=network is not None
        )
        names = explanations.schema.names
        for name in columns or ():
            self._check_known("column", name, names)
        return explanations.scanner(mended(names if columns is None else columns), filter=condition)

    def predictions(
        self,
        network: str,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
        image_ids: Sequence[int] | np.ndarray | None = None,
    ) -> ds.Scanner | None:
        """Predictions, one row per image and explained class. Nothing is read yet.

        Args:
            network: whose.
            columns: only these; left out, all there are.
            where: a condition, such as `pyarrow.compute.field("rank") == 1`.
            image_ids: only these images'. In a complete run, other shards are not opened.

        Returns:
            A scanner, or None where a run has not kept them.

        Raises:
            RunError: there is no such network.
        """
        return self._beside(predictions_folder, network, columns, where, image_ids)

    def embeddings(
        self,
        network: str,
        columns: Sequence[str] | None = None,
        where: pc.Expression | None = None,
        image_ids: Sequence[int] | np.ndarray | None = None,
    ) -> ds.Scanner | None:
        """The pooled features, one row per image, as `predictions`; None if they were not kept."""
        return self._beside(embeddings_folder, network, columns, where, image_ids)

    def _beside(
        self,
        folder: Callable[[str], str],
        network: str,
        columns: Sequence[str] | None,
        where: pc.Expression | None,
        image_ids: Sequence[int] | np.ndarray | None,
    ) -> ds.Scanner | None:
        self._check_known("network", network, self.networks)
        condition = pc.scalar(True) if where is None else where
        ids = None if image_ids is None else np.unique(np.asarray(image_ids, dtype=np.int64))
        if ids is not None:
            condition = condition & among(ids)
        found = self._shards.predictions(folder(network), ids)
        return None if found is None else found.scanner(columns, filter=condition)

    def shards(self, network: str, layer: str) -> list[str]:
        """Where the explanations of a layer are, file by file, for readers other than pyarrow."""
        infos = shards_of(self.path, self._shards.folder(network, layer))
        return [uri_of(self.path, info.path) for info in infos]

    def heatmap(self, row: Row, on_image: bool = False) -> np.ndarray:
        """The heatmap of a row, raw and signed, before any ReLU: float32 `[h, w]`.

        Args:
            row: an explanation with its heatmap.
            on_image: bilinearly upsampled onto the original image, `[height, width]`; NaN outside
                of the view.

        Raises:
            RunError: the row has no heatmap.
        """
        heatmap = unpacked(row)
        size = int(row["width"]), int(row["height"])
        return placed(heatmap, row, size) if on_image else heatmap

    def photo(self, row: Row, place: Place | None = None) -> Image.Image | None:
        """The image that was explained, upright; None where it is gone or not the same any more.

        Args:
            row: an explanation.
            place: where the image is, as `images.places` has it; left out, it is looked up.
        """
        image_id = int(row["image_id"])
        place = place or self.images.places([image_id]).get(image_id)
        if place is None:
            return None
        try:
            photo = decode(read_image(str(row["uri"]), place.offset, place.size))
        except (OSError, ValueError, ImageError):
            return None
        return photo if photo.size == (int(row["width"]), int(row["height"])) else None

    def overlay(
        self, row: Row, photo: Image.Image | None = None, maximum: float | None = None
    ) -> Image.Image:
        """The heatmap of a row over its photo, with its box.

        The map is divided by its maximum; what is below 0 counts as 0.

        Args:
            row: an explanation with its heatmap.
            photo: the photo in the size the picture shall have; left out, it is read from its uri,
                and where it is gone, the heatmap stands on grey.
            maximum: divides the map instead, so that pictures beside one another share one scale.
        """
        photo = photo or self.photo(row) or grey(int(row["width"]), int(row["height"]))
        return drawn(row, photo, maximum)

    def metrics(self, name: str) -> ds.Dataset | None:
        """What an offline job left in `OUT/metrics/NAME.parquet` or in the folder of that name.

        None if it is not there.
        """
        for path in (f"metrics/{name}.parquet", f"metrics/{name}"):
            if self._has(path):
                return self._dataset(path)
        return None

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.path, by_layer=self.config["schema_version"] > 1)

    def _has(self, name: str) -> bool:
        filesystem, path = locate(join(self.path, name))
        return filesystem.get_file_info(path).type != fs.FileType.NotFound

    def _dataset(self, name: str) -> ds.Dataset:
        if name not in self._datasets:
            self._datasets[name] = self._open(name)
        return self._datasets[name]

    def _open(self, name: str) -> ds.Dataset:
        filesystem, path = locate(join(self.path, name))
        try:
            return ds.dataset(
                path,
                format="parquet",
                filesystem=filesystem,
                partitioning="hive",
                partition_base_dir=locate(self.path)[1],
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"cannot read {join(self.path, name)}: {error}") from error

    def _check_known(self, kind: str, name: str, known: Collection[str]) -> None:
        if name not in known:
            raise RunError(f"{self.path} has no {kind} {name!r}; it has {', '.join(known)}")
