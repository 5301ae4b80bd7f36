"""What most sets the evidence for a class apart between its images, and what an answer owes to it.

A class of images that a network knows by a shortcut falls into two parts, those with it and those
without. The channels that speak for the class in the one and not in the other are the first
component of the channels' contributions to its logit (class-wise PCA of weighted features: Neuhaus
et al. 2023, Spurious Features Everywhere).

Arrays in, arrays out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.linalg

from scacam.audit.attention import border_cells, outside

__all__ = [
    "CONFIDENT",
    "MIN_IMAGES",
    "Component",
    "Components",
    "Contributions",
    "Shortcut",
    "find_component",
    "find_shortcut",
    "where",
]

MIN_IMAGES = 5
"""Images that a class needs before anything is said of it."""
CONFIDENT = 0.5
"""The probability from which on an answer counts as confident."""

_LACKING = 0.1


class Contributions(NamedTuple):
    """What the channels that matter most add to the logit of one class of each of N images.

    Attributes:
        channels: int `[N, M]`, which they are; those of an image differ, none is negative.
        values: float `[N, M]`, what each adds; of channels that are not here, nothing is known and
            0 is taken.
        cells: int `[N, M]`, the cell of the feature map where each is largest, counted by rows.
    """

    channels: np.ndarray
    values: np.ndarray
    cells: np.ndarray

    def of(self, rows: np.ndarray) -> "Contributions":
        """Only these images."""
        return Contributions(*(part[rows] for part in self))


class Component(NamedTuple):
    """The first component of a class.

    Attributes:
        channels: int `[C]`, the channels that any of its images has, rising.
        direction: float `[C]`, of length 1; its sum, which it adds to the logit, is not negative.
        level: how much of it images have that lack it: the tenth part of them has less.
    """

    channels: np.ndarray
    direction: np.ndarray
    level: float

    def _weights(self, contributions: Contributions) -> np.ndarray:
        """The direction at the channels of other images `[N, M]`, 0 where it has none."""
        places = np.searchsorted(self.channels, contributions.channels)
        places = places.clip(max=len(self.channels) - 1)
        known = self.channels[places] == contributions.channels
        return np.where(known, self.direction[places], 0)

    def falls(self, contributions: Contributions, probabilities: np.ndarray) -> np.ndarray:
        """How far the probability of each image falls without the component.

        What the component adds to the logit beyond what images without it have is taken off; the
        logits of other classes stay.

        Args:
            contributions: of N images.
            probabilities: `[N]`, of the class.

        Returns:
            `[N]`, p - p', negative where an image has less of the component than others.
        """
        amount = (contributions.values * self._weights(contributions)).sum(1)
        return _fall((amount - self.level) * self.direction.sum(), probabilities)

    def places(self, contributions: Contributions, cells: int) -> np.ndarray:
        """Where the component lies in each image: `[N, cells]`, each with sum 1, or all zero.

        What each channel adds along the component is put at the cell where that is largest.
        """
        added = (contributions.values * self._weights(contributions)).clip(min=0)
        found = np.zeros((len(added), cells))
        rows = np.broadcast_to(np.arange(len(added))[:, None], added.shape)
        np.add.at(found, (rows, contributions.cells), added)
        total = found.sum(1, keepdims=True)
        return found / np.where(total > 0, total, 1)


def _fall(drop: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """How far probabilities fall when so much is taken off the logit of their class."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    return p - 1 / (1 + (1 - p) / p * np.exp(np.clip(drop, -50, 50)))


