"""Means of localization measures over a data set, with bootstrap intervals.

Images are summed up in at most `GROUPS` groups, to which they are dealt at random, and the
bootstrap draws groups. Up to that many images each is a group of its own: the plain bootstrap over
images. Beyond, memory stays the same and the intervals become uncertain by 1 / √(2 · GROUPS), 2 %.
Thresholds that are best on the data set are kept in every draw. (Chosen anew, they gave intervals
that lay off the value and covered the truth no more often: 93 to 96 % either way, in simulations of
200 images.) All methods see the same draws, so that differences between them are paired.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from scacam.evaluation.measures import SCORE_EDGES
from scacam.evaluation.sweep import IOU_THRESHOLDS, LEVELS, RIGHT_IOU, THRESHOLDS

__all__ = [
    "GROUPS",
    "SCORES",
    "BoxTotals",
    "MaskTotals",
    "Totals",
    "curves",
    "dealt",
    "draws",
    "summarise",
]

Row = dict[str, Any]

GROUPS = 1000
_DRAWS = 1000
_SEED = 0
_INTERVAL = (0.025, 0.975)

SCORES = (
    "box_acc_15",
    "box_acc_20",
    "pointing_game",
    "pointing_game_0",
    "energy_pointing_game",
)
"""The measures that are plain means over images, as `BoxTotals.add` takes them. All but the last
are right or wrong, and so have their `top1_` metric."""

_PREFIXES = ("", "top1_")
_CURVES = (("max_box_acc", RIGHT_IOU), *(("max_box_acc_v2", overlap) for overlap in IOU_THRESHOLDS))


class Totals(Protocol):
    """The sums of one method over images, by group."""

    images: np.ndarray
    """How many images each group has: int64 `[GROUPS]`."""

    def values(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric under each of the weightings `[W, GROUPS]` of the groups: `[W]`."""
        ...

    def thresholds(self) -> dict[str, list[float]]:
        """The thresholds that are best on the data set, of the metrics that choose any."""
        ...


