"""The two passes over the images of a run: what is usual of each class, then who is out of it.

What a task finds in some images is small and adds to what others find.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.audit.attention import coverage
from scacam.audit.classes import ANSWERED, Answers, Gathered, Known, Learnt
from scacam.audit.components import CONFIDENT, Contributions
from scacam.audit.kinds import KINDS, Tally, scored
from scacam.audit.likeness import energy
from scacam.audit.maps import TopMaps, judge
from scacam.evaluation.truth import TrueBoxes
from scacam.runs.record import same_classes
from scacam.runs.results import Run, open_run

__all__ = [
    "LISTED",
    "SUSPECTED",
    "Best",
    "Judge",
    "Judged",
    "Learn",
    "Look",
    "Opening",
    "Seen",
    "Top",
    "by_network",
    "top_answers",
    "top_k",
]

LISTED = 24
"""So many images are listed of each finding."""
SUSPECTED = 10_000
"""So many suspects are listed of each network, at most."""


Part = TypeVar("Part")


def by_network(add: Callable[[list[Part]], Part], *parts: dict[str, Part]) -> dict[str, Part]:
    """What was found in several parts of the images, added up network by network."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: add([part[name] for part in parts if name in part]) for name in names}


@dataclass(frozen=True)
class Opening:
    """A run that each process opens once, but anew for each audit: it may have gone on since."""

    path: str
    audit: str = field(default_factory=lambda: uuid4().hex)

    def run(self) -> Run:
        """The run."""
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(opening: Opening) -> Run:
    return open_run(opening.path)


class Seen(NamedTuple):
    """What some images teach of a network.

    Attributes:
        gathered: sums and samples.
        answered: the sums `ANSWERED` of its K classes, `[5, K]`.
        names: of its classes.
    """

    gathered: Gathered
    answered: np.ndarray
    names: dict[int, str]

    @classmethod
    def merge(cls, parts: "Sequence[Seen]") -> "Seen":
        """The sum of at least one."""
        names: dict[int, str] = {}
        for part in parts:
            names |= part.names
        answered = np.sum([part.answered for part in parts], axis=0)
        return cls(Gathered.merge([part.gathered for part in parts]), answered, names)


@dataclass(frozen=True)
class Look:
    """The first pass over some images: what they add to what is learnt, by network."""

    opening: Opening
    objects: Callable[[], TrueBoxes | None]

    def __call__(self, image_ids: np.ndarray) -> dict[str, Seen]:
        """Look at some images."""
        run = self.opening.run()
        found = {}
        for name, (answers, called, in_top) in top_answers(run, image_ids, self.objects()).items():
            classes = run.networks[name]["num_classes"]
            labelled = np.isfinite(answers.labels)
            columns = {
                "images": np.ones(len(labelled)),
                "labelled": labelled,
                "right": answers.labels == answers.class_ids,
                "in_top": in_top,
                "probability": answers.probabilities,
            }
            answered = [
                np.bincount(answers.class_ids, columns[name], minlength=classes)
                for name in ANSWERED
            ]
            names = dict(zip(answers.class_ids.tolist(), called.to_pylist(), strict=True))
            found[name] = Seen(Gathered.update(answers, classes), np.stack(answered), names)
        return found


@dataclass(frozen=True)
class Learn:
    """What is known of some classes of a network, after the first pass."""

    seen: Callable[[], dict[str, Seen]]
    network: str

    def __call__(self, class_ids: np.ndarray) -> Known:
        """Learn of some classes."""
        return self.seen()[self.network].gathered.known(class_ids)


class Best(NamedTuple):
    """The images with the largest scores, of each group so many.

    Attributes:
        groups: int64 `[N]`.
        image_ids: int64 `[N]`.
        values: float64 `[N, V]`, of which the first are the scores.
    """

    groups: np.ndarray
    image_ids: np.ndarray
    values: np.ndarray

    def first(self, size: int) -> "Best":
        """Of each group so many with the largest scores, by group and score."""
        order = np.lexsort((self.image_ids, -self.values[:, 0], self.groups))
        groups, firsts = np.unique(self.groups[order], return_index=True)
        places = np.arange(len(order)) - firsts[np.searchsorted(groups, self.groups[order])]
        kept = order[places < size]
        return Best(self.groups[kept], self.image_ids[kept], self.values[kept])

    @classmethod
    def joined(cls, parts: "Sequence[Best]", size: int) -> "Best":
        """The first of all parts."""
        columns = zip(*parts, strict=True)
        return cls(*(np.concatenate(column) for column in columns)).first(size)


class Judged(NamedTuple):
    """What the second pass finds in some images of a network.

    Attributes:
        tally: sums over its classes.
        images: of each finding the images that show it most; groups are `kind * K + class`. Behind
            all kinds, of each class those of which the network is most confident.
        suspects: the most suspicious; values are score, fall and probability, and the class.
    """

    tally: Tally
    images: Best
    suspects: Best

    @classmethod
    def merge(cls, parts: "Sequence[Judged]") -> "Judged":
        """The sum of at least one."""
        return cls(
            Tally.merge(part.tally for part in parts),
            Best.joined([part.images for part in parts], LISTED),
            Best.joined([part.suspects for part in parts], SUSPECTED),
        )


