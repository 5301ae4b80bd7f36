"""Where a heatmap points: its peak and its box, in pixels of the original image.

Post-processing, stated once: ReLU on the map where the method has one, bilinear upsampling without
aligned corners to the network's input, division by the maximum.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
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

_AT_ONCE = 1 << 18
"""So many samples are taken at once, which a core's cache holds."""

_DOUBT = 2.0**-18
"""More than the error of upsampling maps within ±1, whatever the order of its sums: that is some
eight roundings of 2^-24."""

_SWEEPS = 4
"""How often a region is followed to all four sides."""


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
    has_box = ~constant & (flat.max(1) > 0)
    kept = np.where(relu[:, None, None], heatmaps.clip(min=0), heatmaps)
    boxes[has_box] = _boxes(kept[has_box], input_size, threshold)
    boxes /= np.array([width, height, width, height], dtype=np.float32)
    corners = _in_image(boxes.reshape(count, 2, 2), views[:, None])
    return Localization(peaks, corners.reshape(count, 4))


def _boxes(heatmaps: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    """The boxes `[N, 4]` of maps `[N, h, w]` within ±1, in pixels of the network's input.

    A map that has not one region beyond doubt, or has none, is upsampled.
    """
    count, height, width = heatmaps.shape
    boxes = np.full((count, 4), np.nan, dtype=np.float32)
    at_once = max(1, _AT_ONCE // (4 * height * width))
    known: dict[bytes, tuple[float, float, float, float]] = {}
    for start in range(0, count, at_once):
        part = heatmaps[start : start + at_once]
        found = boxes[start : start + at_once]
        of_one_region, found[:] = _boxes_from_samples(part, size, threshold)
        for index in np.flatnonzero(~of_one_region):
            key = part[index].tobytes()  # some maps are the same for every class
            if key not in known:
                upsampled = upsample(part[index], size)
                known[key] = box_of_region(upsampled > threshold * upsampled.max())
            found[index] = known[key]
    return boxes


def _boxes_from_samples(
    heatmaps: np.ndarray, size: tuple[int, int], threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of those maps that have one region, without upsampling them.

    An upsampled map is linear along every row and column of pixels between those next to the
    centres of cells. Sampled where such rows and columns cross, it has its maximum among the
    samples; and where two neighbouring samples are above the threshold, so is all between them,
    while every other pixel that is above it hangs together with a corner of its rectangle of
    samples. So if the samples above the threshold are one 4-connected region, the pixels are one
    region too, which ends where the lines beyond its outermost samples cross the threshold.

    Returns:
        Which maps `[N]` have one region beyond doubt, no number that decides being within the
        rounding error of the threshold; and the boxes `[N, 4]` of these.
    """
    count, height, width = heatmaps.shape
    rows, columns = _lines(height, size[0]), _lines(width, size[1])
    # The maps lie along the last axis, where a reduction over the others is many times quicker.
    samples = _even(height, size[0])[rows] @ heatmaps.reshape(count, -1).T.reshape(height, -1)
    samples = _even(width, size[1])[columns] @ samples.reshape(len(rows), width, count)
    samples -= np.float32(threshold) * samples.max((0, 1))
    is_above = samples > 0
    tops, bottoms, is_sure = _extent(samples, is_above.any(1), rows, size[0])
    lefts, rights, is_too = _extent(samples.transpose(1, 0, 2), is_above.any(0), columns, size[1])
    is_certain = is_sure & is_too & (np.abs(samples).min((0, 1)) > _DOUBT)
    return is_certain & _are_connected(is_above), np.stack([lefts, tops, rights, bottoms], axis=1)


def _are_connected(masks: np.ndarray) -> np.ndarray:
    """Which of N masks `[rows, columns, N]` are one 4-connected region, unless it winds a lot."""
    reached = np.zeros_like(masks)
    firsts, maps = masks.any(1).argmax(0), np.arange(masks.shape[2])
    reached[firsts, masks[firsts, :, maps].argmax(1), maps] = True
    for _ in range(_SWEEPS):
        for lines, free in ((reached, masks), (reached.swapaxes(0, 1), masks.swapaxes(0, 1))):
            for ordered, allowed in ((lines, free), (lines[::-1], free[::-1])):
                for (before, line), here in zip(pairwise(ordered), allowed[1:], strict=True):
                    line |= before & here
    return (reached == masks).all((0, 1))


def _extent(
    samples: np.ndarray, is_above: np.ndarray, lines: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far along one axis the only region of each map reaches.

    Args:
        samples: `[lines, other lines, N]`, less the threshold.
        is_above: `[lines, N]`, whether the region comes to a line.
        lines: the pixels that are sampled along this axis.
        length: how many pixels there are.

    Returns:
        The first pixels `[N]`, those after the last, and whether both are beyond doubt.
    """
    maps, last = np.arange(samples.shape[2]), len(lines) - 1
    ends, sure = [], np.ones(len(maps), dtype=bool)
    for step, outermost, end in (
        (-1, is_above.argmax(0), 0),
        (1, last - is_above[::-1].argmax(0), length),
    ):
        beyond = (outermost + step).clip(0, last)
        gap = np.abs(lines[beyond] - lines[outermost]).astype(np.float32)
        is_end = gap == 0  # beyond the outermost centres, their cells hold
        inner = samples[outermost, :, maps].T
        slope = (inner - samples[beyond, :, maps].T) / np.where(is_end, 1, gap)
        reach = np.divide(inner, slope, out=np.zeros_like(inner), where=(inner > 0) & (slope > 0))
        pixels = np.floor(reach.max(0))
        is_in = (inner - slope * pixels).max(0) > _DOUBT
        is_out = (inner - slope * (pixels + 1)).max(0) < -_DOUBT
        sure &= is_end | (is_in & is_out)
        ends.append(np.where(is_end, end, lines[outermost] + step * pixels + (step > 0)))
    return ends[0], ends[1], sure


@lru_cache(maxsize=64)
def _lines(length: int, new_length: int) -> np.ndarray:
    """The pixels next to the centres of cells, between which interpolation is linear."""
    centres = (np.arange(length) + 0.5) * new_length / length - 0.5
    before = np.floor(centres).astype(np.int64)
    return np.unique(np.concatenate([before, before + 1]).clip(0, new_length - 1))


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
