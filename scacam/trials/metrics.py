"""Every metric of faithfulness and sanity, one row each: from what a trial found to a number.

A trial is something that is done to the image or the network, and several metrics may look at what
it found. Without torch, so that pages can name the metrics.

To add a metric: write its function here, give it a row in `METRICS`, and test it. What no trial
finds yet is a row in `trials.TRIALS` as well.

References:
    Petsiuk et al. 2018, RISE: deletion and insertion.
    Chattopadhay et al. 2018, Grad-CAM++: average drop and increase in confidence.
    Zhang et al. 2023, Opti-CAM: average gain.
    Poppi et al. 2021, Revisiting the Evaluation of Class Activation Mapping for Explainability:
        complexity, coherency, and ADCC.
    Rong et al. 2022, A Consistent and Efficient Evaluation Strategy for Attribution Methods: ROAD.
    Adebayo et al. 2018, Sanity Checks for Saliency Maps.
    Sixt et al. 2020, When Explanations Lie: the random logit.
    Yeh et al. 2019, On the (In)fidelity and Sensitivity of Explanations.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

import numpy as np

from scacam.errors import ScacamError
from scacam.evaluation.intervals import Difference, Row, lead
from scacam.evaluation.metrics import Metric, Scores

__all__ = [
    "ALIKE",
    "BASELINES",
    "CURVES",
    "METRICS",
    "SANITY",
    "chosen",
    "insane",
    "leads",
    "measured",
    "passes",
    "verdict",
]

BASELINES = ("random_map", "center_gaussian", "edge_strength", "constant_map")
"""Maps that never looked at the network. They stand where the methods stand."""

CURVES = {
    "deletion": "the most relevant pixels become the mean colour",
    "insertion": "the most relevant pixels come into the blurred image",
    "morf": "the most relevant pixels become what surrounds them",
    "lerf": "the least relevant pixels become what surrounds them",
}
"""What trials find that is a curve, the probability over the share of pixels, in words."""

SANITY = {
    "random_head": "when the classifier's weights are random",
    "random_network": "when the whole network is random",
}
"""The metrics of the sanity checks: when it is that maps should change. The random logit is none of
them: the other stored classes are often near the first, and then their maps should be alike."""

ALIKE = 0.5
"""The rank correlation from which on maps hardly change."""

_SAME = 0.99
"""The rank correlation from which on maps of two classes are the same."""

_NOTHING = 1e-7

_ROUNDING = 1e-6
"""What a probability changes by when the same image is in another batch."""


def _area(curves: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The area under curves `[..., S]` over shares of the pixels `[..., S]`, by trapezoids."""
    return (np.diff(shares) * (curves[..., 1:] + curves[..., :-1]) / 2).sum(-1)


def deletion_auc(scores: Scores) -> np.ndarray:
    """The area under the probability while pixels become the mean colour."""
    return _area(scores["deletion"], scores["share"])


def insertion_auc(scores: Scores) -> np.ndarray:
    """The area under the probability while pixels come into the blurred image."""
    return _area(scores["insertion"], scores["share"])


def average_drop(scores: Scores) -> np.ndarray:
    """The share of the probability that goes when the image is multiplied by the map."""
    before, after = scores["probability"], scores["masked"]
    return (before - after).clip(min=0) / np.maximum(before, _NOTHING)


def increase_in_confidence(scores: Scores) -> np.ndarray:
    """Whether the probability grows when the image is multiplied by the map, not by rounding."""
    return scores["masked"] - scores["probability"] > _ROUNDING


def average_gain(scores: Scores) -> np.ndarray:
    """The share of what the probability lacks to 1 that comes when that is done."""
    before, after = scores["probability"], scores["masked"]
    return (after - before).clip(min=0) / np.maximum(1 - before, _NOTHING)


def coherency(scores: Scores) -> np.ndarray:
    """How alike the map is to that of the image times the map, from 0 to 1."""
    return (1 + scores["correlation"]) / 2


def adcc(scores: Scores) -> np.ndarray:
    """The harmonic mean of coherency, 1 - complexity and 1 - average drop; 0 if one of them is."""
    parts = np.stack([coherency(scores), 1 - scores["complexity"], 1 - average_drop(scores)])
    inverses = np.divide(1, parts, out=np.full(parts.shape, np.inf), where=parts > 0)
    return len(parts) / inverses.sum(0)


def road(scores: Scores) -> np.ndarray:
    """Half of the probability that is left more if the least relevant pixels go first."""
    return (scores["lerf"] - scores["morf"]).mean(-1) / 2


