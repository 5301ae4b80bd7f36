"""What is learnt of each class of a network before single images are judged, from parts that add.

Arrays in, arrays out. Memory does not grow with the number of images: of each class there are sums,
and a sample of so many images, the same whatever the parts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from scacam.audit.components import (
    CONFIDENT,
    MIN_IMAGES,
    Components,
    Contributions,
    Shortcut,
    find_shortcut,
)
from scacam.audit.likeness import Parts, find_parts

__all__ = [
    "ANSWERED",
    "CLASSES",
    "SAMPLE",
    "Answers",
    "Gathered",
    "Known",
    "Learnt",
]

CLASSES = pa.schema(
    [
        ("network", pa.string()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("images", pa.int64()),
        ("labelled", pa.int64()),
        ("right", pa.int64()),
        ("in_top", pa.int64()),
        ("probability", pa.float64()),
        ("map", pa.list_(pa.float32())),
        ("map_height", pa.int16()),
        ("map_width", pa.int16()),
        ("confident", pa.list_(pa.int64())),
    ]
)
"""One row per class that a network says of an image: of how many, how many of them are labelled,
of how many the label confirms it, and of how many the label is among the top classes, five at most;
the mean probability, the mean map, row by row, and the images of which it is most confident."""

ANSWERED = ("images", "labelled", "right", "in_top", "probability")
"""Of these columns there are sums."""

SAMPLE = 256
"""So many images of a class are kept to find its component and its sorts of maps."""
_CLASSES_AT_ONCE = 32

Known = tuple[dict[int, Shortcut], dict[int, "Parts"]]
"""The shortcuts of some classes, and their two sorts of maps."""


class Answers(NamedTuple):
    """The top answers of a network to N images.

    Attributes:
        image_ids: int64 `[N]`.
        class_ids: int `[N]`, what the network says.
        probabilities: `[N]`, of these.
        labels: float `[N]`, NaN where unknown.
        shares: the positive maps of these classes `[N, h, w]`, each with sum 1, or all zero.
        coverage: `[N, h, w]`, how much of each cell is object, NaN where unknown; None where no
            objects are known.
        others: float `[N]`, the share of the other networks that say something else; NaN without.
        contributions: of the channels to these classes; None where a run has not kept them.
    """

    image_ids: np.ndarray
    class_ids: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    shares: np.ndarray
    coverage: np.ndarray | None
    others: np.ndarray
    contributions: Contributions | None

    @property
    def mapped(self) -> np.ndarray:
        """Whether a map is not zero: bool `[N]`."""
        return np.asarray(self.shares.any((1, 2)))

    def of(self, rows: np.ndarray) -> "Answers":
        """Only these images."""
        return Answers(
            self.image_ids[rows],
            self.class_ids[rows],
            self.probabilities[rows],
            self.labels[rows],
            self.shares[rows],
            None if self.coverage is None else self.coverage[rows],
            self.others[rows],
            None if self.contributions is None else self.contributions.of(rows),
        )

    def by_class(self, chosen: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Of the chosen images, bool `[N]`, those of each class: its id and their places."""
        rows = np.flatnonzero(chosen)
        order = rows[np.argsort(self.class_ids[rows], kind="stable")]
        classes, firsts = np.unique(self.class_ids[order], return_index=True)
        for class_id, part in zip(classes, np.split(order, firsts)[1:], strict=True):
            yield int(class_id), part


@dataclass(frozen=True)
class Learnt:
    """What is known of each of K classes of a network.

    Attributes:
        mapped: `[K]`, how many maps that are not zero each has.
        totals: `[K, h, w]`, their sums.
        squares: `[K]`, the sums of their squares over maps and cells.
        usual: `[h, w]`, the median over classes of their mean maps.
        shortcuts: of the classes with enough confident answers.
        parts: the two sorts of maps of the classes with enough of them.
    """

    mapped: np.ndarray
    totals: np.ndarray
    squares: np.ndarray
    usual: np.ndarray
    shortcuts: dict[int, Shortcut]
    parts: dict[int, Parts]

    @cached_property
    def spreads(self) -> np.ndarray:
        """`[K]`, the mean squared distance of maps from the usual one; 0 if they are it."""
        across = (self.usual * self.totals).sum((1, 2))
        spreads = self.squares - 2 * across + self.mapped * (self.usual**2).sum()
        return np.where(spreads > 1e-12 * self.squares, spreads / self.mapped.clip(min=1), 0)

    @cached_property
    def _components(self) -> Components:
        found = {class_id: one.component for class_id, one in self.shortcuts.items()}
        return Components.of(found, len(self.mapped))

    @cached_property
    def _places(self) -> np.ndarray:
        places = np.full(len(self.mapped), np.nan)
        for class_id, shortcut in self.shortcuts.items():
            places[class_id] = shortcut.place
        return places

    @cached_property
    def _parts(self) -> Parts:
        """Of all classes, NaN where nothing is known."""
        count, shape = len(self.mapped), self.usual.shape
        columns = (np.full((count, *each), np.nan) for each in (shape, (2, *shape), ()))
        every = Parts(*columns)
        for class_id, own in self.parts.items():
            for column, value in zip(every, own, strict=True):
                column[class_id] = value
        return every

    def divided(self, answers: Answers) -> np.ndarray:
        """How far maps are of the smaller sort of their class, see `Parts.scores`.

        `[N]`, NaN where nothing is known of the class.
        """
        own = Parts(*(column[answers.class_ids] for column in self._parts))
        return own.scores(answers.shares)

    def falls(self, answers: Answers) -> np.ndarray:
        """How far the probability of confident answers falls without their class's component.

        `[N]`, NaN for others and where nothing is known of the class.
        """
        found = np.full(len(answers.class_ids), np.nan)
        if answers.contributions is not None:
            rows = np.flatnonzero(answers.probabilities >= CONFIDENT)
            found[rows] = self._components.falls(
                answers.class_ids[rows],
                answers.contributions.of(rows),
                answers.probabilities[rows],
            )
        return found

    def suspicion(self, answers: Answers, falls: np.ndarray) -> np.ndarray:
        """How suspicious answers are by their falls `[N]`: these, times the place of the class."""
        return falls * self._places[answers.class_ids]


