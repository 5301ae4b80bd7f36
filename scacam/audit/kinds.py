"""Kinds of findings: what may be wrong with a class, how strong it is, and in which images.

A kind gives each image that a network assigns to a class a score; the class has their mean. How
strong a finding is, is said relative to the other classes of the same network: real maps lie in the
middle and on objects, and classes differ, so that a mean by itself says nothing. A class stands out
if it is farther from the others than they are from each other.

To add a kind: write its function here, give it a row in `KINDS`, and test it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.special import stdtr

from scacam.audit.attention import BORDER_AREA, CORNER_AREA, border_cells, corner_cells, outside
from scacam.audit.classes import Answers, Learnt
from scacam.audit.components import CONFIDENT, MIN_IMAGES

__all__ = [
    "FINDINGS",
    "FINDING_IMAGES",
    "KINDS",
    "SUSPECTS",
    "Kind",
    "Scored",
    "Strengths",
    "Tally",
    "scored",
    "strengths",
]

SUSPECTS = pa.schema(
    [
        ("network", pa.string()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("probability", pa.float32()),
        ("fall", pa.float32()),
        ("place", pa.float32()),
        ("score", pa.float32()),
    ]
)
"""Confident answers, of labelled images the right ones, the most suspicious of a network first: how
far the probability falls without the component of the class, where that lies, and their product."""

FINDINGS = pa.schema(
    [
        ("finding", pa.int64()),
        ("network", pa.string()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("kind", pa.string()),
        ("strength", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("images", pa.int64()),
        ("share", pa.float64()),
        ("stands_out", pa.bool_()),
        ("located", pa.list_(pa.float32())),
        ("map_height", pa.int16()),
        ("map_width", pa.int16()),
    ]
)
"""What may be wrong with a class, as multiples of the median over classes, with 95 % intervals:
those that stand out first, then by strength. Of so many images that share is affected. Of
components, where they lie in the images that owe most to them, row by row."""

FINDING_IMAGES = pa.schema(
    [
        ("finding", pa.int64()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("score", pa.float32()),
    ]
)
"""The images that show a finding most, the first of each finding the most."""

_CHANCE = 0.01
_SPREAD = 0.1
_LEAST = 1e-3


class Scored(NamedTuple):
    """The scores of N answers by one kind, `[N]`, NaN where an answer has no part in it.

    Attributes:
        scores: how much of it each shows.
        affected: bool, whether that is more than it would be by chance.
    """

    scores: np.ndarray
    affected: np.ndarray


def component(answers: Answers, learnt: Learnt) -> Scored:
    """What confident answers owe to the first component of their class, times where that lies.

    Affected are those that would not be confident without it.
    """
    falls = learnt.falls(answers)
    return Scored(learnt.suspicion(answers, falls), answers.probabilities - falls < CONFIDENT)


def off_object(answers: Answers, learnt: Learnt) -> Scored:
    """How much denser maps are outside of the objects than inside."""
    if answers.coverage is None:
        return _above(np.full(len(answers.class_ids), np.nan), 0.5)
    return _above(outside(answers.shares, answers.coverage), 0.5)


def border(answers: Answers, learnt: Learnt) -> Scored:
    """The share of maps at the border."""
    return _above(_within(answers.shares, border_cells(*learnt.usual.shape)), BORDER_AREA)


def corner(answers: Answers, learnt: Learnt) -> Scored:
    """The share of maps in the corners."""
    return _above(_within(answers.shares, corner_cells(*learnt.usual.shape)), CORNER_AREA)


def fixed_place(answers: Answers, learnt: Learnt) -> Scored:
    """How alike what sets a map apart is to what sets the other maps of its class apart.

    From 0 over .5, not at all, to 1. Over a class their mean is `attention.fixed_place`, halved
    and raised by a half.
    """
    count, spread = learnt.mapped[answers.class_ids], learnt.spreads[answers.class_ids]
    rows = np.flatnonzero(answers.mapped & (count > 1) & (spread > 0))
    count, spread = count[rows], spread[rows]
    apart = answers.shares[rows] - learnt.usual
    others = learnt.totals[answers.class_ids[rows]] - count[:, None, None] * learnt.usual - apart
    found = np.full(len(answers.class_ids), np.nan)
    found[rows] = 0.5 + (apart * others).sum((1, 2)) / (count - 1) / spread / 2
    return _above(found, 0.75)


def map_cluster(answers: Answers, learnt: Learnt) -> Scored:
    """How much better two means describe the maps of a class than one (Lapuschkin et al. 2019)."""
    return _above(np.where(answers.mapped, learnt.divided(answers), np.nan), 0)


def disagreement(answers: Answers, learnt: Learnt) -> Scored:
    """The share of the other networks that say something else."""
    return _above(answers.others, 0)


def confident_mistakes(answers: Answers, learnt: Learnt) -> Scored:
    """The probability of confident answers that the labels deny, 0 of all others."""
    wrong = (answers.class_ids != answers.labels) & (answers.probabilities >= CONFIDENT)
    return _above(np.where(np.isfinite(answers.labels), wrong * answers.probabilities, np.nan), 0)


def _within(shares: np.ndarray, cells: np.ndarray) -> np.ndarray:
    return np.where(shares.any((1, 2)), (shares * cells).sum((1, 2)), np.nan)


def _above(scores: np.ndarray, chance: float) -> Scored:
    return Scored(scores, scores > chance)


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        name: as in tables.
        title: as people read it, of a class.
        function: what it makes of N answers.
    """

    name: str
    title: str
    function: Callable[[Answers, Learnt], Scored]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("component", "rests on what lies elsewhere", component),
        Kind("off_object", "looks off the objects", off_object),
        Kind("border", "looks at the border", border),
        Kind("corner", "looks into the corners", corner),
        Kind("fixed_place", "looks at one place whatever the image", fixed_place),
        Kind("map_cluster", "looks in two ways", map_cluster),
        Kind("disagreement", "is denied by other networks", disagreement),
        Kind("confident_mistakes", "is sure and wrong", confident_mistakes),
    )
}


