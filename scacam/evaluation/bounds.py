"""Which overlaps the boxes of a map reach at every threshold, with a search at few of them.

The masks of a map shrink as the level rises. A pixel from which a path leads to the map's peak and
never down is joined to it in every mask that it belongs to: it is part of the main region there.
What is left are a few parts of the map, each with a peak of its own, from which never-falling paths
lead to its pixels as well. Such a part joins the main region below one level, and is an island from
there on. So the box of the main region lies between two known ones that nearly always agree, and
the largest box that an island can have is known. The same is true of holes, in the negative of the
map and with its outside for a peak. Only levels for which that does not settle the matter are
searched: where an island, a hole, or what is between the two boxes could reach the truth.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from scacam.evaluation.sweep import (
    LEVELS,
    area,
    best_ious,
    contours,
    corners,
    mask_boxes,
    mask_rectangles,
    search,
    shared_area,
)

__all__ = ["reached"]

_SQUARE = np.ones((3, 3), dtype=np.uint8)
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_WHOLE = 255


class _Apart(NamedTuple):
    """What of an image is not joined to its main region at every level.

    Attributes:
        lower, upper: uint8 as the image; where `lower` is above a level, a pixel is in the main
            region for certain, and where `upper` is not, it is not.
        doubtful: bool `[255]`, at which levels an island could matter.
        room: `[255]`, at each level the largest area that the contour of an island can have, or
            more; −1 if there is no island.
    """

    lower: np.ndarray
    upper: np.ndarray
    doubtful: np.ndarray
    room: np.ndarray


class _Truth:
    """True boxes, and the least overlap with them that matters."""

    def __init__(self, boxes: np.ndarray, least: float) -> None:
        self.boxes, self.areas = boxes, area(boxes)
        self.wanted = least * self.areas
        self.listed = [
            (*box, wanted) for box, wanted in zip(boxes.tolist(), self.wanted, strict=True)
        ]

    def matter(self, boxes: np.ndarray) -> np.ndarray:
        """Whether a box inside of each of these could have an overlap that matters."""
        return np.any(shared_area(boxes[:, None], self.boxes) >= self.wanted, axis=1)

    def matters(self, x0: int, y0: int, x1: int, y1: int) -> bool:
        """The same of one box, without the cost of arrays."""
        return any(
            (min(x1, right) - max(x0, left) + 1) * (min(y1, bottom) - max(y0, top) + 1) >= wanted
            for left, top, right, bottom, wanted in self.listed
            if x0 <= right and left <= x1 and y0 <= bottom and top <= y1
        )

    def between(self, inner: np.ndarray, outer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest overlap of boxes around inner ones and inside of outer ones."""
        shared = shared_area(inner[:, None], self.boxes), shared_area(outer[:, None], self.boxes)
        sums = area(inner)[:, None] + self.areas, area(outer)[:, None] + self.areas
        return (shared[0] / (sums[1] - shared[1])).max(1), (shared[1] / (sums[0] - shared[0])).max(
            1
        )