class BoxTotals:
    """Sums of hits and scores; the second half of each counts where the top class is right."""

    def __init__(self) -> None:
        self.images = np.zeros(GROUPS, dtype=np.int64)
        self.hits = np.zeros((2, GROUPS, len(_CURVES), LEVELS), dtype=np.uint32)
        self.scores = np.zeros((2, GROUPS, len(SCORES)))

    def add(
        self, groups: np.ndarray, hits: np.ndarray, scores: np.ndarray, right: np.ndarray
    ) -> None:
        """Add N images.

        Args:
            groups: int `[N]`.
            hits: bool `[N, 4, 255]`, as `evaluation.hits` has them.
            scores: `[N, 5]`, as named by `SCORES`.
            right: bool `[N]`, whether the top class is the labelled one.
        """
        np.add.at(self.images, groups, 1)
        for half, counted in enumerate((np.ones_like(right), right)):
            np.add.at(self.hits[half], groups[counted], hits[counted])
            np.add.at(self.scores[half], groups[counted], scores[counted])

    def curves(self, half: int) -> np.ndarray:
        """The share of hits by level, `[4, 255]`; of half 1, with the top class right as well."""
        return self.hits[half].sum(0, dtype=np.int64) / self.images.sum()

    def best_levels(self, half: int) -> np.ndarray:
        """The level at which each of the four curves is highest, the first of equals: `[4]`."""
        return self.curves(half).argmax(1)

    def values(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """As in `Totals`."""
        images = (weights @ self.images)[:, None]
        found: dict[str, np.ndarray] = {}
        for half, prefix in enumerate(_PREFIXES):
            best = self.hits[half][:, np.arange(len(_CURVES)), self.best_levels(half)]
            accuracies = weights @ best / images
            found[f"{prefix}max_box_acc"] = accuracies[:, 0]
            found[f"{prefix}max_box_acc_v2"] = accuracies[:, 1:].mean(1)
            means = weights @ self.scores[half] / images
            found |= {f"{prefix}{name}": means[:, i] for i, name in enumerate(SCORES)}
        del found["top1_energy_pointing_game"]  # a share is neither right nor wrong
        return found

    def thresholds(self) -> dict[str, list[float]]:
        """As in `Totals`: one of `max_box_acc`, one for each overlap of `max_box_acc_v2`."""
        found: dict[str, list[float]] = {}
        for half, prefix in enumerate(_PREFIXES):
            best = THRESHOLDS[self.best_levels(half)].tolist()
            found |= {f"{prefix}max_box_acc": best[:1], f"{prefix}max_box_acc_v2": best[1:]}
        return found


class MaskTotals:
    """Sums of the histograms of scores."""

    def __init__(self) -> None:
        self.images = np.zeros(GROUPS, dtype=np.int64)
        self.histograms = np.zeros((GROUPS, 2, len(SCORE_EDGES) - 1), dtype=np.int64)

    def add(self, groups: np.ndarray, histograms: np.ndarray) -> None:
        """Add N images: their groups, and `[N, 2, 1002]` as of `evaluation.score_histograms`."""
        np.add.at(self.images, groups, 1)
        np.add.at(self.histograms, groups, histograms)

    def values(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """As in `Totals`. NaN where no pixel of any mask is 1."""
        sums = (weights @ self.histograms.reshape(GROUPS, -1)).reshape(len(weights), 2, -1)
        positive, negative = sums[:, :, ::-1].cumsum(2).swapaxes(0, 1)
        predicted = positive + negative
        precision = np.divide(
            positive, predicted, out=np.zeros_like(predicted), where=predicted > 0
        )
        with np.errstate(invalid="ignore"):
            recall = positive / positive[:, -1:]
        return {"pxap": (precision[:, 1:] * np.diff(recall)).sum(1)}

    def thresholds(self) -> dict[str, list[float]]:
        """As in `Totals`: none."""
        return {}


def dealt(images: int) -> np.ndarray:
    """The group of each image: int64 `[images]`."""
    return np.random.default_rng(_SEED).permutation(images) % GROUPS


def draws(images: np.ndarray) -> np.ndarray:
    """How often each group counts: `[1 + 1000, GROUPS]`, first once, then as the bootstrap draws.

    Args:
        images: how many images each group has. Empty groups are not drawn.

    Raises:
        ValueError: there is no image at all.
    """
    groups = np.flatnonzero(images)
    if not len(groups):
        raise ValueError("there are no metrics over zero images")
    rng = np.random.default_rng(_SEED)
    weights = np.ones((1 + _DRAWS, len(images)))
    weights[1:] = 0
    weights[1:, groups] = rng.multinomial(
        len(groups), np.full(len(groups), 1 / len(groups)), _DRAWS
    )
    return weights


def summarise(totals: Mapping[str, Totals], known: bool = True) -> tuple[list[Row], list[Row]]:
    """Metrics with their intervals, and paired differences between methods.

    Args:
        totals: by method, of the same images.
        known: whether to give those of the labelled class, beside those of the top class.

    Returns:
        Rows as in `tables.LOCALIZATION` and `tables.DIFFERENCES`, without their network.

    Raises:
        ValueError: there is no image at all.
    """
    images = next(iter(totals.values())).images
    weights = draws(images)
    values: dict[str, dict[str, np.ndarray]] = {}  # by metric and method
    for method, total in totals.items():
        for metric, under in total.values(weights).items():
            if known or metric.startswith("top1_"):
                values.setdefault(metric, {})[method] = under
    thresholds = {method: total.thresholds() for method, total in totals.items()}
    count = int(images.sum())
    rows = [
        {
            "method": method,
            "metric": metric,
            "value": float(under[0]),
            **_interval(under),
            "images": count,
            "thresholds": thresholds[method].get(metric),
        }
        for metric, by_method in values.items()
        for method, under in by_method.items()
    ]
    pairs = [
        {
            "metric": metric,
            "method": method,
            "other": other,
            "difference": float(by_method[method][0] - by_method[other][0]),
            **_interval(by_method[method] - by_method[other]),
            "images": count,
        }
        for metric, by_method in values.items()
        for method, other in combinations(by_method, 2)
    ]
    return rows, pairs


def curves(totals: Mapping[str, BoxTotals], known: bool = True) -> Iterator[Row]:
    """Accuracies over thresholds: rows as in `tables.CURVES`, without their network."""
    for method, total in totals.items():
        for half in range(0 if known else 1, 2):
            for (metric, overlap), curve in zip(_CURVES, total.curves(half), strict=True):
                for threshold, accuracy in zip(THRESHOLDS, curve, strict=True):
                    yield {
                        "method": method,
                        "metric": f"{_PREFIXES[half]}{metric}",
                        "iou": overlap,
                        "threshold": float(threshold),
                        "accuracy": float(accuracy),
                    }


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[1:], _INTERVAL)
    return {"ci_low": float(low), "ci_high": float(high)}
