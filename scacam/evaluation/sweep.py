"""Boxes of a score map at every threshold, and their overlap with others: Choe et al. 2020.

The reference (wsolevaluation) searches the contours of a score map once per threshold, 1000 times.
A map of 8 bits has at most 255 distinct masks, and of those most need no search: see `bounds`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "GRID",
    "IOU_THRESHOLDS",
    "LEVELS",
    "RIGHT_IOU",
    "THRESHOLDS",
    "Sweep",
    "area",
    "best_ious",
    "contours",
    "corners",
    "iou",
    "mask_boxes",
    "mask_rectangles",
    "quantise",
    "score_map",
    "search",
    "shared_area",
]

GRID = 224
"""Height and width at which maps and boxes are compared."""

LEVELS = 255
"""Distinct masks of a score map: cells above 0, above 1, …, above 254."""

RIGHT_IOU = 0.5
"""Overlap from which on a box is right, in MaxBoxAcc and at fixed thresholds."""

IOU_THRESHOLDS = (0.3, 0.5, 0.7)
"""The three of them in MaxBoxAccV2."""

THRESHOLDS = 0.001 * np.unique((np.arange(0, 1, 0.001) * LEVELS).astype(int), return_index=True)[1]
"""For each level the smallest of the reference's thresholds 0, 0.001, …, 0.999 that gives it."""


_ALL_LEVELS = np.arange(LEVELS, dtype=np.uint8)


class Sweep(NamedTuple):
    """The boxes of one map at levels 0 to 254, or some of them.

    Attributes:
        boxes: int64 `[N, 4]`: x0, y0, x1, y1, as the reference has them, level after level.
        starts: int64 `[levels]`: where in `boxes` each level begins.
        largest: int64 `[levels]`: which of `boxes` is that of the contour of the largest area.
    """

    boxes: np.ndarray
    starts: np.ndarray
    largest: np.ndarray


def score_map(heatmap: np.ndarray) -> np.ndarray:
    """Resize a map `[h, w]` bicubically to float64 `[224, 224]` and scale it to [0, 1].

    A constant map becomes zero, as in the reference.
    """
    if heatmap.min() == heatmap.max():  # resized, it might differ from itself in the last digit
        return np.zeros((GRID, GRID))
    score = cv2.resize(heatmap.astype(np.float64), (GRID, GRID), interpolation=cv2.INTER_CUBIC)
    score = score - score.min()
    return score / score.max()


def quantise(score: np.ndarray) -> np.ndarray:
    """A score map as uint8, truncated: its largest value is 255, or 0 where it is constant."""
    return (score * 255).astype(np.uint8)


def search(gray: np.ndarray, levels: Iterable[int] = range(LEVELS)) -> Sweep:
    """The boxes of all contours, outer and inner, of the masks `gray > level`, level by level.

    As in the reference, a box ends one pixel behind its contour unless the map ends there, an empty
    mask has the box 0, 0, 0, 0, and the contour of the largest area is the first of equals, in
    OpenCV's order.
    """
    boxes, largest = [], []
    for level in levels:
        found = contours(gray, level)
        largest.append(_largest(found))
        boxes.append([cv2.boundingRect(contour) for contour in found] or [(0, 0, 0, 0)])
    counts = np.array([len(found) for found in boxes])
    starts = counts.cumsum() - counts
    return Sweep(corners(np.concatenate(boxes), gray.shape), starts, starts + largest)


def iou(boxes: np.ndarray, others: np.ndarray, *, inclusive: bool = False) -> np.ndarray:
    """Intersection over union of boxes `[..., 4]` with others, which broadcast.

    NaN where one of them is; 0 where neither has an area.

    Args:
        boxes: x0, y0, x1, y1.
        others: likewise.
        inclusive: whether x1 and y1 are the last pixels of the box, as the reference counts (a box
            of equal corners has area 1), or its edges in continuous coordinates.
    """
    extra = 1 if inclusive else 0
    shared = shared_area(boxes, others, extra)
    union = area(boxes, extra) - shared + area(others, extra)
    return np.divide(shared, union, out=union * 0.0, where=union > 0)


def area(boxes: np.ndarray, extra: int = 1) -> np.ndarray:
    """The areas of boxes `[..., 4]` whose sides are longer by so much than their corners say."""
    return (boxes[..., 2] - boxes[..., 0] + extra) * (boxes[..., 3] - boxes[..., 1] + extra)


def shared_area(boxes: np.ndarray, others: np.ndarray, extra: int = 1) -> np.ndarray:
    """The areas that boxes `[..., 4]` share with others, which broadcast; as `area`."""
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(
        boxes[..., :2], others[..., :2]
    )
    sides = (sides + extra).clip(min=0)
    return sides[..., 0] * sides[..., 1]


def best_ious(boxes: Sweep, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best overlap with any of the true boxes `[M, 4]` at each level, two times `[levels]`.

    Returns:
        That of the box of the largest contour (MaxBoxAcc), and that of any contour (V2).
    """
    best = iou(boxes.boxes[:, None], truth, inclusive=True).max(1)
    return best[boxes.largest], np.maximum.reduceat(best, boxes.starts)


def contours(gray: np.ndarray, level: int) -> Sequence[np.ndarray]:
    """All contours of the mask `gray > level`, outer and inner."""
    _, mask = cv2.threshold(gray, level, 255, cv2.THRESH_BINARY)
    return cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]


def _largest(contours: Sequence[np.ndarray]) -> int:
    areas = [cv2.contourArea(contour) for contour in contours]
    return areas.index(max(areas)) if areas else 0


def corners(rectangles: ArrayLike, shape: Sequence[int]) -> np.ndarray:
    """From x, y, width, height to x0, y0, x1, y1, where x1 and y1 are pixels of a map's shape."""
    boxes = np.array(rectangles, dtype=np.int64)
    height, width = shape
    boxes[:, 2:] = np.minimum(boxes[:, :2] + boxes[:, 2:], (width - 1, height - 1))
    return boxes


def mask_boxes(gray: np.ndarray) -> np.ndarray:
    """The box of all contours of a mask together, at each level: int64 `[255, 4]`, as `Sweep`."""
    return corners(mask_rectangles(gray), gray.shape)


def mask_rectangles(gray: np.ndarray) -> np.ndarray:
    """x, y, width, height of the whole mask at each level, zeros where it is empty: `[255, 4]`."""
    rectangles = np.zeros((LEVELS, 4), dtype=np.int64)
    for axis in (0, 1):
        highest = gray.max(axis)
        some = _ALL_LEVELS[: highest.max()]
        first = np.maximum.accumulate(highest).searchsorted(some, side="right")
        behind = np.maximum.accumulate(highest[::-1]).searchsorted(some, side="right")
        rectangles[: len(some), axis] = first
        rectangles[: len(some), axis + 2] = len(highest) - behind - first
    return rectangles
