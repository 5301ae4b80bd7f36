"""Read a run back: its explanations, heatmaps, errors and configuration.

Needs neither torch nor Ray, works on local folders and object storage, and never executes anything
that a file holds.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image
from pyarrow import fs

from scacam.drawing import blend, draw_box, grey
from scacam.errors import ImageError, RunError
from scacam.images import decode
from scacam.inputs.containers import read_image
from scacam.localization import interpolation
from scacam.runs.record import read_record
from scacam.storage import absolute, join, locate
from scacam.storage.parquet import read_columns
from scacam.tables import ERRORS, unpack_heatmaps

__all__ = ["Row", "Run", "open_run"]

Row = Mapping[str, Any]
"""One explanation: of `to_pylist()`, of a pandas frame, or any other mapping of its columns."""


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
        self._shards: dict[str, _Shards] = {}

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """What `run.json` says of each network, by name."""
        return {network["name"]: network for network in self.config["networks"]}

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """What `run.json` says of each method, by name."""
        return self.config["methods"]

    @cached_property
    def manifest(self) -> pa.Table:
        """The images of the run: image_id, uri, label, and as far as known size and offset."""
        manifest = self._dataset("manifest.parquet")
        return manifest.scanner(_columns(manifest.schema.names)).to_table()

    @cached_property
    def image_ids(self) -> np.ndarray:
        """The ids of all images of the run, int64, in the order of the manifest."""
        return self._dataset("manifest.parquet").to_table(["image_id"])["image_id"].to_numpy()

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
    ) -> ds.Scanner:
        """Explanations, one row per image, network, class and method. Nothing is read yet.

        A class without a name is called "class 7", and a label below 0 is none, whatever is stored.

        Args:
            network: only this one's. Left out, those of all, without their heatmaps.
            method: only this one's.
            columns: only these; left out, all there are.
            where: a further condition, such as `pyarrow.compute.field("rank") == 1`.
            image_ids: only these images'. In a complete run, other shards are not opened.

        Returns:
            A scanner: `to_batches()` streams it, `to_table().to_pandas()` makes it a frame.

        Raises:
            RunError: there is no such network, method or column, there are no explanations, or
                heatmaps are asked for without a network: networks differ in their size.
        """
        folder = "explanations"
        condition = pc.scalar(True) if where is None else where
        if network is not None:
            self._check_known("network", network, self.networks)
            folder = f"explanations/network={network}"
        if method is not None:
            self._check_known("method", method, self.methods)
            condition = condition & (pc.field("method") == method)
        if not self._has(folder):
            raise RunError(f"{self.path} has no explanations: there is no folder {folder}")
        explanations = self._dataset(folder)
        names = explanations.schema.names
        if network is None:
            if "heatmap" in (columns or ()):
                raise RunError("networks differ in the size of heatmaps: read one at a time")
            names.remove("heatmap")
        for name in columns or ():
            self._check_known("column", name, names)
        if image_ids is not None:
            ids = np.unique(np.asarray(image_ids, dtype=np.int64))
            explanations = self._shards_with(folder, ids)
            condition = condition & _among(ids)
        return explanations.scanner(
            _columns(names if columns is None else columns), filter=condition
        )

    def heatmap(self, row: Row, on_image: bool = False) -> np.ndarray:
        """The heatmap of a row, raw and signed, before any ReLU: float32 `[h, w]`.

        Args:
            row: an explanation with its heatmap.
            on_image: bilinearly upsampled onto the original image, `[height, width]`; NaN outside
                of the view.

        Raises:
            RunError: the row has no heatmap.
        """
        if row.get("heatmap") is None:
            raise RunError("the row has no heatmap: read it with run.explanations(network=…)")
        shape = int(row["map_height"]), int(row["map_width"])
        packed = np.asarray(row["heatmap"], dtype=np.float16).reshape(shape)
        heatmap = unpack_heatmaps(packed, np.asarray(row["scale"], dtype=np.float32))
        return (
            _on_image(heatmap, row, (int(row["width"]), int(row["height"])))
            if on_image
            else heatmap
        )

    def photo(self, row: Row) -> Image.Image | None:
        """The image that was explained, upright; None where it is gone or not the same any more."""
        try:
            photo = decode(read_image(str(row["uri"]), **self._place(int(row["image_id"]))))
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
        heatmap = self.heatmap(row)
        top = float(heatmap.max()) if maximum is None else maximum
        shares = (heatmap / top).clip(0, 1) if top > 0 else np.zeros_like(heatmap)
        picture = blend(photo, _on_image(shares, row, photo.size))
        box = [float("nan" if row[name] is None else row[name]) for name in _BOX]
        if np.isfinite(box).all():
            x, y = photo.width / float(row["width"]), photo.height / float(row["height"])
            draw_box(picture, np.multiply(box, (x, y, x, y)).tolist())
        return picture

    def metrics(self, name: str) -> ds.Dataset | None:
        """What an offline job left in `OUT/metrics/NAME.parquet` or in the folder of that name.

        None if it is not there.
        """
        for path in (f"metrics/{name}.parquet", f"metrics/{name}"):
            if self._has(path):
                return self._dataset(path)
        return None

    @property
    def _explanations(self) -> str:
        return locate(join(self.path, "explanations"))[1]

    def _has(self, name: str) -> bool:
        filesystem, path = locate(join(self.path, name))
        return filesystem.get_file_info(path).type != fs.FileType.NotFound

    def _place(self, image_id: int) -> dict[str, int | None]:
        """Where in its container an image lies, as far as the manifest says."""
        manifest = self._dataset("manifest.parquet")
        names = [name for name in ("offset", "size") if name in manifest.schema.names]
        row = manifest.to_table(names, filter=pc.field("image_id") == image_id)
        return row.to_pylist()[0] if names else {}

    def _dataset(self, name: str) -> ds.Dataset:
        if name not in self._datasets:
            self._datasets[name] = self._open(name)
        return self._datasets[name]

    def _shards_with(self, folder: str, ids: np.ndarray) -> ds.Dataset:
        """Those shards of a folder that may hold some of these images, whose ids are sorted."""
        whole = self._dataset(folder)
        if folder not in self._shards:
            self._shards[folder] = self._bounded(whole.files)
        shards = self._shards[folder]
        wanted = np.searchsorted(ids, shards.first) < np.searchsorted(ids, shards.last, "right")
        paths = shards.paths[wanted].tolist()
        # Not the fragments of the whole dataset: they would keep the metadata of their files.
        return ds.FileSystemDataset.from_paths(
            paths,
            schema=whole.schema,
            format=whole.format,
            filesystem=whole.filesystem,
            partitions=[
                whole.partitioning.parse(path.removeprefix(self._explanations)) for path in paths
            ],
        )

    def _bounded(self, paths: Sequence[str]) -> "_Shards":
        """Shards with the ids that the index says; what it does not know may hold any image."""
        filesystem, root = locate(self.path)
        known = {}
        if self._has("index.parquet"):
            columns = ("path", "first_image_id", "last_image_id")
            index = read_columns(filesystem, join(root, "index.parquet"), columns)
            rows = zip(*(index[name].to_pylist() for name in columns), strict=True)
            known = {join(root, path): (first, last) for path, first, last in rows}
        ends = np.array([known.get(path, (0, np.iinfo(np.int64).max)) for path in paths])
        return _Shards(np.array(paths, dtype=object), *ends.reshape(-1, 2).T)

    def _open(self, name: str) -> ds.Dataset:
        filesystem, path = locate(join(self.path, name))
        try:
            return ds.dataset(
                path,
                format="parquet",
                filesystem=filesystem,
                partitioning=ds.partitioning(pa.schema([("network", pa.string())]), flavor="hive"),
                partition_base_dir=self._explanations,
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"cannot read {join(self.path, name)}: {error}") from error

    def _check_known(self, kind: str, name: str, known: Collection[str]) -> None:
        if name not in known:
            raise RunError(f"{self.path} has no {kind} {name!r}; it has {', '.join(known)}")


_BOX = ("box_x0", "box_y0", "box_x1", "box_y1")


class _Shards(NamedTuple):
    """The shards of a folder: their paths, and their first and last image ids."""

    paths: np.ndarray
    first: np.ndarray
    last: np.ndarray


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


def _columns(names: Sequence[str]) -> dict[str, pc.Expression]:
    return {name: _MENDED.get(name, pc.field(name)) for name in names}


def _among(ids: np.ndarray) -> pc.Expression:
    """A condition on `image_id`, whose first part can be judged by the statistics of a shard."""
    field = pc.field("image_id")
    if not len(ids):
        return pc.scalar(False)
    return (field >= int(ids[0])) & (field <= int(ids[-1])) & field.isin(pa.array(ids))


def _on_image(heatmap: np.ndarray, row: Row, size: tuple[int, int]) -> np.ndarray:
    """Upsample a map onto its image in any width and height, NaN outside of the view."""
    rows, columns = (
        _within(
            length,
            (np.arange(pixels) + 0.5) * float(row[whole]) / pixels,
            float(row[f"view_{axis}0"]),
            float(row[f"view_{axis}1"]),
        )
        for length, pixels, whole, axis in zip(
            heatmap.shape, size[::-1], ("height", "width"), "yx", strict=True
        )
    )
    return rows @ heatmap @ columns.T


def _within(length: int, points: np.ndarray, start: float, end: float) -> np.ndarray:
    """The interpolation from `length` cells of a view to points of the image, NaN outside of it."""
    matrix = interpolation(length, (points - start) / (end - start))
    matrix[(points < start) | (points >= end)] = np.nan
    return matrix.astype(np.float32)
