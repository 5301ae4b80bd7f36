"""Every metric, one row each; their states are sums over images by bootstrap group, which add.

A row says what each image adds to its metric's state, and how the metric comes out of the sum:
`update`, `merge` and `compute` of torchmetrics. By default it is the mean over images.

To add a metric: write its function here, give it a row in `METRICS`, and test it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from scacam.evaluation.measures import POINTING_TOLERANCE
from scacam.evaluation.sweep import IOU_THRESHOLDS, RIGHT_IOU

__all__ = [
    "METRICS",
    "SWEPT",
    "TOP1",
    "Metric",
    "Scores",
    "State",
    "headline",
    "hits",
    "metrics_of",
    "names_of",
    "swept",
    "titles",
    "values",
]

TOP1 = "top1_"
"""Begins the name of a metric's twin."""

Scores = Mapping[str, np.ndarray]
"""What was measured of images, by name, in arrays of one shape `[...]`. Against boxes these are
`measures.MEASURES`, and `iou` and `iou_any`, the overlaps of the largest contour's box and of the
best of any contour's, by threshold on the map; against masks `histograms`, `[..., 2, 1002]`."""


def largest_contour(scores: Scores) -> np.ndarray:
    """The overlap of the box that MaxBoxAcc looks at (Choe et al. 2020)."""
    return scores["iou"]


def any_contour(scores: Scores) -> np.ndarray:
    """The overlap of the box that MaxBoxAccV2 looks at (Choe et al. 2020)."""
    return scores["iou_any"]


def box_acc_15(scores: Scores) -> np.ndarray:
    """Whether the box at 15 % of the maximum is right (Selvaraju et al. 2017)."""
    return scores["iou_15"] >= RIGHT_IOU


def box_acc_20(scores: Scores) -> np.ndarray:
    """Whether the box at 20 % of the maximum is right (Zhou et al. 2016)."""
    return scores["iou_20"] >= RIGHT_IOU


def pointing_game(scores: Scores) -> np.ndarray:
    """Whether the peak is on an object, or near one (Zhang et al. 2018, TorchRay)."""
    return scores["peak_distance"] < POINTING_TOLERANCE


def pointing_game_0(scores: Scores) -> np.ndarray:
    """Whether the peak is on an object."""
    return scores["peak_distance"] == 0


def energy_pointing_game(scores: Scores) -> np.ndarray:
    """The share of the positive map that is on objects (Wang et al. 2020, Score-CAM)."""
    return scores["energy"]


def histograms(scores: Scores) -> np.ndarray:
    """How many pixels inside and outside of the mask have which score: `[..., 2, 1002]`."""
    return scores["histograms"]


def mean(sums: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The mean over images, and over whatever a metric has several values of."""
    return (sums.reshape(len(sums), -1) / images[:, None]).mean(1)


def average_precision(sums: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The area under precision and recall (PxAP of Choe et al. 2020); NaN without a pixel inside.

    Args:
        sums: histograms `[W, 2, 1002]` of the scores of all pixels, inside and outside.
        images: not needed, since pixels are pooled.
    """
    positive, negative = sums[:, :, ::-1].cumsum(2).swapaxes(0, 1)
    predicted = positive + negative
    precision = np.divide(positive, predicted, out=np.zeros_like(predicted), where=predicted > 0)
    with np.errstate(invalid="ignore"):
        recall = positive / positive[:, -1:]
    return (precision[:, 1:] * np.diff(recall)).sum(1)


class Metric(NamedTuple):
    """A number that says how good the maps of a method are on a data set.

    Attributes:
        name: as in tables.
        title: as people read it.
        function: what images add to the metric's sum: from scores `[...]` to `[..., *shape]`.
        needs: what it is measured against, `boxes` or `masks`.
        top1: the title of its twin, for which an image counts as nothing unless its top class is
            right; None where there is none.
        overlaps: if there are any, the function gives an overlap at a threshold on the map, and
            what counts is whether it is as large as each of these, at the threshold at which most
            images of the data set have it so.
        brief: whether it stands in summaries, beside the tables.
        headline: whether it is the one by which methods are compared.
        higher_is_better: which way is better.
        compute: the metric `[W]` from sums over images `[W, *shape]` and numbers of images `[W]`.
    """

    name: str
    title: str
    function: Callable[[Scores], np.ndarray]
    needs: str = "boxes"
    top1: str | None = None
    overlaps: tuple[float, ...] = ()
    brief: bool = True
    headline: bool = False
    higher_is_better: bool = True
    compute: Callable[[np.ndarray, np.ndarray], np.ndarray] = mean

    @property
    def names(self) -> list[str]:
        """Its name, and that of its twin."""
        return [self.name] if self.top1 is None else [self.name, TOP1 + self.name]


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "max_box_acc",
            "MaxBoxAcc",
            largest_contour,
            top1="top-1 MaxBoxAcc",
            overlaps=(RIGHT_IOU,),
        ),
        Metric(
            "max_box_acc_v2",
            "MaxBoxAccV2",
            any_contour,
            top1="top-1 V2",
            overlaps=IOU_THRESHOLDS,
            headline=True,
        ),
        Metric("box_acc_15", "box at 15 %", box_acc_15, top1="top-1 box at 15 %", brief=False),
        Metric("box_acc_20", "box at 20 %", box_acc_20, top1="top-1 box at 20 %"),
        Metric("pointing_game", "pointing", pointing_game, top1="top-1 pointing"),
        Metric(
            "pointing_game_0", "pointing, exact", pointing_game_0, top1="top-1 exact", brief=False
        ),
        # A share is neither right nor wrong, so it has no twin.
        Metric("energy_pointing_game", "energy", energy_pointing_game),
        Metric("pxap", "PxAP", histograms, needs="masks", headline=True, compute=average_precision),
    )
}