class Strengths(NamedTuple):
    """How strong the findings of one kind are, for each of K classes; NaN where nothing is known.

    Attributes:
        strength: the class's mean score as a multiple of the median over classes.
        low, high: its 95 % interval, by the scatter of the class's images.
        stands_out: bool, whether the class is farther above the other classes than chance allows.
    """

    strength: np.ndarray
    low: np.ndarray
    high: np.ndarray
    stands_out: np.ndarray


@dataclass
class Tally:
    """Sums over images of K classes and all kinds; those of several parts add.

    Attributes:
        images: `[kinds, K]`, how many have a score.
        sums, squares: `[kinds, K]`, of their scores.
        affected: `[kinds, K]`, how many are affected.
    """

    images: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    affected: np.ndarray

    @classmethod
    def update(cls, class_ids: np.ndarray, scored: Mapping[str, Scored], classes: int) -> "Tally":
        """Of N images whose classes are `[N]`."""
        parts = np.zeros((4, len(KINDS), classes))
        for kind, name in enumerate(KINDS):
            scores, affected = scored[name]
            known = np.isfinite(scores)
            columns = known, scores, scores**2, affected
            for part, values in zip(parts[:, kind], columns, strict=True):
                np.add.at(part, class_ids[known], values[known])
        return cls(*parts)

    @classmethod
    def merge(cls, parts: Iterable["Tally"]) -> "Tally":
        """The sum of at least one."""
        columns = zip(*((p.images, p.sums, p.squares, p.affected) for p in parts), strict=True)
        return cls(*(sum(column[1:], column[0]) for column in columns))

    def strengths(self, kind: str) -> Strengths:
        """Of one kind."""
        row = list(KINDS).index(kind)
        count = np.where(self.images[row] >= MIN_IMAGES, self.images[row], np.nan)
        means = self.sums[row] / count
        variance = (self.squares[row] / count - means**2).clip(min=0) * count / (count - 1)
        return strengths(means, np.sqrt(variance / count))


def strengths(means: np.ndarray, errors: np.ndarray) -> Strengths:
    """Judge the mean scores `[K]` of classes, NaN where unknown, with their standard errors.

    A class stands out if the logarithm of its mean lies above the interval in which those of the
    others predict it (Student's, with all of them known): with `_CHANCE`, divided by the classes
    and kinds, for a network in which nothing is wrong. Below a quarter of the median means count
    as that; the median is taken to be a thousandth at least, the classes' spread a tenth. A class
    of which one cannot be sure that it is above the median never stands out. So a network of few
    classes needs a lot.
    """
    known = np.flatnonzero(np.isfinite(means))
    median = max(float(np.median(means[known])), _LEAST) if len(known) else _LEAST
    strength, error = means / median, 1.96 * errors / median
    low, high = strength - error, strength + error
    stands_out = np.zeros(len(means), dtype=bool)
    if len(known) > 2:
        logs = np.log(strength[known].clip(min=0.25))
        count = len(logs) - 1
        others = (logs.sum() - logs) / count
        squares = ((logs**2).sum() - logs**2) / count - others**2
        spread = np.sqrt(squares.clip(min=0) * count / (count - 1)).clip(min=_SPREAD)
        distance = (logs - others) / (spread * np.sqrt(1 + 1 / count))
        chance = stdtr(count - 1, -distance) * len(known) * len(KINDS)
        stands_out[known] = (chance < _CHANCE) & (low[known] > 1)
    return Strengths(strength, low, high, stands_out)


def scored(answers: Answers, learnt: Learnt) -> dict[str, Scored]:
    """What all kinds make of N answers."""
    return {name: kind.function(answers, learnt) for name, kind in KINDS.items()}