METRICS = {
    metric.name: metric
    for metric in (
        Metric("deletion_auc", "deletion", deletion_auc, "deletion", higher_is_better=False),
        Metric("insertion_auc", "insertion", insertion_auc, "insertion", headline=True),
        Metric("average_drop", "drop", average_drop, "masked", higher_is_better=False),
        Metric("increase_in_confidence", "increase", increase_in_confidence, "masked"),
        Metric("average_gain", "gain", average_gain, "masked"),
        Metric(
            "complexity",
            "complexity",
            itemgetter("complexity"),
            "masked",
            brief=False,
            higher_is_better=False,
        ),
        Metric("coherency", "coherency", coherency, "masked", brief=False),
        Metric("adcc", "ADCC", adcc, "masked"),
        Metric("road", "ROAD", road, "road"),
        *(
            Metric(
                name + ssim,
                title + (", SSIM" if ssim else ""),
                itemgetter(name + ssim),
                name,
                brief=not ssim,
                higher_is_better=False,
            )
            for name, title in (
                ("random_logit", "other class"),
                ("random_head", "random head"),
                ("random_network", "random network"),
            )
            for ssim in ("", "_ssim")
        ),
        Metric(
            "sensitivity",
            "sensitivity",
            itemgetter("sensitivity"),
            "sensitivity",
            higher_is_better=False,
        ),
    )
}


def chosen(names: Sequence[str] | None) -> list[Metric]:
    """The metrics of these names, all if left out. Raises ScacamError for one that is not known."""
    unknown = [name for name in names or () if name not in METRICS]
    if unknown:
        raise ScacamError(f"unknown metric {unknown[0]!r}; known are {', '.join(METRICS)}")
    return [metric for name, metric in METRICS.items() if names is None or name in names]


def measured(metrics: Iterable[Metric], scores: Scores) -> dict[str, np.ndarray]:
    """Metrics by name, float64 `[B, M]`, of what trials found of B images and M claimants."""
    return {metric.name: metric.function(scores).astype(np.float64) for metric in metrics}


def insane(rows: Iterable[Row]) -> dict[str, list[str]]:
    """By method the sanity checks that it fails: where its maps hardly change, beyond noise.

    Args:
        rows: of the table of metrics, of one network. Baselines are left out: they all fail.
    """
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row["metric"] in SANITY and row["method"] not in BASELINES and row["ci_low"] > ALIKE:
            failed.setdefault(row["method"], []).append(row["metric"])
    return failed


def verdict(rows: Iterable[Row]) -> list[str]:
    """Which methods fail which sanity check, in words: a line for each check that was made.

    And which maps are the same whatever the class: they say where a network looked, not for what.
    """
    rows = list(rows)
    failed = insane(rows)
    lines = []
    for check, when in SANITY.items():
        if not any(row["metric"] == check for row in rows):
            continue
        names = [method for method, checks in failed.items() if check in checks]
        if names:
            lines.append(f"maps hardly change {when}: {', '.join(names)}")
        else:
            lines.append(f"the maps of all methods change {when}")
    same = [
        row["method"]
        for row in rows
        if row["metric"] == "random_logit"
        and row["method"] not in BASELINES
        and row["ci_low"] > _SAME
    ]
    if same:
        lines.append(f"maps are the same for every class: {', '.join(same)}")
    return lines


def leads(rows: Iterable[Row], pairs: Iterable[Row]) -> Iterator[tuple[Metric, str, Difference]]:
    """By each metric of faithfulness the best method, and what it is ahead of the next by.

    Sanity checks have no best: nothing is more or less than passed. Nor has the random logit.

    Args:
        rows, pairs: of the table of metrics and of that of their differences, of one network.
    """
    rows, pairs = list(rows), list(pairs)
    for name, metric in METRICS.items():
        if name in (*SANITY, "random_logit") or not metric.brief:
            continue
        best = lead(rows, pairs, name, metric.higher_is_better, BASELINES)
        others = [] if best is None else [one for one in best.others if one.method not in BASELINES]
        if best is not None and others:
            yield metric, best.best, min(others, key=lambda other: abs(other.value))


def passes(names: Sequence[str], claimants: int, steps: int) -> int:
    """How many images a network is shown for one, at most: maps that are alike share them.

    Args:
        names: of metrics.
        claimants: how many methods are tried.
        steps: of deletion and insertion.
    """
    maps = claimants + len(BASELINES)
    by_trial = {"deletion": maps * (steps - 1), "insertion": maps * (steps - 1) + 1}
    by_trial |= {"masked": maps, "road": 18 * maps, "sensitivity": 10, "random_logit": 0}
    return 1 + sum(by_trial.get(trial, 1) for trial in {METRICS[name].needs for name in names})
