"""How alike heatmaps are: of the same images, of two networks, methods or runs; or of a class.

Arrays in, arrays out.
"""

import math
from typing import NamedTuple

import numpy as np

from scacam.audit.maps import TopMaps
from scacam.evaluation.sweep import iou
from scacam.localization import interpolation, upsample

__all__ = [
    "Likeness", "Parts", "alike", "energy", "find_parts", "flattened", "likeness", "sampled",
    "standard_ranks",
]  # fmt: skip

_GRID = 16
_ROUNDS = 20


class Likeness(NamedTuple):
    """How alike two heatmaps of each of N images are. NaN where a map is constant or has no box.

    Attributes:
        moved: share of the positive map that lies elsewhere in the other one, 0 to 1: half the
            sum of the absolute differences of the two, each with sum 1.
        rank_correlation: Spearman's, of the raw maps, −1 to 1.
        box_iou: intersection over union of the boxes.
    """

    moved: np.ndarray
    rank_correlation: np.ndarray
    box_iou: np.ndarray


def energy(heatmaps: np.ndarray) -> np.ndarray:
    """The positive part of maps `[..., h, w]`, divided by its sum; all zero where there is none."""
    positive = heatmaps.clip(min=0)
    total = positive.sum((-2, -1), keepdims=True)
    return positive / np.where(total > 0, total, 1)


def likeness(first: TopMaps, second: TopMaps) -> Likeness:
    """Compare the maps of the same images in the same order, where their views overlap."""
    samples = sampled(first, second)
    return alike(samples, energy(samples), (first.rectangles("box"), second.rectangles("box")))


def sampled(first: TopMaps, second: TopMaps) -> np.ndarray:
    """Maps of the same images on one even grid where their views overlap: `[2, N, 16, 16]`."""
    views = first.rectangles("view"), second.rectangles("view")
    area = np.concatenate(
        [np.maximum(views[0], views[1])[:, :2], np.minimum(views[0], views[1])[:, 2:]], axis=1
    )
    both = zip((first, second), views, strict=True)
    return np.stack([_sampled(maps.heatmaps, view, area) for maps, view in both])


def alike(
    samples: np.ndarray, shares: np.ndarray, boxes: tuple[np.ndarray, np.ndarray]
) -> Likeness:
    """Compare N maps with N others.

    Args:
        samples: raw maps, `[2, N, h, w]`.
        shares: their `energy`.
        boxes: `[N, 4]` each.
    """
    moved = np.abs(shares[0] - shares[1]).sum((1, 2)) / 2
    moved[~shares.any((2, 3)).all(0)] = np.nan
    ranks = standard_ranks(samples.reshape(*samples.shape[:2], math.prod(samples.shape[2:])))
    return Likeness(moved, (ranks[0] * ranks[1]).sum(-1), iou(*boxes))


def flattened(heatmaps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Maps `[N, h, w]` as `[N, cells]`, upsampled to a shape if they have another."""
    if heatmaps.shape[1:] != shape:
        heatmaps = upsample(heatmaps, shape)
    return heatmaps.reshape(len(heatmaps), math.prod(shape))


def _sampled(heatmaps: np.ndarray, views: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Bilinear samples of maps `[N, h, w]` on an even grid over areas `[N, 4]` of the images."""
    steps = (np.arange(_GRID) + 0.5) / _GRID
    matrices = []
    for axis, length in ((1, heatmaps.shape[1]), (0, heatmaps.shape[2])):
        low, high = area[:, axis, None], area[:, axis + 2, None]
        start, end = views[:, axis, None], views[:, axis + 2, None]
        points = (low + steps * (high - low) - start) / (end - start)
        matrices.append(interpolation(length, points))
    return matrices[0] @ heatmaps @ matrices[1].transpose(0, 2, 1)


def standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis with mean 0 and length 1; NaN where all values are equal.

    Equal values share the mean of their ranks. The sum of the product of two is Spearman's rank
    correlation.
    """
    # Ties are ranked in order from the left and in order from the right; the mean is the same.
    left = values.argsort(-1, kind="stable").argsort(-1, kind="stable")
    right = values[..., ::-1].argsort(-1, kind="stable").argsort(-1, kind="stable")[..., ::-1]
    centred = (left + right) / 2 - (values.shape[-1] - 1) / 2
    length = np.sqrt((centred**2).sum(-1, keepdims=True))
    return centred / np.where(length > 0, length, np.nan)


class Parts(NamedTuple):
    """The two sorts of maps of a class, or of each of several, which come first.

    Attributes:
        mean: `[…, h, w]` of all its maps.
        centres: `[…, 2, h, w]`, the means of the smaller part and of the larger one.
        spread: the mean squared distance of its maps from the mean.
    """

    mean: np.ndarray
    centres: np.ndarray
    spread: np.ndarray

    def scores(self, shares: np.ndarray) -> np.ndarray:
        """How much better the centre of the smaller part describes maps than the mean does.

        Relative to the spread of the class; 0 for the maps of the larger part. Maps `[N, h, w]` are
        of the one class, or each of one of N.
        """
        points = self.mean, self.centres[..., 0, :, :], self.centres[..., 1, :, :]
        distances = [((shares - one) ** 2).sum((1, 2)) for one in points]
        smaller = distances[1] < distances[2]
        return np.where(smaller, distances[0] - distances[1], 0) / self.spread


def find_parts(shares: np.ndarray) -> Parts | None:
    """Divide the maps of a class `[N, h, w]` in two by 2-means; None if they are all alike.

    Begins with the two sides of the first principal component, so nothing is left to chance.
    """
    flat = shares.reshape(len(shares), -1).astype(np.float64)
    mean = flat.mean(0)
    spread = ((flat - mean) ** 2).sum(1).mean()
    if spread <= 1e-12:
        return None
    _, vectors = np.linalg.eigh((flat - mean).T @ (flat - mean))
    first = (flat - mean) @ vectors[:, -1] > 0
    centres = np.stack([flat[first].mean(0), flat[~first].mean(0)])
    for _ in range(_ROUNDS):
        nearer = ((flat - centres[0]) ** 2).sum(1) < ((flat - centres[1]) ** 2).sum(1)
        if (nearer == first).all() or nearer.all() or not nearer.any():
            break
        first = nearer
        centres = np.stack([flat[first].mean(0), flat[~first].mean(0)])
    if 2 * first.sum() > len(flat):
        centres = centres[::-1]
    shape = shares.shape[1:]
    return Parts(mean.reshape(shape), centres.reshape(2, *shape), spread)
