"""Where a heatmap points: its peak and its box, in pixels of the original image.

Post-processing, stated once: ReLU on the map where the method has one, bilinear upsampling without
aligned corners to the network's input, division by the maximum.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

__all__ = [
    "BOX_THRESHOLD",
    "Localization",
    "box_of_region",
    "interpolation",
    "localize",
    "upsample",
]

BOX_THRESHOLD = 0.2
"""Share of the maximum above which a cell belongs to the box (Zhou et al. 2016)."""


class Localization(NamedTuple):
    """Peaks and boxes of N heatmaps, NaN where there is none.

    Attributes:
        peaks: float32 `[N, 2]`: x, y, the centre of the largest cell (the first of equals).
        boxes: float32 `[N, 4]`: x0, y0, x1, y1, half-open.
    """

    peaks: np.ndarray
    boxes: np.ndarray


def localize(
    heatmaps: np.ndarray,
    relu: np.ndarray,
    views: np.ndarray,
    input_size: tuple[int, int],
    threshold: float = BOX_THRESHOLD,
) -> Localization:
    """Find the peak of each raw map, and the box of its largest region above a threshold.

    Args:
        heatmaps: `[N, h, w]`, raw and signed, in any scale.
        relu: bool `[N]`, whether the method applies a ReLU before it localizes.
        views: `[N, 4]`, the view of each map in its original image: x0, y0, x1, y1.
        input_size: height and width of the network's input, to which a map is upsampled.
        threshold: as a share of the map's maximum.

    Returns:
        Coordinates in continuous pixels of the original image, x to the right, y down. A constant
        map, or one with a NaN, has neither peak nor box; a map without a positive value, be it only
        after upsampling, has no box.
    """
    heatmaps = np.ascontiguousarray(heatmaps, dtype=np.float32)
    # By a power of two, which is exact: the smallest numbers would lose their digits, or vanish.
    _, exponents = np.frexp(np.abs(heatmaps).max((1, 2), keepdims=True))
    heatmaps = np.ldexp(heatmaps, -exponents)
    count, map_height, map_width = heatmaps.shape
    height, width = input_size
    flat = heatmaps.reshape(count, map_height * map_width)
    constant = ~(flat.max(1) > flat.min(1))  # a NaN is not more than itself

    rows, columns = np.divmod(flat.argmax(1), map_width)
    cells = np.stack([(columns + 0.5) / map_width, (rows + 0.5) / map_height], axis=1)
    peaks = _in_image(cells, views)
    peaks[constant] = np.nan

    boxes = np.full((count, 4), np.nan, dtype=np.float32)
    kept = np.where(relu[:, None, None], heatmaps.clip(min=0), heatmaps)
    # Some maps are the same for every class.
    known: dict[bytes, tuple[float, float, float, float]] = {}
    for index in np.flatnonzero(~constant & (flat.max(1) > 0)):
        key = kept[index].tobytes()
        if key not in known:
            upsampled = upsample(kept[index], input_size)
            known[key] = box_of_region(upsampled > threshold * upsampled.max())
        boxes[index] = known[key]
    boxes /= np.array([width, height, width, height], dtype=np.float32)
    corners = _in_image(boxes.reshape(count, 2, 2), views[:, None])
    return Localization(peaks, corners.reshape(count, 4))


def upsample(heatmap: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize maps `[..., h, w]` bilinearly to a height and width, without aligned corners."""
    rows = _even(heatmap.shape[-2], size[0])
    columns = _even(heatmap.shape[-1], size[1])
    return rows @ heatmap @ columns.T


@lru_cache(maxsize=64)
def _even(length: int, new_length: int) -> np.ndarray:
    return interpolation(length, (np.arange(new_length) + 0.5) / new_length).astype(np.float32)


def interpolation(length: int, points: np.ndarray) -> np.ndarray:
    """The matrix that interpolates linearly between the centres of a view's cells.

    Args:
        length: how many cells there are along one side of the view.
        points: `[..., P]`, where to look, as shares of that side: 0 is its start, 1 its end.

    Returns:
        Float64 `[..., P, length]`, rows with sum 1. Beyond the outermost centres, their cells hold.
    """
    cells = (points * length - 0.5).clip(0, length - 1)[..., None]
    return (1 - np.abs(cells - np.arange(length))).clip(min=0)


def box_of_region(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The half-open bounding box x0, y0, x1, y1 of the largest 8-connected region of a mask.

    Of regions of equal size, the first in reading order counts; NaN if there is none.
    """
    outlines, tree = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return np.nan, np.nan, np.nan, np.nan
    region = outlines[0] if len(outlines) == 1 else _largest(outlines, tree[0, :, 3].tolist())
    x, y, width, height = cv2.boundingRect(region)
    return x, y, x + width, y + height


def _largest(outlines: Sequence[np.ndarray], parents: Sequence[int]) -> np.ndarray:
    """The outline of the largest region.

    Pixels are counted by Pick's theorem, in a fraction of the time that labelling them takes: an
    outline through n pixels has area − n / 2 + 1 inside, and area + n / 2 + 1 with its own.

    Args:
        outlines: int32 `[pixels, 1, 2]`, of regions, from their first pixel on, and of their holes,
            along the pixels around.
        parents: of a hole, the index of its region; of a region, -1.
    """
    sizes = {index: 0.0 for index, parent in enumerate(parents) if parent < 0}
    for index, (outline, parent) in enumerate(zip(outlines, parents, strict=True)):
        area, half = cv2.contourArea(outline), len(outline) / 2 if len(outline) > 1 else 0.0
        if parent < 0:
            sizes[index] += area + half + 1
        else:
            sizes[parent] -= area - half + 1

    def order(index: int) -> tuple[float, int, int]:
        x, y = outlines[index][0, 0]
        return sizes[index], -y, -x

    return outlines[max(sizes, key=order)]


def _in_image(points: np.ndarray, views: np.ndarray) -> np.ndarray:
    """From points `[..., 2]` in [0, 1] of the view to pixels of the original image."""
    origin, corner = views[..., :2], views[..., 2:]
    return (origin + points * (corner - origin)).astype(np.float32)