@dataclass(frozen=True)
class Judge:
    """The second pass over some images, by what was learnt of the classes of their networks."""

    opening: Opening
    objects: Callable[[], TrueBoxes | None]
    learnt: Callable[[], dict[str, Learnt]]

    def __call__(self, image_ids: np.ndarray) -> dict[str, Judged]:
        """Judge some images."""
        learnt = self.learnt()
        seen = top_answers(self.opening.run(), image_ids, self.objects())
        return {name: judged(top.answers, learnt[name]) for name, top in seen.items()}


def judged(answers: Answers, learnt: Learnt) -> Judged:
    """What is found in some answers of a network."""
    classes = len(learnt.mapped)
    kinds = scored(answers, learnt)
    groups, ids, scores = [], [], []
    for place, (name, found) in enumerate(kinds.items()):
        # Of the component, whoever owes most to it; of all others, only who is affected.
        listed = np.isfinite(found.scores) & (found.affected | (name == "component"))
        groups.append(place * classes + answers.class_ids[listed].astype(np.int64))
        ids.append(answers.image_ids[listed])
        scores.append(found.scores[listed])
    groups.append(len(KINDS) * classes + answers.class_ids.astype(np.int64))
    ids.append(answers.image_ids)
    scores.append(answers.probabilities)
    images = Best(np.concatenate(groups), np.concatenate(ids), np.concatenate(scores)[:, None])
    falls = learnt.falls(answers)
    wrong = np.isfinite(answers.labels) & (answers.labels != answers.class_ids)
    rows = np.flatnonzero(np.isfinite(falls) & (answers.probabilities >= CONFIDENT) & ~wrong)
    values = kinds["component"].scores, falls, answers.probabilities, answers.class_ids
    suspects = Best(
        np.zeros(len(rows), dtype=np.int64),
        answers.image_ids[rows],
        np.stack([part[rows] for part in values], axis=1).astype(np.float64),
    )
    tally = Tally.update(answers.class_ids, kinds, classes)
    return Judged(tally, images.first(LISTED), suspects.first(SUSPECTED))


class Top(NamedTuple):
    """The top answers of a network to N images.

    Attributes:
        answers: these.
        class_names: string `[N]`.
        in_top: bool `[N]`, whether the label is among the top classes, five at most.
    """

    answers: Answers
    class_names: pa.ChunkedArray
    in_top: np.ndarray


def top_answers(run: Run, image_ids: np.ndarray, objects: TrueBoxes | None) -> dict[str, Top]:
    """The top answers of the networks to some images, as far as there are any."""
    read = {name: _read(run, name, image_ids, objects) for name in run.networks}
    found = {name: top for name, top in read.items() if len(top.in_top)}
    for name, top in found.items():
        answers = top.answers
        denied = np.full((len(found), len(top.in_top)), np.nan)
        for place, (other, (its, *_)) in enumerate(found.items()):
            if other != name and same_classes(run.networks[name], run.networks[other]):
                _, mine, theirs = np.intersect1d(
                    answers.image_ids, its.image_ids, return_indices=True
                )
                denied[place, mine] = answers.class_ids[mine] != its.class_ids[theirs]
        known = np.isfinite(denied).sum(0)
        others = np.where(known > 0, np.nansum(denied, 0) / np.maximum(known, 1), np.nan)
        found[name] = top._replace(answers=answers._replace(others=others))
    return found


_COLUMNS = (
    *("image_id", "label", "class_id", "class_name", "rank", "probability", "heatmap"),
    *("view_x0", "view_y0", "view_x1", "view_y1"),
)


def top_k(run: Run) -> int:
    """So many classes of an image count as its top ones."""
    return min(5, int(run.config["top_k"]))


def _read(run: Run, network: str, image_ids: np.ndarray, objects: TrueBoxes | None) -> Top:
    claimant, top = judge(run, network), pc.field("rank") <= top_k(run)
    table = run.explanations(
        network, claimant.method, _COLUMNS, top, image_ids, layer=claimant.layer
    ).to_table()
    labelled = table.filter(pc.field("label") == pc.field("class_id"))["image_id"]
    rows = table.filter(pc.field("rank") == 1).sort_by("image_id")
    packed = rows["heatmap"].combine_chunks()
    heatmaps = packed.storage.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    maps = TopMaps(rows.drop_columns("heatmap"), heatmaps.reshape(len(rows), *claimant.map_shape))
    described = run.networks[network]
    contributions = None
    if claimant.map_shape == tuple(described["feature_shape"][1:]):
        contributions = _contributions(run, network, image_ids)
    answers = Answers(
        maps.column("image_id"),
        maps.column("class_id"),
        maps.column("probability"),
        maps.column("label").astype(np.float32),
        energy(maps.heatmaps),
        None if objects is None else coverage(objects, maps).astype(np.float32),
        np.full(len(rows), np.nan, dtype=np.float32),
        contributions,
    )
    in_top = np.isin(answers.image_ids, labelled.to_numpy())
    return Top(answers, maps.rows["class_name"], in_top)


def _contributions(run: Run, network: str, image_ids: np.ndarray) -> Contributions | None:
    """Of the channels to the top classes of images, by rising image id; None if there are none."""
    names = ["channel_ids", "channel_contributions", "channel_cells"]
    found = run.predictions(network, ["image_id", *names], pc.field("rank") == 1, image_ids)
    if found is None:
        return None
    rows = found.to_table().sort_by("image_id")
    if not len(rows):
        return None
    columns = (rows[name].combine_chunks().flatten().to_numpy() for name in names)
    return Contributions(*(column.reshape(len(rows), -1) for column in columns))
