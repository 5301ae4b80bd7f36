"""A stored heatmap on its image: as numbers, and as a picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from scacam.drawing import blend, draw_box
from scacam.errors import RunError
from scacam.localization import interpolation
from scacam.tables import unpack_heatmaps

__all__ = ["Row", "drawn", "on_image", "unpacked"]

Row = Mapping[str, Any]
"""One explanation: of `to_pylist()`, of a pandas frame, or any other mapping of its columns."""

_BOX = ("box_x0", "box_y0", "box_x1", "box_y1")


def unpacked(row: Row) -> np.ndarray:
    """The raw map of a row, float32 `[h, w]`. Raises RunError if the row has no heatmap."""
    if row.get("heatmap") is None:
        raise RunError("the row has no heatmap: read it with run.explanations(network=…)")
    shape = int(row["map_height"]), int(row["map_width"])
    packed = np.asarray(row["heatmap"], dtype=np.float16).reshape(shape)
    return unpack_heatmaps(packed, np.asarray(row["scale"], dtype=np.float32))


def on_image(heatmap: np.ndarray, row: Row, size: tuple[int, int]) -> np.ndarray:
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


def drawn(row: Row, photo: Image.Image, maximum: float | None) -> Image.Image:
    """The map of a row over its photo in any size, with its box.

    Args:
        row: an explanation with its heatmap.
        photo: its photo.
        maximum: divides the map; None for its own.
    """
    heatmap = unpacked(row)
    top = float(heatmap.max()) if maximum is None else maximum
    shares = (heatmap / top).clip(0, 1) if top > 0 else np.zeros_like(heatmap)
    picture = blend(photo, on_image(shares, row, photo.size))
    box = [float("nan" if row[name] is None else row[name]) for name in _BOX]
    if np.isfinite(box).all():
        x, y = photo.width / float(row["width"]), photo.height / float(row["height"])
        draw_box(picture, np.multiply(box, (x, y, x, y)).tolist())
    return picture


def _within(length: int, points: np.ndarray, start: float, end: float) -> np.ndarray:
    """The interpolation from `length` cells of a view to points of the image, NaN outside of it."""
    matrix = interpolation(length, (points - start) / (end - start))
    matrix[(points < start) | (points >= end)] = np.nan
    return matrix.astype(np.float32)
