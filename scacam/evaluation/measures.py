"""How well a heatmap localizes in one image; `intervals` has the means over a data set.

MaxBoxAcc, MaxBoxAccV2 and PxAP follow Choe et al. 2020 (wsolevaluation), the pointing game Zhang et
al. 2018 as TorchRay plays it, the energy-based one Wang et al. 2020 (Score-CAM). Heatmaps are given
with the ReLU of their method applied.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from scacam.evaluation.sweep import (
    GRID,
    IOU_THRESHOLDS,
    RIGHT_IOU,
    Sweep,
    best_ious,
    boxes_above,
    iou,
    quantise,
    sweep,
)
from scacam.localization import box_of_region, upsample

__all__ = [
    "BASELINES",
    "FIXED_THRESHOLDS",
    "POINTING_TOLERANCE",
    "SCORE_EDGES",
    "Claim",
    "Truth",
    "baseline",
    "baseline_map",
    "baseline_sweep",
    "energy_inside",
    "fixed_ious",
    "hits",
    "ious_at",
    "mask_in_view",
    "peak_distance",
    "positive_part",
    "score_histograms",
    "truth_in_view",
]

BASELINES = ("center_gaussian", "whole_image")
"""Answers that never looked at the image. They stand where the methods stand."""

FIXED_THRESHOLDS = (0.15, 0.2)
"""Shares of the maximum above which Grad-CAM's and CAM's papers draw their box."""

POINTING_TOLERANCE = 15
"""Pixels of the original image by which a peak may miss (TorchRay)."""

SCORE_EDGES = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])
"""Edges of the histograms of PxAP."""

_SIGMA = 0.25 * GRID


class Truth(NamedTuple):
    """The true boxes of one image as far as its view shows them.

    Attributes:
        boxes: float64 `[M, 4]`, x0, y0, x1, y1 in pixels of the original image.
        grid: float64 `[M, 4]`, the same in pixels of the view resized to 224 × 224.
        outside: how many more there are, outside of the view.
    """

    boxes: np.ndarray
    grid: np.ndarray
    outside: int

    @property
    def pixels(self) -> np.ndarray:
        """The boxes on the grid as the reference has them, truncated: int64 `[M, 4]`."""
        return self.grid.clip(max=GRID - 1).astype(np.int64)


class Claim(NamedTuple):
    """Where a map says that the object is.

    Attributes:
        gray: uint8 `[224, 224]`, the map as its boxes are searched.
        fixed: float64 `[2, 4]`, its boxes at the `FIXED_THRESHOLDS`, in pixels of the original
            image; NaN where there is none.
        peak: float64 `[2]`, likewise; NaN if the map is constant.
        energy: `[224, 224]`, its positive part.
    """

    gray: np.ndarray
    fixed: np.ndarray
    peak: np.ndarray
    energy: np.ndarray


def truth_in_view(boxes: np.ndarray, view: np.ndarray) -> Truth:
    """Clip true boxes to a view.

    Args:
        boxes: `[N, 4]`, x0, y0, x1, y1 in pixels of the original image.
        view: `[4]`, likewise.
    """
    origin, end = np.tile(view[:2], 2).astype(np.float64), np.tile(view[2:], 2).astype(np.float64)
    grid = (boxes - origin) * GRID / (end - origin)
    inside = ((grid[:, :2] < GRID) & (grid[:, 2:] > 0)).all(1)
    return Truth(boxes[inside].clip(origin, end), grid[inside].clip(0, GRID), int(np.sum(~inside)))


def hits(boxes: Sweep, truth: Truth) -> np.ndarray:
    """Where the boxes of a map are right: bool `[4, 255]`, by level.

    The first row is that of the largest contour's box at IoU 0.5 (MaxBoxAcc), the others are those
    of any contour's at 0.3, 0.5 and 0.7 (MaxBoxAccV2).
    """
    largest, any_contour = best_ious(boxes, truth.pixels)
    return np.stack(
        [largest >= RIGHT_IOU, *(any_contour >= threshold for threshold in IOU_THRESHOLDS)]
    )


def ious_at(gray: np.ndarray, levels: tuple[int, int], truth: Truth) -> tuple[float, float]:
    """The best overlap of the largest contour's box at one level, and of any contour's at another.

    Args:
        gray: as in a `Claim`.
        levels: those at which MaxBoxAcc, and MaxBoxAccV2 at IoU 0.5, are best on the data set.
        truth: the true boxes.
    """
    boxes, largest = boxes_above(gray, levels[0])
    best = iou(boxes[largest : largest + 1], truth.pixels, inclusive=True).max()
    boxes, _ = boxes_above(gray, levels[1])
    return float(best), float(iou(boxes, truth.pixels, inclusive=True).max())


def fixed_ious(fixed: np.ndarray, truth: Truth) -> list[float]:
    """The best overlap of the box at each of the `FIXED_THRESHOLDS`; 0 where there is none."""
    found = np.isfinite(fixed).all(1)
    overlaps = iou(np.where(found[:, None], fixed, 0), truth.boxes, inclusive=False).max(1)
    return np.where(found, overlaps, 0.0).tolist()


def peak_distance(peak: np.ndarray, truth: Truth) -> float:
    """Pixels of the original image from a peak to the nearest true box: 0 inside, ∞ for no peak."""
    if np.isnan(peak).any():
        return np.inf
    nearest = peak.clip(truth.boxes[:, :2], truth.boxes[:, 2:])
    return float(np.hypot(*(nearest - peak).T).min())


def positive_part(heatmap: np.ndarray) -> np.ndarray:
    """The positive part of a heatmap `[h, w]`, bilinearly upsampled to `[224, 224]`."""
    return upsample(heatmap.clip(min=0).astype(np.float32), (GRID, GRID))


def energy_inside(energy: np.ndarray, truth: Truth) -> float:
    """The share of a positive map `[224, 224]` inside the true boxes; 0 if it is all zero."""
    inside = np.zeros(energy.shape, dtype=bool)
    # A pixel belongs to the boxes that hold its centre.
    for x0, y0, x1, y1 in np.ceil(truth.grid - 0.5).astype(np.int64):
        inside[y0:y1, x0:x1] = True
    whole = float(energy.sum(dtype=np.float64))
    return float(energy[inside].sum(dtype=np.float64)) / whole if whole else 0.0


def baseline_map(name: str) -> np.ndarray:
    """The map of a baseline, `[224, 224]`: a Gaussian a quarter of the view wide, or ones."""
    if name == "whole_image":
        return np.ones((GRID, GRID))
    offsets = np.arange(GRID) + 0.5 - GRID / 2
    profile = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    return np.outer(profile, profile)


def baseline(name: str, view: np.ndarray) -> Claim:
    """What a baseline says of any image with this view. The whole image's peak is its centre."""
    unit = _unit_baseline(name)
    origin, extent = view[:2].astype(np.float64), (view[2:] - view[:2]).astype(np.float64)
    fixed = np.tile(origin, 2) + unit.fixed * np.tile(extent, 2)
    return unit._replace(fixed=fixed, peak=origin + unit.peak * extent)


