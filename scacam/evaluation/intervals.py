"""Metrics of a data set with bootstrap intervals, and paired differences between methods.

Images are summed up in at most `GROUPS` groups, to which they are dealt at random, and the
bootstrap draws groups. Up to that many images each is a group of its own: the plain bootstrap over
images. Beyond, memory stays the same and the intervals become uncertain by 1 / √(2 · GROUPS), 2 %.
Images are dealt one by one, not in blocks: neighbours in a manifest are often of one class, and
groups of neighbours would give the interval of another sample of classes.
Thresholds that are best on the data set are kept in every draw. (Chosen anew, they gave intervals
that lay off the value and covered the truth no more often: 93 to 96 % either way, in simulations of
200 images.) All methods see the same draws, so that differences between them are paired.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from scacam.evaluation.measures import BASELINES
from scacam.evaluation.metrics import METRICS, SWEPT, TOP1, Metric, State, headline
from scacam.evaluation.sweep import THRESHOLDS

__all__ = [
    "GROUPS",
    "Comparison",
    "Difference",
    "Row",
    "best_levels",
    "compared",
    "curves",
    "dealt",
    "draws",
    "lead",
    "summarise",
]

Row = Mapping[str, Any]

GROUPS = 1000
_DRAWS = 1000
_SEED = 0
_INTERVAL = (0.025, 0.975)
_PREFIXES = ("", TOP1)


class Difference(NamedTuple):
    """The metric of the best method minus that of another method, with its paired interval."""

    method: str
    value: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Whether it may as well be none."""
        return self.low <= 0 <= self.high


class Comparison(NamedTuple):
    """The best method against each other one, in the metric by which methods are compared."""

    metric: str
    best: str
    others: list[Difference]


def dealt(images: int) -> np.ndarray:
    """The group of each image: uint16 `[images]`."""
    order = np.random.default_rng(_SEED).permutation(images)
    return (order % GROUPS).astype(np.uint16)


def draws(images: np.ndarray) -> np.ndarray:
    """How often each group counts: `[1 + 1000, groups]`, first once, then as the bootstrap draws.

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


def best_levels(hits: np.ndarray) -> np.ndarray:
    """The level at which most images have a hit, the first of equals: from `[..., 255]`."""
    return hits.argmax(-1)


def summarise(
    state: State,
    methods: Sequence[str],
    names: Sequence[str],
    levels: np.ndarray | None = None,
    table: Mapping[str, Metric] = METRICS,
) -> tuple[list[Row], list[Row]]:
    """Metrics with their intervals, and paired differences between methods.

    Args:
        state: the sums of `metrics.values`, `[groups, M, *shape]` each.
        methods: M of them.
        names: of the metrics that are wanted.
        table: where these are.
        levels: int `[M, 2, 4]`, those at which the metrics of `metrics.SWEPT`, and their twins,
            were measured.

    Returns:
        Rows as in `tables.LOCALIZATION` and `tables.DIFFERENCES`, without their network.

    Raises:
        ValueError: there is no image at all.
    """
    weights = draws(state.images)
    images, count = weights @ state.images, int(state.images.sum())
    rows: list[Row] = []
    pairs: list[Row] = []
    for name in names:
        metric = table[name.removeprefix(TOP1)]
        under = {}
        for index, method in enumerate(methods):
            sums = state.sums[name][:, index]
            weighted = np.tensordot(weights, sums, 1)
            under[method] = metric.compute(weighted, images)
            thresholds = None
            if levels is not None and metric.overlaps:
                own = [swept is metric for swept, _ in SWEPT]
                thresholds = THRESHOLDS[levels[index, int(name != metric.name), own]].tolist()
            row = {"method": method, "metric": name, "images": count, "thresholds": thresholds}
            rows.append({**row, **_interval("value", under[method])})
        for method, other in combinations(methods, 2):
            row = {"metric": name, "method": method, "other": other, "images": count}
            pairs.append({**row, **_interval("difference", under[method] - under[other])})
    return rows, pairs


def curves(hits: np.ndarray, images: int, methods: Sequence[str], known: bool) -> Iterator[Row]:
    """Accuracies over thresholds: rows as in `tables.CURVES`, without their network.

    Args:
        hits: `[M, 2, 4, 255]`, how many images have a hit; how many with the top class right, too.
        images: of how many.
        methods: M of them.
        known: whether to give the first as well.
    """
    for method, by_half in zip(methods, hits / images, strict=True):
        for prefix, by_metric in list(zip(_PREFIXES, by_half, strict=True))[not known :]:
            for (metric, overlap), curve in zip(SWEPT, by_metric, strict=True):
                name = prefix + metric.name
                for threshold, accuracy in zip(THRESHOLDS.tolist(), curve.tolist(), strict=True):
                    row = {"method": method, "metric": name, "iou": overlap}
                    yield {**row, "threshold": threshold, "accuracy": accuracy}


def compared(rows: Iterable[Row], pairs: Iterable[Row]) -> Comparison | None:
    """The best method against each other one; None if no metric for that was measured.

    Args:
        rows, pairs: as in `tables.LOCALIZATION` and `tables.DIFFERENCES`, of one network.
    """
    rows = list(rows)
    name = headline({row["metric"] for row in rows})
    if name is None:
        return None
    return lead(rows, pairs, name, METRICS[name.removeprefix(TOP1)].higher_is_better, BASELINES)


def lead(
    rows: Iterable[Row],
    pairs: Iterable[Row],
    name: str,
    higher_is_better: bool,
    baselines: Collection[str],
) -> Comparison | None:
    """The best method by a metric against each other one; None if there is none but baselines.

    Args:
        rows, pairs: as in `tables.LOCALIZATION` and `tables.DIFFERENCES`, of one network.
        name: of the metric.
        higher_is_better: which way is better.
        baselines: which methods cannot be the best.
    """
    ranked = [row for row in rows if row["metric"] == name and row["method"] not in baselines]
    if not ranked:
        return None
    sign = 1 if higher_is_better else -1
    best = max(ranked, key=lambda row: sign * row["value"])["method"]
    others = []
    for row in pairs:
        if row["metric"] != name or best not in (row["method"], row["other"]):
            continue
        value, low, high = row["difference"], row["ci_low"], row["ci_high"]
        if row["method"] == best:
            others.append(Difference(row["other"], value, low, high))
        else:
            others.append(Difference(row["method"], -value, -high, -low))
    return Comparison(name, best, others)


def _interval(name: str, values: np.ndarray) -> Row:
    """The value, under its name, and its interval, of a metric under the weightings of `draws`."""
    low, high = np.quantile(values[1:], _INTERVAL)
    return {name: float(values[0]), "ci_low": float(low), "ci_high": float(high)}
