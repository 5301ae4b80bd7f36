"""Where the maps of all methods lie, and how alike those of methods and of networks are.

All methods are read for that, and their cells ranked, so it is found out from a sample of images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from scacam.audit.attention import border_cells, corner_cells
from scacam.audit.likeness import energy, flattened, likeness, standard_ranks
from scacam.audit.maps import TopMaps, judge, top_maps
from scacam.audit.passes import LISTED, Best, Opening
from scacam.evaluation.sweep import iou
from scacam.runs.record import same_classes
from scacam.runs.results import Claimant, Run

__all__ = ["AGREEMENT", "ATTENTION", "Agreement", "Compare", "Pair", "pairs", "sample"]

AGREEMENT = pa.schema(
    [
        ("network", pa.string()),
        ("method", pa.string()),
        ("layer", pa.string()),
        ("other_network", pa.string()),
        ("other_method", pa.string()),
        ("other_layer", pa.string()),
        ("images", pa.int64()),
        ("same", pa.float64()),
        ("moved", pa.float64()),
        ("rank_correlation", pa.float64()),
        ("box_iou", pa.float64()),
        ("furthest", pa.list_(pa.int64())),
    ]
)
"""One row per two methods of a network, and per two networks by the method that judges both: means
over images of what is in `likeness.Likeness`, null where unknown, and the images whose maps are
the least alike. Of networks also the share of images with the same top class, null where a class id
does not mean the same to both, and `furthest` are of these; of methods `moved` is null."""

ATTENTION = pa.schema(
    [
        ("network", pa.string()),
        ("method", pa.string()),
        ("layer", pa.string()),
        ("images", pa.int64()),
        ("border", pa.float64()),
        ("corner", pa.float64()),
    ]
)
"""One row per network, method and layer: the mean share of the positive map at the border and in
the corners, over so many images whose map is not zero."""

_STRETCH, _STRETCHES = 256, 16


def sample(images: int) -> list[np.ndarray]:
    """The ids of at most 4,096 of so many images, in stretches evenly spaced.

    So few shards have to be opened.
    """
    parts = max(1, -(-images // _STRETCH))
    chosen = np.linspace(0, parts - 1, min(parts, _STRETCHES)).round().astype(int).tolist()
    return [np.arange(images * part // parts, images * (part + 1) // parts) for part in chosen]


class Pair(NamedTuple):
    """Two methods of a network, or two networks: what claims the maps that are compared."""

    networks: tuple[str, str]
    claimants: tuple[Claimant, Claimant]

    @property
    def of_networks(self) -> bool:
        """Whether they are of two networks."""
        return self.networks[0] != self.networks[1]


def pairs(run: Run) -> list[Pair]:
    """All pairs of methods of each network, and all of networks that one method judges."""
    found = [
        Pair((name, name), both)
        for name in run.networks
        for both in combinations(run.claimants(name), 2)
    ]
    for one, other in combinations(run.networks, 2):
        judges = judge(run, one), judge(run, other)
        if judges[0].method == judges[1].method:
            found.append(Pair((one, other), judges))
    return found


@dataclass
class Agreement:
    """Sums over images; those of several parts add.

    Attributes:
        edges: `[claimants, 3]`, over those of all networks: how many maps are not zero, and their
            shares at the border and in the corners.
        images: `[pairs, 2]`, how many both explain, and of how many they say the same.
        sums, known: `[pairs, 3]`, of the fields of `Likeness`, and of how many images.
        furthest: of each pair the images that are least alike.
    """

    edges: np.ndarray
    images: np.ndarray
    sums: np.ndarray
    known: np.ndarray
    furthest: Best

    @classmethod
    def merge(cls, parts: Iterable["Agreement"]) -> "Agreement":
        """The sum of at least one."""
        every = list(parts)

        def total(name: str) -> np.ndarray:
            return np.sum([getattr(part, name) for part in every], axis=0)

        furthest = Best.joined([part.furthest for part in every], LISTED)
        return cls(total("edges"), total("images"), total("sums"), total("known"), furthest)

    def tables(self, run: Run) -> tuple[pa.Table, pa.Table]:
        """As in `AGREEMENT` and `ATTENTION`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self.sums / self.known
            same = self.images[:, 1] / self.images[:, 0]
            edges = self.edges[:, 1:] / self.edges[:, :1]
        alike = []
        for place, pair in enumerate(pairs(run)):
            one, other = pair.claimants
            comparable = pair.of_networks and _comparable(run, pair)
            alike.append(
                (
                    *(pair.networks[0], one.method, one.layer),
                    *(pair.networks[1], other.method, other.layer),
                    int(self.images[place, 0]),
                    _known(same[place]) if comparable else None,
                    *map(_known, means[place]),
                    self.furthest.image_ids[self.furthest.groups == place].tolist(),
                )
            )
        lie = [
            (name, each.method, each.layer) for name in run.networks for each in run.claimants(name)
        ]
        of_maps = [
            (*named, int(count), *map(_known, shares))
            for named, count, shares in zip(lie, self.edges[:, 0], edges, strict=True)
        ]
        return _table(alike, AGREEMENT), _table(of_maps, ATTENTION)


