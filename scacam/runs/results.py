"""Read a run back: its explanations, heatmaps, errors and configuration.

Needs neither torch nor Ray, works on local folders and object storage, and never executes anything
that a file holds.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

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
from scacam.storage import join, locate, read_bytes
from scacam.tables import ERRORS, SCHEMA_VERSION, unpack_heatmaps

__all__ = ["Row", "Run", "open_run"]

Row = Mapping[str, Any]
"""One explanation: of `to_pylist()`, of a pandas frame, or any other mapping of its columns."""


def open_run(path: str) -> "Run":
    """Open the results of a run.

    Args:
        path: the output of a job, a folder or `s3://bucket/key`.

    Raises:
        RunError: there is no run, or a newer version of scacam wrote it.
    """
    record = join(path, "run.json")
    try:
        config = json.loads(read_bytes(record))
    except FileNotFoundError as error:
        raise RunError(f"{path} holds no run: no run.json there; name a job's output") from error
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {record}: {error}") from error
    version = config.get("schema_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise RunError(f"{record} does not describe a run: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{path} has schema version {version}, but this scacam reads only up to "
            f"{SCHEMA_VERSION}; install a newer scacam"
        )
    return Run(path, config)


class Run:
    """A run, read lazily.

    Attributes:
        path: where it is.
        config: what `run.json` says: networks, methods, view, counts, versions.
    """

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._datasets: dict[str, ds.Dataset] = {}

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
        """The images of the run: image_id, uri, label."""
        return self._dataset("manifest.parquet").to_table()

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
    ) -> ds.Scanner:
        """Explanations, one row per image, network, class and method. Nothing is read yet.

        Args:
            network: only this one's. Left out, those of all, without their heatmaps.
            method: only this one's.
            columns: only these; left out, all there are.
            where: a further condition, such as `pyarrow.compute.field("rank") == 1`.

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
            heatmap = explanations.schema.get_field_index("heatmap")
            explanations = explanations.replace_schema(explanations.schema.remove(heatmap))
        for name in columns or ():
            self._check_known("column", name, names)
        return explanations.scanner(
            columns=None if columns is None else [*columns], filter=condition
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

    def _has(self, name: str) -> bool:
        filesystem, path = locate(join(self.path, name))
        return filesystem.get_file_info(path).type != fs.FileType.NotFound

    def _place(self, image_id: int) -> dict[str, int | None]:
        """Where in its container an image lies, as far as the manifest says."""
        names = [name for name in ("offset", "size") if name in self.manifest.column_names]
        return self.manifest.select(names).slice(image_id, 1).to_pylist()[0] if names else {}

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
                partitioning=ds.partitioning(pa.schema([("network", pa.string())]), flavor="hive"),
                partition_base_dir=locate(join(self.path, "explanations"))[1],
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"cannot read {join(self.path, name)}: {error}") from error

    def _check_known(self, kind: str, name: str, known: Collection[str]) -> None:
        if name not in known:
            raise RunError(f"{self.path} has no {kind} {name!r}; it has {', '.join(known)}")


_BOX = ("box_x0", "box_y0", "box_x1", "box_y1")


def _on_image(heatmap: np.ndarray, row: Row, size: tuple[int, int]) -> np.ndarray:
    """Upsample a map onto its image in any width and height, NaN outside of the view."""
    rows, columns = (
        _interpolation(
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


def _interpolation(length: int, points: np.ndarray, start: float, end: float) -> np.ndarray:
    """The matrix `[points, length]` that interpolates linearly between the cells of a view."""
    cells = (points - start) / (end - start) * length - 0.5
    places = cells.clip(0, length - 1)[:, None]
    matrix = (1 - np.abs(places - np.arange(length))).clip(min=0)
    matrix[(points < start) | (points >= end)] = np.nan
    return matrix.astype(np.float32)
