"""How well a heatmap localizes in one image; `intervals` has the means over a data set.

MaxBoxAcc, MaxBoxAccV2 and PxAP follow Choe et al. 2020 (wsolevaluation), the pointing game Zhang et
al. 2018 as TorchRay plays it, the energy-based one Wang et al. 2020 (Score-CAM). Heatmaps are given
with the ReLU of their method applied.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from scacam.evaluation.sweep import GRID, Sweep, iou, quantise, search
from scacam.localization import box_of_region, upsample

__all__ = [
    "BASELINES",
    "FIXED_THRESHOLDS",
    "MEASURES",
    "POINTING_TOLERANCE",
    "SCORE_EDGES",
    "Claim",
    "InView",
    "baseline",
    "baseline_map",
    "baseline_sweep",
    "energy_inside",
    "fixed_iou",
    "in_view",
    "mask_in_view",
    "peak_distance",
    "positive_part",
    "score_histograms",
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


class InView(NamedTuple):
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
        fixed: float64 `[2, 4]`, its boxes at the `FIXED_THRESHOLDS`, in pixels of the original
            image; NaN where there is none.
        peak: float64 `[2]`, likewise; NaN if the map is constant.
        energy: `[224, 224]`, its positive part.
    """

    fixed: np.ndarray
    peak: np.ndarray
    energy: np.ndarray


def in_view(boxes: np.ndarray, view: np.ndarray) -> InView:
    """Clip true boxes to a view.

    Args:
        boxes: `[N, 4]`, x0, y0, x1, y1 in pixels of the original image.
        view: `[4]`, likewise.
    """
    origin, end = np.tile(view[:2], 2).astype(np.float64), np.tile(view[2:], 2).astype(np.float64)
    grid = (boxes - origin) * GRID / (end - origin)
    inside = ((grid[:, :2] < GRID) & (grid[:, 2:] > 0)).all(1)
    return InView(boxes[inside].clip(origin, end), grid[inside].clip(0, GRID), int(np.sum(~inside)))


def fixed_iou(box: np.ndarray, truth: InView) -> float:
    """The best overlap of a box `[4]` in pixels of the original image; 0 where there is none."""
    best = float(iou(box, truth.boxes).max())
    return 0.0 if np.isnan(best) else best


def peak_distance(peak: np.ndarray, truth: InView) -> float:
    """Pixels of the original image from a peak to the nearest true box: 0 inside, ∞ for no peak."""
    if np.isnan(peak).any():
        return np.inf
    nearest = peak.clip(truth.boxes[:, :2], truth.boxes[:, 2:])
    return float(np.hypot(*(nearest - peak).T).min())


def positive_part(heatmap: np.ndarray) -> np.ndarray:
    """The positive part of a heatmap `[h, w]`, bilinearly upsampled to `[224, 224]`."""
    return upsample(heatmap.clip(min=0).astype(np.float32), (GRID, GRID))


def energy_inside(energy: np.ndarray, truth: InView) -> float:
    """The share of a positive map `[224, 224]` inside the true boxes; 0 if it is all zero."""
    inside = np.zeros(energy.shape, dtype=bool)
    # A pixel belongs to the boxes that hold its centre.
    for x0, y0, x1, y1 in np.ceil(truth.grid - 0.5).astype(np.int64):
        inside[y0:y1, x0:x1] = True
    whole = float(energy.sum(dtype=np.float64))
    return float(energy[inside].sum(dtype=np.float64)) / whole if whole else 0.0


MEASURES: dict[str, Callable[[Claim, InView], float]] = {
    "iou_15": lambda claim, truth: fixed_iou(claim.fixed[0], truth),
    "iou_20": lambda claim, truth: fixed_iou(claim.fixed[1], truth),
    "peak_distance": lambda claim, truth: peak_distance(claim.peak, truth),
    "energy": lambda claim, truth: energy_inside(claim.energy, truth),
}
"""What is measured of each image at once, a column each of the table of images: the overlaps of the
boxes at `FIXED_THRESHOLDS`, pixels from the peak to the nearest true box (0 inside, ∞ without a
peak), the share of the positive map inside the boxes."""


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
    fixed = [box_of_region(heatmap > share * heatmap.max()) for share in FIXED_THRESHOLDS]
    return Claim(np.array(fixed) / GRID, np.full(2, 0.5), positive_part(heatmap))


@cache
def baseline_sweep(name: str) -> Sweep:
    """The boxes of a baseline at all levels."""
    heatmap = baseline_map(name)
    score = (heatmap - heatmap.min()) / np.ptp(heatmap) if np.ptp(heatmap) else heatmap
    return search(quantise(score))


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
