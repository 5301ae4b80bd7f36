"""Where heatmaps lie: at the border, in the corners, on the objects, always in one place.

Arrays in, arrays out. Maps are `shares`: not negative, each with sum 1.
"""

import numpy as np

from scacam.audit.maps import TopMaps
from scacam.evaluation.truth import TrueBoxes

__all__ = [
    "BORDER_AREA",
    "CORNER_AREA",
    "border_cells",
    "box_cells",
    "corner_cells",
    "coverage",
    "fixed_place",
    "outside",
]

_BORDER = 1 / 8
_CORNER = 1 / 4
BORDER_AREA = 1 - (1 - 2 * _BORDER) ** 2
"""Share of the view within an eighth of it from its edges."""
CORNER_AREA = 4 * _CORNER**2
"""Share of the view in the four squares in its corners, each a quarter of it wide and high."""


def coverage(objects: TrueBoxes, maps: TopMaps) -> np.ndarray:
    """How much of each cell is object: `[N, h, w]`, all NaN where an image has no boxes."""
    ids = maps.column("image_id")
    count, height, width = maps.heatmaps.shape
    first, last = np.searchsorted(objects.image_ids, [ids[0], ids[-1] + 1]) if count else (0, 0)
    chosen = first + np.flatnonzero(np.isin(objects.image_ids[first:last], ids))
    images = np.searchsorted(ids, objects.image_ids[chosen])
    views = maps.rectangles("view")[images]
    start, size = views[:, [0, 1, 0, 1]], (views[:, 2:] - views[:, :2])[:, [0, 1, 0, 1]]
    boxes = (objects.boxes[chosen] - start) / size * [width, height, width, height]
    covered = np.full((count, height, width), -1.0)
    np.maximum.at(covered, images, box_cells(boxes, height, width))
    return np.where(covered < 0, np.nan, covered)


def box_cells(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """How much of each cell of a map lies in boxes `[M, 4]`, given in cells: `[M, h, w]`."""
    rows = _overlap(height, boxes[:, 1, None], boxes[:, 3, None])
    columns = _overlap(width, boxes[:, 0, None], boxes[:, 2, None])
    return rows[:, :, None] * columns[:, None, :]


def border_cells(height: int, width: int) -> np.ndarray:
    """The share of each cell of a map `[h, w]` that lies in the border of the view."""
    inner = [_overlap(n, _BORDER * n, (1 - _BORDER) * n) for n in (height, width)]
    return 1 - np.outer(*inner)


def corner_cells(height: int, width: int) -> np.ndarray:
    """The share of each cell of a map `[h, w]` that lies in the corners of the view."""
    outer = [1 - _overlap(n, _CORNER * n, (1 - _CORNER) * n) for n in (height, width)]
    return np.outer(*outer)


def _overlap(length: int, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """How much of each of `length` cells of width 1 lies between two points."""
    cells = np.arange(length)
    return (np.minimum(cells + 1, high) - np.maximum(cells, low)).clip(0, 1)


def outside(shares: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """How much denser maps are outside of the objects than inside, from 0 to 1; 0.5 is alike.

    A share of the map alone would call every small object missed. NaN where nothing or everything
    is object, or the map is zero.

    Args:
        shares: maps `[N, h, w]` with sum 1.
        coverage: `[N, h, w]`, how much of each cell is object.
    """
    area = coverage.mean((1, 2))
    within = (shares * coverage).sum((1, 2))
    known = (area > 0) & (area < 1) & shares.any((1, 2))
    area = np.where(known, area, np.nan)
    away, on = (1 - within) / (1 - area), within / area
    return away / (away + on)


def fixed_place(total: np.ndarray, squares: float, count: int, usual: np.ndarray) -> float:
    """How alike maps are in what sets them apart from the usual map, whatever the image.

    The mean product of the deviations of two different maps from the usual one, relative to their
    mean square: 1 if all maps are one and the same, about 0 if each is unusual in its own way.

    Args:
        total: the sum of the maps `[h, w]`, each with sum 1.
        squares: the sum of their squares over maps and cells.
        count: how many they are, at least 2.
        usual: the map `[h, w]` that other classes have.

    Returns:
        NaN if all maps are the usual one.
    """
    spread = squares - 2 * float((usual * total).sum()) + count * float((usual**2).sum())
    if spread <= 1e-12 * squares:
        return float("nan")
    products = float(((total - count * usual) ** 2).sum()) - spread
    return products / (count - 1) / spread