def reached(
    gray: np.ndarray, truth: np.ndarray, limits: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The overlaps of `best_ious` at all 255 levels, as far as they reach limits.

    Args:
        gray: uint8 `[height, width]`.
        truth: int64 `[M, 4]`, as for `best_ious`.
        limits: rising overlaps, above 0.

    Returns:
        Two times `[255]`, for the box of the largest contour and for any contour's: numbers that
        reach the same of the limits as the overlaps do.
    """
    known = _Truth(truth, limits[0])
    y, x = divmod(int(gray.argmax()), gray.shape[1])
    islands = _apart(gray, (x, y), known)
    low, high = known.between(mask_boxes(islands.lower), mask_boxes(islands.upper))
    settled = np.searchsorted(limits, low, "right") == np.searchsorted(limits, high, "right")

    negative = cv2.copyMakeBorder(_WHOLE - gray, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=_WHOLE)
    holes = _apart(negative, (0, 0), known, holes=True)
    open_ = ~settled | islands.doubtful | holes.doubtful[::-1]
    sure = ~open_ & (low >= limits[0]) & (np.arange(LEVELS) < gray.max())
    sure &= islands.room >= 0
    if sure.any():
        open_ |= sure & (islands.room >= _area_of_main(gray, (x, y), np.flatnonzero(sure)[-1]))
    largest, any_contour = low.copy(), low
    levels = np.flatnonzero(open_)
    if len(levels):
        largest[levels], any_contour[levels] = best_ious(search(gray, levels.tolist()), truth)
    return largest, any_contour


def _area_of_main(gray: np.ndarray, peak: tuple[int, int], level: int) -> float:
    """The area within the contour of the main region, or less; at lower levels it is no smaller."""
    around = [one for one in contours(gray, level) if cv2.pointPolygonTest(one, peak, False) >= 0]
    return min(map(cv2.contourArea, around))


def _uphill(image: np.ndarray, peak: tuple[int, int], connectivity: int) -> np.ndarray:
    """Where a path leads to a peak (x, y) and never down: uint8 of 1 and 0, any where it is 0."""
    mask = np.zeros((image.shape[0] + 2, image.shape[1] + 2), dtype=np.uint8)
    flags = connectivity | cv2.FLOODFILL_MASK_ONLY | (1 << 8)
    cv2.floodFill(image, mask, peak, 1, _WHOLE, 0, flags)
    return mask[1:-1, 1:-1]


def _apart(image: np.ndarray, peak: tuple[int, int], truth: _Truth, holes: bool = False) -> _Apart:
    """See `_Apart`.

    Args:
        image: uint8.
        peak: x and y of the main region's largest pixel.
        truth: what matters.
        holes: whether the image is a negative with a margin of one pixel, whose islands are holes:
            4-connected, and the contour of one goes through the pixels around it.
    """
    connectivity, neighbours = (4, _CROSS) if holes else (8, _SQUARE)
    shift = 2 if holes else 0
    bottom, right = (side - shift - 1 for side in image.shape)
    lower = cv2.copyMakeBorder(
        image * _uphill(image, peak, connectivity), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0
    )
    upper = image.copy()
    doubtful = np.zeros(LEVELS, dtype=bool)
    room = np.full(LEVELS, -1.0)

    def box(x: int, y: int, width: int, height: int) -> tuple[int, int, int, int]:
        """That of the contour around a rectangle."""
        return x - shift, y - shift, min(x + width, right), min(y + height, bottom)

    apart = (image > lower[1:-1, 1:-1]).view(np.uint8)
    ahead = [(0, 0, apart)]
    while ahead:
        left, top, rest = ahead.pop()
        for outline in cv2.findContours(rest, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]:
            x, y, width, height = cv2.boundingRect(outline)
            if holes and not truth.matters(*box(x + left, y + top, width, height)):
                continue
            part = np.zeros((height, width), dtype=np.uint8)
            cv2.drawContours(part, [outline], -1, 1, cv2.FILLED, offset=(-x, -y))
            part &= rest[y : y + height, x : x + width]
            x, y = x + left, y + top
            values = image[y : y + height, x : x + width] * part
            around = lower[y : y + height + 2, x : x + width + 2]
            joined = np.minimum(values, cv2.dilate(around, neighbours)[1:-1, 1:-1])
            if rest is apart:
                inside = upper[y : y + height, x : x + width]
                np.minimum(inside, joined.max(), out=inside, where=part.view(bool))
            row, column = divmod(int(values.argmax()), width)
            hill = _uphill(values, (column, row), connectivity)
            level = int((joined * hill).max())
            np.maximum(around[1:-1, 1:-1], np.minimum(values, level) * hill, out=around[1:-1, 1:-1])
            if (beyond := part & ~hill).any():
                ahead.append((x, y, beyond))
            levels = slice(level, int(values[row, column]))
            dx, dy, width, height = cv2.boundingRect((values > level).view(np.uint8))
            room[levels] = np.maximum(room[levels], (width - 1) * (height - 1))
            if truth.matters(*box(x + dx, y + dy, width, height)):
                rectangles = mask_rectangles(values)[levels] + (x - shift, y - shift, shift, shift)
                doubtful[levels] |= truth.matter(corners(rectangles, (bottom + 1, right + 1)))
    return _Apart(lower[1:-1, 1:-1], upper, doubtful, room)