@cache
def _unit_baseline(name: str) -> Claim:
    """With boxes and peak as shares of the view."""
    heatmap = baseline_map(name)
    score = (heatmap - heatmap.min()) / np.ptp(heatmap) if np.ptp(heatmap) else heatmap
    fixed = [box_of_region(heatmap > share * heatmap.max()) for share in FIXED_THRESHOLDS]
    return Claim(quantise(score), np.array(fixed) / GRID, np.full(2, 0.5), positive_part(heatmap))


@cache
def baseline_sweep(name: str) -> Sweep:
    """The boxes of a baseline at all levels."""
    return sweep(_unit_baseline(name).gray)


def mask_in_view(mask: np.ndarray, size: tuple[int, int], view: np.ndarray) -> np.ndarray:
    """What the view shows of a mask, resized to `[224, 224]` as the reference does: nearest.

    Args:
        mask: `[height, width]` in any size; it covers the whole image.
        size: width and height of the image.
        view: `[4]`, x0, y0, x1, y1 in pixels of the image.
    """
    picks = []
    for axis, length in enumerate(mask.shape[::-1]):
        low, high = float(view[axis]), float(view[axis + 2])
        places = low + np.arange(GRID) * (high - low) / GRID
        picks.append((places * length / size[axis]).astype(np.int64).clip(max=length - 1))
    return mask[np.ix_(picks[1], picks[0])]


def score_histograms(score: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Histograms of a score map over `SCORE_EDGES`, int64 `[2, 1002]`: where the mask is 1 and 0.

    Pixels of any other value are ignored.
    """
    return np.stack([np.histogram(score[mask == value], SCORE_EDGES)[0] for value in (1, 0)])
