"""The page about two runs: which predictions changed, and whose attention moved."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from scacam.audit.compare import Compared, pair_claimants, pair_networks
from scacam.audit.maps import Ranking, judge
from scacam.audit.shifts import MIN_IMAGES, Class, Shifts
from scacam.report.gallery import Gallery
from scacam.report.html import Picture, render
from scacam.runs.results import Run

__all__ = ["Summary"]

_LISTED, _SHOWN, _CLASSES = 24, 8, 15
_LIKENESS = ("moved", "rank_correlation", "box_iou")
_NETWORKS, _CLAIMANTS = ("network_a", "network_b"), ("method", "layer_a", "layer_b")


@dataclass
class _Row:
    """One pair of networks, by one method of two layers."""

    images: int = 0
    changed: float = 0
    outcomes: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), dtype=np.int64))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(3))
    known: np.ndarray = field(default_factory=lambda: np.zeros(3))

    @property
    def means(self) -> list[float]:
        """Of moved, rank correlation and overlap of boxes."""
        with np.errstate(invalid="ignore"):
            return (self.sums / self.known).tolist()


class Summary:
    """Adds up a comparison, table by table, and draws its page."""

    def __init__(self, first: Run, second: Run) -> None:
        self.runs = first, second
        self.claimants = {
            pair: {(one.method, one.layer, other.layer): (one, other) for one, other in claimants}
            for pair in pair_networks(first, second)
            if (claimants := pair_claimants(first, second, pair))
        }
        self.judges = {
            pair: next(
                (both for both in claimants.values() if both[0] == judge(first, pair[0])),
                next(iter(claimants.values())),
            )
            for pair, claimants in self.claimants.items()
        }
        self.rows: dict[tuple[str, str, str], _Row] = {}
        self.shifts = Shifts()
        self.changed, self.moved = Ranking(_LISTED), Ranking(_LISTED)

    def add(self, compared: Compared) -> None:
        """Add images of one pair of networks and of claimants."""
        table = compared.table
        if not len(table):
            return
        networks, claimants = (
            tuple(table[name][0].as_py() for name in names) for names in (_NETWORKS, _CLAIMANTS)
        )
        both = self.claimants[networks][claimants]
        row = self.rows.setdefault((*networks, both[0].name), _Row())
        changed = table["changed"].cast(pa.float64()).to_numpy()  # NaN: not to be compared
        alike = np.stack([table[name].to_numpy() for name in _LIKENESS]).astype(np.float64)
        row.images += len(table)
        row.changed += float(changed.sum())
        row.sums += np.nansum(alike, 1)
        row.known += np.isfinite(alike).sum(1)
        labels = table["label"].to_numpy()
        labelled = np.isfinite(labels) & np.isfinite(changed)
        right = [(table[f"class_id_{run}"].to_numpy() == labels)[labelled] for run in "ab"]
        np.add.at(row.outcomes, (right[0].astype(int), right[1].astype(int)), 1)
        if both == self.judges[networks]:
            self._rank(table, changed, alike[0])
            ids, names = table["class_id_a"].to_pylist(), table["class_name_a"].to_pylist()
            classes = [
                Class(networks, both[0].method, *each) for each in zip(ids, names, strict=True)
            ]
            self.shifts.add(classes, 1 - changed, alike[0], compared.shares)

    def _rank(self, table: pa.Table, changed: np.ndarray, moved: np.ndarray) -> None:
        confidence = np.minimum(*(table[f"probability_{run}"].to_numpy() for run in "ab"))
        self.changed.add(np.where(changed == 1, confidence, np.nan), table)
        self.moved.add(np.where(changed == 0, moved, np.nan), table)

    def told(self) -> list[str]:
        """In words, of each pair of networks: whose answers changed, and how far maps moved."""
        lines = []
        for networks, (one, _) in self.judges.items():
            row = self.rows.get((*networks, one.name))
            if row is None:
                continue
            words = [f"{' and '.join(dict.fromkeys(networks))}: {row.images:,} images"]
            if np.isfinite(row.changed):
                words.append(f"{row.changed / row.images:.1%} say something else")
            if labelled := row.outcomes.sum():
                before, after = row.outcomes[1].sum(), row.outcomes[:, 1].sum()
                words.append(f"right {before / labelled:.1%} before, {after / labelled:.1%} after")
            if row.known[0]:
                words.append(f"{row.means[0]:.1%} of the map of {one.method} lies elsewhere")
            lines.append(", ".join(words))
        return lines

    def page(self) -> str:
        """The page, as HTML."""
        galleries = [Gallery(run) for run in self.runs]
        shown = self.changed.entries[:_SHOWN], self.moved.entries[:_SHOWN]
        for entry in [*shown[0], *shown[1]]:
            for gallery, run in zip(galleries, "ab", strict=True):
                gallery.want(entry[f"network_{run}"], [entry[f"image_id_{run}"]])
        for gallery in galleries:
            gallery.load()
        classes = self.shifts.table().to_pylist()
        return render(
            "comparison.html",
            {
                "runs": self.runs,
                "method": next(iter(self.judges.values()))[0].method,
                "judges": {pair: one.name for pair, (one, _) in self.judges.items()},
                "rows": self.rows,
                "comparable": any(np.isfinite(row.changed) for row in self.rows.values()),
                "classes": classes[:_CLASSES],
                "tested": len(classes),
                "elsewhere": [row["class_name"] for row in classes if row["elsewhere"]],
                "min_images": MIN_IMAGES,
                "changed": [self._pair(galleries, entry) for entry in shown[0]],
                "moved": [self._pair(galleries, entry) for entry in shown[1]],
                "changed_entries": self.changed.entries,
                "moved_entries": self.moved.entries,
            },
        )

    def _pair(self, galleries: list[Gallery], entry: dict[str, Any]) -> list[Picture]:
        """One image as both runs see it."""
        pictures = []
        judges = self.judges[entry["network_a"], entry["network_b"]]
        for gallery, run, claimant in zip(galleries, "ab", judges, strict=True):
            row = gallery.top(entry[f"network_{run}"], entry[f"image_id_{run}"], claimant.name)
            lines = [f"{run.upper()}: {gallery.title(row)}", gallery.truth(row)]
            if not entry["changed"]:
                lines.append(f"moved {entry['moved']:.0%}")
            pictures.append(gallery.overlay(row, lines))
        return pictures
