"""Boxes of a score map at every threshold, and their overlap with others: Choe et al. 2020.

The reference (wsolevaluation) searches the contours of a score map once per threshold, 1000 times.
A map of 8 bits has at most 255 distinct masks, and of those most need no search: see `sweep`.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
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
    "best_ious",
    "iou",
    "quantise",
    "score_map",
    "search",
    "sweep",
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

_SQUARE = np.ones((3, 3), dtype=np.uint8)
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


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


def search(gray: np.ndarray, levels: Iterable[int]) -> Sweep:
    """The boxes of all contours, outer and inner, of the masks `gray > level`, level by level.

    As in the reference, a box ends one pixel behind its contour unless the map ends there, an empty
    mask has the box 0, 0, 0, 0, and the contour of the largest area is the first of equals, in
    OpenCV's order.
    """
    boxes, largest = [], []
    for level in levels:
        contours = _contours(gray, level)
        largest.append(_largest(contours))
        boxes.append([cv2.boundingRect(contour) for contour in contours] or [(0, 0, 0, 0)])
    counts = np.array([len(found) for found in boxes])
    starts = counts.cumsum() - counts
    return Sweep(_as_corners(np.concatenate(boxes), gray), starts, starts + largest)


def sweep(gray: np.ndarray) -> Sweep:
    """The boxes at all 255 levels of a uint8 map, each equal to that of a contour search.

    Between two levels at which nothing begins, a mask only splits as the level rises and its holes
    only merge: regions become no fewer, holes no more. So while their difference, the Euler
    characteristic, stays the same, both do. Where such a run of levels starts with a single
    contour, it has a single one throughout, and its box is that of the whole mask, which is known
    for all levels at once. The other levels are searched one by one.
    """
    whole = _whole_masks(gray)
    pieces: list[np.ndarray | list[Sequence[int]]] = []
    counts = np.ones(LEVELS, dtype=np.int64)
    largest = np.zeros(LEVELS, dtype=np.int64)
    for start, stop in pairwise([*_runs(gray), LEVELS]):
        contours = _contours(gray, start)
        if len(contours) <= 1:
            pieces.append(whole[start:stop])
            continue
        for level in range(start, stop):
            contours = contours if level == start else _contours(gray, level)
            pieces.append([cv2.boundingRect(contour) for contour in contours])
            counts[level] = len(contours)
            largest[level] = _largest(contours)
    starts = counts.cumsum() - counts
    return Sweep(_as_corners(np.concatenate(pieces), gray), starts, starts + largest)


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
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(
        boxes[..., :2], others[..., :2]
    )
    shared = _area((sides + extra).clip(min=0))
    union = _area(boxes[..., 2:] - boxes[..., :2] + extra) - shared
    union = union + _area(others[..., 2:] - others[..., :2] + extra)
    return np.divide(shared, union, out=union * 0.0, where=union > 0)


def _area(sides: np.ndarray) -> np.ndarray:
    return sides[..., 0] * sides[..., 1]


def best_ious(boxes: Sweep, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best overlap with any of the true boxes `[M, 4]` at each level, two times `[levels]`.

    Returns:
        That of the box of the largest contour (MaxBoxAcc), and that of any contour (V2).
    """
    best = iou(boxes.boxes[:, None], truth, inclusive=True).max(1)
    return best[boxes.largest], np.maximum.reduceat(best, boxes.starts)


def _contours(gray: np.ndarray, level: int) -> Sequence[np.ndarray]:
    _, mask = cv2.threshold(gray, level, 255, cv2.THRESH_BINARY)
    return cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]


def _largest(contours: Sequence[np.ndarray]) -> int:
    areas = [cv2.contourArea(contour) for contour in contours]
    return areas.index(max(areas)) if areas else 0


def _as_corners(rectangles: ArrayLike, gray: np.ndarray) -> np.ndarray:
    """From x, y, width, height to x0, y0, x1, y1, where x1 and y1 are pixels of the map."""
    boxes = np.array(rectangles, dtype=np.int64)
    height, width = gray.shape
    boxes[:, 2:] = np.minimum(boxes[:, :2] + boxes[:, 2:], (width - 1, height - 1))
    return boxes


def _whole_masks(gray: np.ndarray) -> np.ndarray:
    """x, y, width, height of the whole mask at each level, zeros where it is empty: `[255, 4]`."""
    levels = np.arange(LEVELS)
    ends = []
    for highest in (gray.max(0), gray.max(1)):
        first = np.searchsorted(np.maximum.accumulate(highest), levels, side="right")
        behind = np.searchsorted(np.maximum.accumulate(highest[::-1]), levels, side="right")
        ends.append((first, len(highest) - behind - first))
    (x, width), (y, height) = ends
    rectangles = np.stack([x, y, width, height], axis=1)
    rectangles[gray.max() :] = 0
    return rectangles


def _runs(gray: np.ndarray) -> list[int]:
    """The levels at which the numbers of regions and of holes may change."""
    padded = cv2.copyMakeBorder(gray, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    changes = np.diff(_euler(padded), prepend=np.nan) != 0
    changes |= _maxima(gray, _SQUARE, 8)[:LEVELS]
    # A hole is a 4-connected region of the complement that does not reach the border.
    changes |= _maxima(255 - padded, _CROSS, 4)[:0:-1]
    return np.flatnonzero(changes).tolist()


def _euler(padded: np.ndarray) -> np.ndarray:
    """8-connected regions minus holes above each level: pixels - sides + corners of squares."""
    beside = np.maximum(padded[:, :-1], padded[:, 1:])
    corners = np.maximum(beside[:-1], beside[1:])
    above = np.maximum(padded[:-1, 1:-1], padded[1:, 1:-1])
    counts = _histogram(padded[1:-1, 1:-1]) - _histogram(beside[1:-1]) - _histogram(above)
    counts += _histogram(corners)
    return counts[:0:-1].cumsum()[::-1]


def _histogram(gray: np.ndarray) -> np.ndarray:
    return cv2.calcHist([gray], [0], None, [256], [0, 256]).ravel()


def _maxima(gray: np.ndarray, neighbours: np.ndarray, connectivity: int) -> np.ndarray:
    """Which of the values 1 to 255 a regional maximum has: bool `[256]`."""
    top = gray == cv2.dilate(gray, neighbours)
    # A plateau is no maximum if a pixel of the same value beside it has a higher neighbour.
    leaking = top & (gray == cv2.dilate(gray * ~top, neighbours))
    count, labels = cv2.connectedComponents(top.view(np.uint8), connectivity=connectivity)
    pixels = np.flatnonzero(top)
    labels = labels.ravel()[pixels]
    real = np.ones(count, dtype=bool)
    real[labels[leaking.ravel()[pixels]]] = False
    found = np.zeros(256, dtype=bool)
    found[gray.ravel()[pixels[real[labels]]]] = True
    return found