class Components(NamedTuple):
    """The components of several of K classes in one table, to ask all of them at once.

    Attributes:
        keys: int64 `[M]`, each a class and a channel of its component, rising.
        directions: float `[M]`.
        levels, sums: `[K]`, the levels, and the sums of the directions; NaN of other classes.
    """

    keys: np.ndarray
    directions: np.ndarray
    levels: np.ndarray
    sums: np.ndarray

    @classmethod
    def of(cls, components: Mapping[int, Component], classes: int) -> "Components":
        """Of the components by class."""
        order = sorted(components)
        keys = [_keys(each, components[each].channels) for each in order]
        directions = [components[each].direction for each in order]
        levels, sums = np.full((2, classes), np.nan)
        for each in order:
            levels[each] = components[each].level
            sums[each] = components[each].direction.sum()
        # One key that nobody asks for, so that the table is never empty.
        keys.append(np.array([np.iinfo(np.int64).max]))
        directions.append(np.zeros(1))
        return cls(np.concatenate(keys), np.concatenate(directions), levels, sums)

    def falls(
        self, class_ids: np.ndarray, contributions: Contributions, probabilities: np.ndarray
    ) -> np.ndarray:
        """As `Component.falls` of the class of each image `[N]`; NaN where it has none."""
        order = np.argsort(class_ids, kind="stable")  # so that what is looked up lies together
        keys = _keys(class_ids[order, None], contributions.channels[order])
        places = np.searchsorted(self.keys, keys)
        weights = np.where(self.keys[places] == keys, self.directions[places], 0)
        amount = np.empty(len(order))
        amount[order] = (contributions.values[order] * weights).sum(1)
        return _fall((amount - self.levels[class_ids]) * self.sums[class_ids], probabilities)


def _keys(class_ids: np.ndarray | int, channels: np.ndarray) -> np.ndarray:
    return np.left_shift(np.asarray(class_ids, dtype=np.int64), 32) + channels


def find_component(contributions: Contributions) -> Component:
    """The first principal component of the contributions of a class's images, at least 2."""
    channels, places = np.unique(contributions.channels, return_inverse=True)
    values = np.zeros((len(contributions.values), len(channels)))
    places = places.reshape(contributions.channels.shape)
    np.put_along_axis(values, places, contributions.values.astype(np.float64), axis=1)
    centred = values - values.mean(0)
    # The smaller of the two matrices has the same largest eigenvalue.
    if len(values) < len(channels):
        direction = _last_eigenvector(centred @ centred.T) @ centred
    else:
        direction = _last_eigenvector(centred.T @ centred) @ centred.T @ centred
    length = float(np.sqrt((direction**2).sum()))
    direction = direction / length if length > 0 else direction
    if direction.sum() < 0:
        direction = -direction
    return Component(channels, direction, float(np.quantile(values @ direction, _LACKING)))


def _last_eigenvector(matrix: np.ndarray) -> np.ndarray:
    """That of the largest eigenvalue of a symmetric matrix; the others would take most of it."""
    last = len(matrix) - 1
    _, vectors = scipy.linalg.eigh(matrix, subset_by_index=(last, last))
    return np.asarray(vectors[:, 0])


class Shortcut(NamedTuple):
    """The first component of a class, as what its confident answers may rest on alone.

    Attributes:
        component: the component.
        place: how far it lies off the object, or at the border where no objects are known, 0 to 1;
            .5 is as dense there as elsewhere.
        located: `[h, w]`, where it lies in the images that owe it most, with sum 1, or all zero.
    """

    component: Component
    place: float
    located: np.ndarray


def find_shortcut(
    contributions: Contributions,
    probabilities: np.ndarray,
    shape: tuple[int, int],
    coverage: np.ndarray | None = None,
) -> Shortcut:
    """The shortcut of a class from N of its confident answers, at least `MIN_IMAGES`.

    Args:
        contributions: of these.
        probabilities: `[N]`, of the class.
        shape: height and width of the feature map.
        coverage: `[N, h, w]`, how much of each cell is object, NaN where unknown; left out where
            no image's objects are known.
    """
    component = find_component(contributions)
    falls = component.falls(contributions, probabilities)
    owing = np.argsort(-falls, kind="stable")[: (len(falls) + 1) // 2]
    places = component.places(contributions.of(owing), shape[0] * shape[1]).reshape(-1, *shape)
    away = where(places, None if coverage is None else coverage[owing])
    known = away[np.isfinite(away)]
    total = places.sum(0)
    return Shortcut(
        component,
        float(known.mean()) if len(known) else 0.5,
        total / (total.sum() or 1),
    )


def where(shares: np.ndarray, coverage: np.ndarray | None) -> np.ndarray:
    """How much denser maps are off the objects, or without coverage at the border: `attention`."""
    if coverage is None:
        inner = 1 - border_cells(*shares.shape[1:])
        coverage = np.broadcast_to(inner, shares.shape)
    return outside(shares, coverage)