@dataclass
class Gathered:
    """What some images of a network add to what is learnt.

    Attributes:
        mapped, totals, squares: as in `Learnt`.
        sample: of each class, those of the images with the smallest keys, their answers.
    """

    mapped: np.ndarray
    totals: np.ndarray
    squares: np.ndarray
    sample: Answers

    @classmethod
    def update(cls, answers: Answers, num_classes: int) -> "Gathered":
        """Of N images of a network with so many classes."""
        shape = answers.shares.shape[1:]
        found = cls(
            np.zeros(num_classes),
            np.zeros((num_classes, *shape)),
            np.zeros(num_classes),
            _sampled(answers),
        )
        np.add.at(found.mapped, answers.class_ids, answers.mapped)
        np.add.at(found.totals, answers.class_ids, answers.shares)
        np.add.at(found.squares, answers.class_ids, (answers.shares**2).sum((1, 2)))
        return found

    @classmethod
    def merge(cls, parts: Sequence["Gathered"]) -> "Gathered":
        """The sum of at least one."""
        return cls(
            sum((part.mapped for part in parts), np.zeros(1)),
            sum((part.totals for part in parts), np.zeros(1)),
            sum((part.squares for part in parts), np.zeros(1)),
            _sampled(_joined([part.sample for part in parts])),
        )

    def learn(
        self, known: Callable[[Iterable[np.ndarray]], Iterable[Known]] | None = None
    ) -> Learnt:
        """What is known of the classes.

        Args:
            known: what is known of some classes at a time, from the ids of each time; left out,
                `known` is asked, one time after the other.
        """
        some = self.mapped > 0
        shape = self.totals.shape[1:]
        usual = np.zeros(shape)
        if some.any():
            usual = np.median(self.totals[some] / self.mapped[some, None, None], axis=0)
        classes = np.unique(self.sample.class_ids)
        few = np.array_split(classes, max(1, -(-len(classes) // _CLASSES_AT_ONCE)))
        learnt = Learnt(self.mapped, self.totals, self.squares, usual, {}, {})
        for shortcuts, parts in (known or partial(map, self.known))(few):
            learnt.shortcuts.update(shortcuts)
            learnt.parts.update(parts)
        return learnt

    def known(self, class_ids: np.ndarray) -> Known:
        """What the sample says of some classes."""
        answers = self.sample.of(np.isin(self.sample.class_ids, class_ids))
        shortcuts: dict[int, Shortcut] = {}
        if answers.contributions is not None:
            for class_id, rows in answers.by_class(answers.probabilities >= CONFIDENT):
                if len(rows) >= MIN_IMAGES:
                    shortcuts[class_id] = find_shortcut(
                        answers.contributions.of(rows),
                        answers.probabilities[rows],
                        answers.shares.shape[1:],
                        None if answers.coverage is None else answers.coverage[rows],
                    )
        parts: dict[int, Parts] = {}
        for class_id, rows in answers.by_class(answers.mapped):
            divided = find_parts(answers.shares[rows]) if len(rows) >= MIN_IMAGES else None
            if divided is not None:
                parts[class_id] = divided
        return shortcuts, parts


def _joined(parts: Sequence[Answers]) -> Answers:
    """All of them; what one of them does not know is not known of any."""
    covers = [part.coverage for part in parts if part.coverage is not None]
    kept = [part.contributions for part in parts if part.contributions is not None]
    contributions = None
    if len(kept) == len(parts):
        contributions = Contributions(*(np.concatenate(each) for each in zip(*kept, strict=True)))
    return Answers(
        np.concatenate([part.image_ids for part in parts]),
        np.concatenate([part.class_ids for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.shares for part in parts]),
        np.concatenate(covers) if len(covers) == len(parts) else None,
        np.concatenate([part.others for part in parts]),
        contributions,
    )


def _sampled(answers: Answers) -> Answers:
    """Of each class the images with the smallest keys, as few as a sample has."""
    keys = _keys(answers.image_ids)
    order = np.lexsort((keys, answers.class_ids))
    classes, firsts = np.unique(answers.class_ids[order], return_index=True)
    places = np.arange(len(order)) - firsts[np.searchsorted(classes, answers.class_ids[order])]
    return answers.of(np.sort(order[places < SAMPLE]))


def _keys(image_ids: np.ndarray) -> np.ndarray:
    """Numbers that look drawn by chance, the same for an image in any part (SplitMix64)."""
    keys = image_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return keys ^ (keys >> np.uint64(31))
