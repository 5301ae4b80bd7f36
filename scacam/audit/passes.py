"""The two passes over the images of a run: what is usual of each class, then who is out of it.

What a task finds in some images is small and adds to what others find.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.audit.attention import coverage
from scacam.audit.classes import Answers, Gathered, Learnt
from scacam.audit.components import CONFIDENT, Contributions
from scacam.audit.kinds import Tally, scored
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
    "Look",
    "Seen",
    "merged",
    "top_answers",
]

LISTED = 24
"""So many images are listed of each finding."""
SUSPECTED = 10_000
"""So many suspects are listed of each network, at most."""


class Seen(NamedTuple):
    """What one task learns of a network: sums and samples, and the names of its classes."""

    gathered: Gathered
    names: dict[int, str]


@dataclass(frozen=True)
class Look:
    """The first pass over some images: what they add to what is learnt, by network."""

    path: str
    objects: Callable[[], TrueBoxes | None]

    def __call__(self, image_ids: np.ndarray) -> dict[str, Seen]:
        """Look at some images."""
        run = _opened(self.path)
        found = {}
        for name, (answers, rows) in top_answers(run, image_ids, self.objects()).items():
            classes = run.networks[name]["num_classes"]
            called = zip(answers.class_ids.tolist(), rows["class_name"].to_pylist(), strict=True)
            found[name] = Seen(Gathered.update(answers, classes), dict(called))
        return found


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
        images: of each finding the images that show it most; groups are `kind * K + class`.
        suspects: the most suspicious; values are score, fall and probability, and the class.
    """

    tally: Tally
    images: Best
    suspects: Best


@dataclass(frozen=True)
class Judge:
    """The second pass over some images, by what was learnt of the classes of their networks."""

    path: str
    objects: Callable[[], TrueBoxes | None]
    learnt: Callable[[], dict[str, Learnt]]

    def __call__(self, image_ids: np.ndarray) -> dict[str, Judged]:
        """Judge some images."""
        learnt = self.learnt()
        seen = top_answers(_opened(self.path), image_ids, self.objects())
        return {name: judged(answers, learnt[name]) for name, (answers, _) in seen.items()}


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


def merged(parts: Iterable[dict[str, Judged]]) -> dict[str, Judged]:
    """What was found in all images, by network."""
    totals: dict[str, Judged] = {}
    for part in parts:
        for name, found in part.items():
            if name not in totals:
                totals[name] = found
                continue
            total = totals[name]
            totals[name] = Judged(
                Tally.merge([total.tally, found.tally]),
                Best.joined([total.images, found.images], LISTED),
                Best.joined([total.suspects, found.suspects], SUSPECTED),
            )
    return totals


def top_answers(
    run: Run, image_ids: np.ndarray, objects: TrueBoxes | None
) -> dict[str, tuple[Answers, pa.Table]]:
    """The top answers of the networks to some images, and their rows, as far as there are any."""
    read = {name: _read(run, name, image_ids, objects) for name in run.networks}
    found = {name: pair for name, pair in read.items() if len(pair[1])}
    for name, (answers, rows) in found.items():
        denied = np.full((len(found), len(rows)), np.nan)
        for place, (other, (its, _)) in enumerate(found.items()):
            if other != name and same_classes(run.networks[name], run.networks[other]):
                _, mine, theirs = np.intersect1d(
                    answers.image_ids, its.image_ids, return_indices=True
                )
                denied[place, mine] = answers.class_ids[mine] != its.class_ids[theirs]
        known = np.isfinite(denied).sum(0)
        others = np.where(known > 0, np.nansum(denied, 0) / np.maximum(known, 1), np.nan)
        found[name] = answers._replace(others=others), rows
    return found


_COLUMNS = (
    *("image_id", "label", "class_id", "class_name", "probability", "heatmap"),
    *("view_x0", "view_y0", "view_x1", "view_y1"),
)


def _read(
    run: Run, network: str, image_ids: np.ndarray, objects: TrueBoxes | None
) -> tuple[Answers, pa.Table]:
    claimant, top = judge(run, network), pc.field("rank") == 1
    table = run.explanations(
        network, claimant.method, _COLUMNS, top, image_ids, layer=claimant.layer
    ).to_table()
    rows = table.sort_by("image_id")
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
    return answers, maps.rows


def _contributions(run: Run, network: str, image_ids: np.ndarray) -> Contributions | None:
    """Of the channels to the top classes of images, by rising image id."""
    names = ["channel_ids", "channel_contributions", "channel_cells"]
    found = run.predictions(network, ["image_id", *names], pc.field("rank") == 1, image_ids)
    if found is None:
        return None
    rows = found.to_table().sort_by("image_id")
    columns = (rows[name].combine_chunks().flatten().to_numpy() for name in names)
    return Contributions(*(column.reshape(len(rows), -1) for column in columns))


@lru_cache(maxsize=1)
def _opened(path: str) -> Run:
    """A run, opened once in each process."""
    return open_run(path)
