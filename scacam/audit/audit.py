"""What to worry about in a run: images and classes that a network may get right for a wrong reason.

One pass over the heatmaps of the top classes, a few thousand images in memory at a time; what
remains of it are sums per class and short lists of images.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np

from scacam.audit.attention import (
    BORDER_AREA,
    CORNER_AREA,
    border_cells,
    corner_cells,
    coverage,
    fixed_place,
    outside,
)
from scacam.audit.likeness import energy, flattened, likeness, standard_ranks
from scacam.audit.maps import Ranking, TopMaps, judge, top_maps
from scacam.evaluation.sweep import iou
from scacam.evaluation.truth import TrueBoxes
from scacam.runs.record import same_classes
from scacam.runs.results import Claimant, Run

__all__ = [
    "MIN_IMAGES",
    "Audit",
    "ClassAudit",
    "NetworkAudit",
    "PairAudit",
    "audit",
]

MIN_IMAGES = 5
"""Images that a class needs before anything is said of it."""

_AT_ONCE = 4096
_LISTED = 24
_CONFIDENT = 0.5


@dataclass
class ClassAudit:
    """What one network does where it predicts one class. NaN is unknown.

    Attributes:
        images: how many predictions there are.
        right: share of them that the labels confirm.
        probability: their mean probability.
        border, corner: mean share of the heatmap at the border and in the corners.
        fixed: how much of what sets its maps apart is the same in all of them (`fixed_place`).
        outside: mean of `outside` over images whose objects are known.
        mean_map: `[h, w]`, the mean of its maps, each with sum 1.
    """

    class_id: int
    class_name: str
    images: int
    right: float
    probability: float
    border: float
    corner: float
    fixed: float
    outside: float
    mean_map: np.ndarray

    @property
    def worries(self) -> dict[str, float]:
        """What is odd about the class and how much, each from 0, as expected by chance, to 1."""
        found = {
            "outside": 2 * self.outside - 1,
            "fixed": 2 * self.fixed - 1,
            "corner": (self.corner - CORNER_AREA) / (1 - CORNER_AREA),
            "border": (self.border - BORDER_AREA) / (1 - BORDER_AREA),
        }
        return {name: value for name, value in found.items() if value > 0}


@dataclass
class NetworkAudit:
    """What the audit found for one network.

    Attributes:
        network: its name.
        images: how many images it explains.
        judge: whose maps count, where one has to be chosen (`scacam.audit.maps.judge`).
        methods: the names of its methods, in the order of the next ones.
        border, corner: mean share of the heatmap at the border and in the corners, per method.
        correlation, iou: mean rank correlation of maps and IoU of boxes, `[methods, methods]`.
        classes: those with enough images, the most worrying first.
        suspects: images most likely right for the wrong reason: of the confident predictions, and
            where there are labels of the right ones, those that look away from the object; where
            no objects are known, those that look at the border.
        disputed: images about which the methods agree least.
        largest: the class that it predicts most often.
    """

    network: str
    images: int
    judge: Claimant
    methods: list[str]
    border: np.ndarray
    corner: np.ndarray
    correlation: np.ndarray
    iou: np.ndarray
    classes: list[ClassAudit]
    suspects: list[dict[str, Any]]
    disputed: list[dict[str, Any]]
    largest: ClassAudit | None


@dataclass
class PairAudit:
    """What the audit found for two networks.

    Attributes:
        networks: their names.
        method: the method whose maps were compared, of both target layers.
        images: how many images both explain.
        same: share of them with the same top class; NaN where a class id does not mean the same to
            both networks.
        moved, correlation, iou: means over those, as in `scacam.audit.likeness.Likeness`.
        apart: images with the same top class that the networks look at most differently.
    """

    networks: tuple[str, str]
    method: str
    images: int
    same: float
    moved: float
    correlation: float
    iou: float
    apart: list[dict[str, Any]]


@dataclass
class Audit:
    """What the audit found in a run.

    Attributes:
        networks: by name.
        pairs: of every two networks with images in common.
    """

    networks: dict[str, NetworkAudit]
    pairs: list[PairAudit]


def audit(run: Run, objects: TrueBoxes | None = None) -> Audit:
    """Look through the maps of the top classes of all images of a run.

    Args:
        run: the run.
        objects: where the objects are, for the images that have boxes.

    Raises:
        RunError: the run cannot be read.
    """
    networks = {name: _NetworkPass(run, name, objects) for name in run.networks}
    judges = {name: part.judge for name, part in networks.items()}
    pairs = [
        _PairPass(
            pair, judges[pair[0]].method, same_classes(*(run.networks[name] for name in pair))
        )
        for pair in combinations(networks, 2)
        if judges[pair[0]].method == judges[pair[1]].method
    ]
    for start in range(0, len(run.image_ids), _AT_ONCE):
        ids = run.image_ids[start : start + _AT_ONCE]
        found = {name: top_maps(run, name, ids) for name in networks}
        for name, maps in found.items():
            networks[name].add(maps)
        for pair in pairs:
            first, second = (found[name].get(judges[name].name) for name in pair.networks)
            pair.add(first, second)
    return Audit(
        {name: part.result() for name, part in networks.items()},
        [pair.result() for pair in pairs if pair.images],
    )


_SUMS = (
    "images",
    "labelled",
    "right",
    "probability",
    "mapped",
    "border",
    "corner",
    "squares",
    "located",
    "outside",
)


class _NetworkPass:
    """Gathers what `NetworkAudit` says, a part of the images at a time."""

    def __init__(self, run: Run, network: str, objects: TrueBoxes | None) -> None:
        self.network = network
        claimants = run.claimants(network)
        self.methods = [each.name for each in claimants]
        self.judge = judge(run, network)
        self.objects = objects
        shapes = [each.map_shape for each in claimants]
        self.edge_cells = {
            shape: np.stack([border_cells(*shape), corner_cells(*shape)]) for shape in shapes
        }
        self.finest = max(shapes, key=np.prod)
        classes = run.networks[network]["num_classes"]
        self.sums = np.zeros((classes, len(_SUMS)))
        self.totals = np.zeros((classes, *self.judge.map_shape))
        self.names: dict[int, str] = {}
        count = len(self.methods)
        self.edges, self.mapped = np.zeros((count, 2)), np.zeros(count)
        self.alike, self.compared = np.zeros((2, count, count)), np.zeros((2, count, count))
        self.suspects, self.disputed = Ranking(_LISTED), Ranking(_LISTED)

    def add(self, found: dict[str, TopMaps]) -> None:
        """Add the maps of some images."""
        if found and len(found[self.judge.name].rows):
            self._add_methods(found)
            self._add_classes(found[self.judge.name])

    def _add_methods(self, found: dict[str, TopMaps]) -> None:
        ids = reduce(np.intersect1d, [maps.column("image_id") for maps in found.values()])
        all_maps = [found[name].of(ids) for name in self.methods]
        ranks = np.stack([standard_ranks(flattened(m.heatmaps, self.finest)) for m in all_maps])
        boxes = np.stack([maps.rectangles("box") for maps in all_maps])
        alike = np.stack(
            [np.einsum("anp,bnp->abn", ranks, ranks), iou(boxes[:, None], boxes[None])]
        )
        self.alike += np.nansum(alike, -1)
        self.compared += np.isfinite(alike).sum(-1)
        for index, maps in enumerate(all_maps):
            shares = energy(maps.heatmaps)
            self.edges[index] += np.einsum("nhw,ehw->e", shares, self.edge_cells[shares.shape[1:]])
            self.mapped[index] += shares.any((1, 2)).sum()
        count = len(self.methods)
        if count > 1:
            others = alike[0][~np.eye(count, dtype=bool)].mean(0)
            self.disputed.add(1 - others, found[self.judge.name].of(ids).rows)

    def _add_classes(self, maps: TopMaps) -> None:
        classes, labels = maps.column("class_id"), maps.column("label").astype(np.float64)
        probability = maps.column("probability").astype(np.float64)
        shares = energy(maps.heatmaps)
        mapped, labelled = shares.any((1, 2)), np.isfinite(labels)
        border, corner = np.einsum("nhw,ehw->en", shares, self.edge_cells[shares.shape[1:]])
        away = np.full(len(classes), np.nan)
        if self.objects is not None:
            away = outside(shares, coverage(self.objects, maps))
        columns = {
            "images": np.ones(len(classes)),
            "labelled": labelled,
            "right": labels == classes,
            "probability": probability,
            "mapped": mapped,
            "border": border,
            "corner": corner,
            "squares": (shares**2).sum((1, 2)),
            "located": np.isfinite(away),
            "outside": np.nan_to_num(away),
        }
        np.add.at(self.sums, classes, np.stack([columns[name] for name in _SUMS], axis=1))
        np.add.at(self.totals, classes, shares)
        self.names |= dict(zip(classes.tolist(), maps.rows["class_name"].to_pylist(), strict=True))
        score = probability * (border if self.objects is None else away)
        doubtful = (probability < _CONFIDENT) | (labelled & (labels != classes))
        score[doubtful | ~mapped] = np.nan
        self.suspects.add(score, maps.rows, border=border, outside=away)

    def result(self) -> NetworkAudit:
        """What was gathered."""
        with np.errstate(invalid="ignore", divide="ignore"):
            border, corner = (self.edges / self.mapped[:, None]).T
            alike = self.alike / self.compared
        usual = self._usual_map()
        classes = [self._class(class_id, usual) for class_id in sorted(self.names)]
        enough = [found for found in classes if found.images >= MIN_IMAGES]
        enough.sort(key=lambda found: -max(found.worries.values(), default=0.0))
        return NetworkAudit(
            network=self.network,
            images=int(self.sums[:, 0].sum()),
            judge=self.judge,
            methods=self.methods,
            border=border,
            corner=corner,
            correlation=alike[0],
            iou=alike[1],
            classes=enough,
            suspects=self.suspects.entries,
            disputed=self.disputed.entries,
            largest=max(classes, key=lambda found: found.images, default=None),
        )

    def _usual_map(self) -> np.ndarray:
        """The median over classes of their mean maps, so that one odd class moves it little."""
        mapped = self.sums[:, _SUMS.index("mapped")]
        some = np.flatnonzero(mapped)
        if not len(some):
            return np.zeros(self.totals.shape[1:])
        return np.median(self.totals[some] / mapped[some, None, None], axis=0)

    def _class(self, class_id: int, usual: np.ndarray) -> ClassAudit:
        sums = dict(zip(_SUMS, self.sums[class_id].tolist(), strict=True))
        total, mapped = self.totals[class_id], sums["mapped"]
        fixed = float("nan")
        if mapped >= MIN_IMAGES:
            fixed = fixed_place(total, sums["squares"], int(mapped), usual)
        return ClassAudit(
            class_id=class_id,
            class_name=self.names[class_id],
            images=int(sums["images"]),
            right=_share(sums["right"], sums["labelled"]),
            probability=_share(sums["probability"], sums["images"]),
            border=_share(sums["border"], mapped),
            corner=_share(sums["corner"], mapped),
            fixed=fixed,
            outside=_share(sums["outside"], sums["located"]),
            mean_map=total / max(mapped, 1),
        )


class _PairPass:
    """Gathers what `PairAudit` says, a part of the images at a time."""

    def __init__(self, networks: tuple[str, str], method: str, comparable: bool) -> None:
        self.networks, self.method, self.comparable = networks, method, comparable
        self.images = 0
        self.sums, self.known = np.zeros(3), np.zeros(3)
        self.same = 0
        self.apart = Ranking(_LISTED)

    def add(self, first: TopMaps | None, second: TopMaps | None) -> None:
        """Add the maps of some images by both networks."""
        if first is None or second is None:
            return
        ids = np.intersect1d(first.column("image_id"), second.column("image_id"))
        first, second = first.of(ids), second.of(ids)
        alike = np.stack(likeness(first, second))
        same = self.comparable & (first.column("class_id") == second.column("class_id"))
        self.images += len(ids)
        self.same += int(same.sum())
        self.sums += np.nansum(alike, 1)
        self.known += np.isfinite(alike).sum(1)
        self.apart.add(np.where(same, alike[0], np.nan), first.rows, moved=alike[0])

    def result(self) -> PairAudit:
        """What was gathered."""
        moved, correlation, iou = map(_share, self.sums.tolist(), self.known.tolist())
        return PairAudit(
            networks=self.networks,
            method=self.method,
            images=self.images,
            same=_share(self.same, self.images) if self.comparable else float("nan"),
            moved=moved,
            correlation=correlation,
            iou=iou,
            apart=self.apart.entries,
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