@dataclass(frozen=True)
class Compare:
    """Compares the maps of some images of a run."""

    opening: Opening

    def __call__(self, image_ids: np.ndarray) -> Agreement:
        """What they add."""
        run = self.opening.run()
        maps = {name: top_maps(run, name, image_ids) for name in run.networks}
        edges = [_edges(maps[name][each.name]) for name in maps for each in run.claimants(name)]
        ranked = {name: _Ranked.of(run.claimants(name), found) for name, found in maps.items()}
        every = pairs(run)
        images, sums, known = (np.zeros((len(every), size)) for size in (2, 3, 3))
        parts = []
        for place, pair in enumerate(every):
            if pair.of_networks:
                first, second = (
                    maps[name][each.name]
                    for name, each in zip(pair.networks, pair.claimants, strict=True)
                )
                ids = np.intersect1d(first.column("image_id"), second.column("image_id"))
                first, second = first.of(ids), second.of(ids)
                alike = np.stack(likeness(first, second))
                same = first.column("class_id") == second.column("class_id")
                same &= _comparable(run, pair)
                apart = np.where(same, alike[0], np.nan)
            else:
                ids, alike = ranked[pair.networks[0]].alike(pair.claimants)
                same = np.zeros(len(ids), dtype=bool)
                apart = 1 - alike[1]
            images[place] = len(ids), same.sum()
            sums[place], known[place] = np.nansum(alike, 1), np.isfinite(alike).sum(1)
            some = np.isfinite(apart)
            groups = np.full(some.sum(), place)
            parts.append(Best(groups, ids[some], apart[some, None].astype(np.float64)))
        empty = np.zeros(0, dtype=np.int64)
        parts.append(Best(empty, empty, np.zeros((0, 1))))
        return Agreement(np.stack(edges), images, sums, known, Best.joined(parts, LISTED))


class _Ranked(NamedTuple):
    """The maps of all methods of a network of the same images, ranked on the finest grid."""

    image_ids: np.ndarray
    ranks: dict[Claimant, np.ndarray]
    boxes: dict[Claimant, np.ndarray]

    @classmethod
    def of(cls, claimants: Sequence[Claimant], maps: dict[str, TopMaps]) -> "_Ranked":
        """Of the images of which all methods have maps."""
        ids = reduce(np.intersect1d, [found.column("image_id") for found in maps.values()])
        finest = max((each.map_shape for each in claimants), key=np.prod)
        every = {each: maps[each.name].of(ids) for each in claimants}
        ranks = {
            each: standard_ranks(flattened(found.heatmaps, finest)) for each, found in every.items()
        }
        return cls(ids, ranks, {each: found.rectangles("box") for each, found in every.items()})

    def alike(self, claimants: tuple[Claimant, Claimant]) -> tuple[np.ndarray, np.ndarray]:
        """The images, and the likeness of two methods: `[3, N]`, what is not asked for NaN."""
        one, other = claimants
        correlation = (self.ranks[one] * self.ranks[other]).sum(-1)
        overlap = iou(self.boxes[one], self.boxes[other])
        nothing = np.full(len(correlation), np.nan)
        return self.image_ids, np.stack([nothing, correlation, overlap])


def _edges(maps: TopMaps) -> np.ndarray:
    shares = energy(maps.heatmaps)
    cells = np.stack([part(*shares.shape[1:]) for part in (border_cells, corner_cells)])
    return np.array([shares.any((1, 2)).sum(), *np.einsum("nhw,ehw->e", shares, cells)])


def _comparable(run: Run, pair: Pair) -> bool:
    return same_classes(*(run.networks[name] for name in pair.networks))


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _table(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ((),) * len(schema)
    return pa.table([list(column) for column in columns], schema=schema)
