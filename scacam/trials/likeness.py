"""How alike two maps are: by rank correlation, by structure, and by plain correlation.

Equal maps are alike, 1; a constant map correlates with no other, 0.
"""

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from scacam.audit.likeness import standard_ranks

__all__ = ["correlation", "rank_correlation", "ssim"]

_WINDOW = 7
_STABLE = (0.01**2, 0.03**2)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of maps `[N, h, w]`, cell by cell: `[N]`."""

    def of_unlike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        ranks = [standard_ranks(maps.reshape(len(maps), -1)) for maps in (one, other)]
        return np.nan_to_num((ranks[0] * ranks[1]).sum(1))

    return _where_unlike(of_unlike, first, second)


def correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson's correlation of maps `[N, h, w]`: `[N]`."""

    def of_unlike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        values = [_standardised(maps.reshape(len(maps), -1)) for maps in (one, other)]
        return np.nan_to_num((values[0] * values[1]).sum(1))

    return _where_unlike(of_unlike, first, second)


def ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The mean structural similarity (Wang et al. 2004) of maps `[N, h, w]` from 0 to 1: `[N]`.

    Over windows of 7 × 7 cells, or as large as a smaller map is, with the sample covariance.
    """
    return _where_unlike(_ssim, first, second)


def _ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    window = tuple(min(_WINDOW, length) for length in first.shape[1:])
    one, other = (
        sliding_window_view(maps.astype(np.float64), window, (1, 2)) for maps in (first, second)
    )
    inside = (-2, -1)
    means = one.mean(inside), other.mean(inside)
    centred = [each - mean[..., None, None] for each, mean in zip((one, other), means, strict=True)]
    cells = max(window[0] * window[1] - 1, 1)
    variances = [(each**2).sum(inside) / cells for each in centred]
    covariance = (centred[0] * centred[1]).sum(inside) / cells
    light = (2 * means[0] * means[1] + _STABLE[0]) / (means[0] ** 2 + means[1] ** 2 + _STABLE[0])
    shape = (2 * covariance + _STABLE[1]) / (variances[0] + variances[1] + _STABLE[1])
    return (light * shape).mean((1, 2))


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values.astype(np.float64) - values.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    constant = np.ptp(values, axis=1, keepdims=True) == 0
    return centred / np.where(constant, np.nan, length)


def _where_unlike(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """A measure of those pairs of maps that are not equal, which are alike: 1."""
    unlike = (first != second).any((1, 2))
    found = np.ones(len(first))
    if unlike.any():
        found[unlike] = measure(first[unlike], second[unlike])
    return found