SWEPT = tuple((metric, overlap) for metric in METRICS.values() for overlap in metric.overlaps)
"""The metrics whose thresholds are the best on the data set, once for each of their overlaps."""

_WANTED = np.array([overlap for _, overlap in SWEPT])


@dataclass
class State:
    """Sums over images, by group; those of several parts add.

    Attributes:
        groups: int64 `[G]`, which they are, rising.
        images: float64 `[G]`, how many images each has.
        sums: by name, `[G, ...]`.
    """

    groups: np.ndarray
    images: np.ndarray
    sums: dict[str, np.ndarray]

    @classmethod
    def update(cls, groups: np.ndarray, values: Mapping[str, np.ndarray]) -> "State":
        """The state of N images: their groups `[N]`, and what each adds to the sums, `[N, ...]`."""
        order = np.argsort(groups, kind="stable")
        present, firsts, counts = np.unique(groups[order], return_index=True, return_counts=True)
        sums = {}
        for name, added in values.items():
            kind = added.dtype if added.dtype.kind == "u" else np.dtype(np.float64)
            sums[name] = np.add.reduceat(added[order], firsts, axis=0, dtype=kind)
        return cls(present, counts.astype(np.float64), sums)

    @classmethod
    def merge(cls, parts: Iterable["State"], groups: int) -> "State":
        """The sum of states, which come one at a time, with a row for each of so many groups."""
        total = cls(np.arange(groups), np.zeros(groups), {})
        for part in parts:
            total.images[part.groups] += part.images
            for name, sums in part.sums.items():
                if name not in total.sums:
                    total.sums[name] = np.zeros((groups, *sums.shape[1:]))
                total.sums[name][part.groups] += sums
        return total

    @classmethod
    def beside(cls, parts: Sequence["State"]) -> "State":
        """Of the same images in the same groups: the methods of one state behind another's."""
        sums = {
            name: np.concatenate([part.sums[name] for part in parts], axis=1)
            for name in parts[0].sums
        }
        return cls(parts[0].groups, parts[0].images, sums)


def metrics_of(needs: str) -> list[Metric]:
    """The metrics against boxes, or against masks, in their order."""
    return [metric for metric in METRICS.values() if metric.needs == needs]


def names_of(needs: str) -> list[str]:
    """Their names, in the order of the tables: those of the twins come behind."""
    metrics = metrics_of(needs)
    twins = [TOP1 + metric.name for metric in metrics if metric.top1 is not None]
    return [metric.name for metric in metrics] + twins


def titles(names: Collection[str], twins: bool = True) -> dict[str, str]:
    """The titles of those of some metrics that are shown to people, each twin behind its metric.

    Args:
        names: of the metrics that were measured.
        twins: whether to show all twins, or only those of headlines.
    """
    found: dict[str, str] = {}
    for metric in METRICS.values():
        if metric.brief:
            found[metric.name] = metric.title
            if metric.top1 is not None and (twins or metric.headline):
                found[TOP1 + metric.name] = metric.top1
    return {name: title for name, title in found.items() if name in names}


def headline(names: Collection[str]) -> str | None:
    """The metric by which methods are compared, of those that were measured."""
    order = [name for metric in METRICS.values() if metric.headline for name in metric.names]
    return next((name for name in order if name in names), None)


def swept(scores: Scores) -> np.ndarray:
    """The overlaps that the metrics of `SWEPT` look at: `[..., 4, thresholds]`.

    Args:
        scores: `iou` and `iou_any`, `[..., thresholds]`.
    """
    return np.stack([metric.function(scores) for metric, _ in SWEPT], axis=-2)


def hits(scores: Scores) -> np.ndarray:
    """Whether these are large enough: bool `[..., 4, thresholds]`."""
    return swept(scores) >= _WANTED[:, None]


def values(
    needs: str, scores: Scores, top1: np.ndarray, best: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What N images add to the sums of each metric and twin, for M methods: `[N, M, *shape]`.

    Args:
        needs: what was measured against.
        scores: `[N, M]` each.
        top1: bool `[N]`, whether the top class is right.
        best: `[N, M, 2, 4]`, overlaps as of `swept`, each at the threshold that is best, of the
            metric and of its twin.
    """
    found: dict[str, np.ndarray] = {}
    for metric in metrics_of(needs):
        if best is None or not metric.overlaps:
            both = 2 * [metric.function(scores)]
        else:
            own = [index for index, (other, _) in enumerate(SWEPT) if other is metric]
            both = [best[:, :, half, own] >= metric.overlaps for half in (0, 1)]
        found[metric.name] = both[0]
        if metric.top1 is not None:
            right = top1.reshape(-1, *[1] * (both[1].ndim - 1))
            found[TOP1 + metric.name] = np.where(right, both[1], 0)
    return found
