"""The report of a run: what ran, where the networks looked, and what to worry about.

It samples, so that neither its size nor its memory grows with the run.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.audit.attention import BORDER_AREA, CORNER_AREA
from scacam.audit.audit import MIN_IMAGES, Audit, ClassAudit, NetworkAudit, PairAudit, audit
from scacam.audit.components import MIN_IMAGES as ENOUGH
from scacam.audit.likeness import flattened, standard_ranks
from scacam.audit.maps import true_boxes
from scacam.errors import RunError
from scacam.evaluation.truth import TrueBoxes
from scacam.report.faithfulness import faithfulness, least_faithful
from scacam.report.findings import pictured, shortcuts
from scacam.report.gallery import Gallery, share, small_map
from scacam.report.html import Picture, render
from scacam.report.sections import (
    best_and_worst,
    class_activation_weights,
    localization,
)
from scacam.runs.results import Row, Run

__all__ = ["report"]

_SPREAD, _MATRIX, _LOPSIDED = 3, 48, 20
_RANKED, _PAIRS, _ENDS, _OF_CLASS, _PER_CLASS = 10, 4, 5, 12, 4
_LOCALIZER = "extent_cam"
_CLASSES_SHOWN, _CLASSES_LISTED, _ERRORS_LISTED = 5, 100, 20


def report(run: Run) -> str:
    """Look through a run and describe it as one HTML page.

    Raises:
        RunError: the run cannot be read, or nothing in it was explained.
    """
    objects = true_boxes(run)
    found = audit(run, objects)
    if not any(network.images for network in found.networks.values()):
        raise RunError(f"{run.path}: no image was explained; its errors say why")
    return render("report.html", _Content(run, found, objects).all())


class _Content:
    """What the template of the report is filled with."""

    def __init__(self, run: Run, found: Audit, objects: TrueBoxes | None) -> None:
        self.run, self.found = run, found
        self.networks = [network for network in found.networks.values() if network.images]
        self.gallery = Gallery(run, objects)
        self.spread = self._spread()
        self.examples = {network.network: self._examples(network) for network in self.networks}
        self.ends = {
            network.network: best_and_worst(run, network.network, network.judge, _ENDS)
            for network in self.networks
        }
        self.least = {
            network.network: least_faithful(run, network.network, network.judge, _ENDS)
            for network in self.networks
        }
        self.shortcuts = shortcuts(run)
        for network in self.networks:
            if network.network in self.shortcuts:
                self.gallery.want(network.network, self.shortcuts[network.network].image_ids)
            listed = network.suspects[:_RANKED] + network.disputed[:_PAIRS]
            listed += self.least[network.network]
            listed += [entry for end in self.ends[network.network] for entry in end]
            self.gallery.want(network.network, [*self.spread, *_ids(listed)])
            for image_ids in self.examples[network.network].values():
                self.gallery.want(network.network, image_ids)
        for pair in found.pairs:
            for name in pair.networks:
                self.gallery.want(name, _ids(pair.apart[:_PAIRS]))
        self.gallery.load()

    def all(self) -> dict[str, Any]:
        """Everything, by the names that the template uses."""
        content = {
            "path": self.run.path,
            "config": self.run.config,
            "networks": [self._network(network) for network in self.networks],
            "reasons": Counter(self.run.errors["error"].to_pylist()).most_common(),
            "errors": self.run.errors.slice(0, _ERRORS_LISTED).to_pylist(),
            "same_image": [
                image for image in map(self._same_image, self.spread) if image["panels"]
            ],
            "weights": class_activation_weights(self.run),
            "localization": localization(self.run),
            "faithfulness": faithfulness(self.run),
            "pairs": [self._pair(pair) for pair in self.found.pairs],
            "border_area": BORDER_AREA,
            "corner_area": CORNER_AREA,
            "min_images": MIN_IMAGES,
            "enough": ENOUGH,
            "classes_listed": _CLASSES_LISTED,
            "objects": self.gallery.objects is not None,
        }
        return content | {"notices": self._notices()}

    def _spread(self) -> list[int]:
        """Images evenly spaced through those explained, few enough for all methods' pictures."""
        pictures = sum(len(network.methods) for network in self.networks)
        count = max(1, min(_SPREAD, _MATRIX // pictures))
        ids = np.setdiff1d(self.run.image_ids, self.run.errors["image_id"].to_numpy())
        places = np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)
        return ids[places].tolist()

    def _examples(self, network: NetworkAudit) -> dict[int, list[int]]:
        """Images of the classes that are shown, the most confident ones, by class."""
        wanted = {entry.class_id: _PER_CLASS for entry in _worrying(network)}
        if network.largest is not None:
            wanted[network.largest.class_id] = _OF_CLASS
        rows = self.run.explanations(
            network.network,
            network.judge.method,
            ["image_id", "class_id", "probability"],
            (pc.field("rank") == 1) & pc.field("class_id").isin(pa.array(list(wanted), pa.int32())),
            layer=network.judge.layer,
        )
        best: dict[int, list[tuple[float, int]]] = {class_id: [] for class_id in wanted}
        for batch in rows.to_batches():
            for image_id, class_id, probability in zip(
                *(c.to_pylist() for c in batch), strict=True
            ):
                heapq.heappush(best[class_id], (probability, -image_id))
                if len(best[class_id]) > wanted[class_id]:
                    heapq.heappop(best[class_id])
        return {
            class_id: [-image_id for _, image_id in sorted(pairs, reverse=True)]
            for class_id, pairs in best.items()
        }

    def _notices(self) -> list[str]:
        """What a reader must know before believing anything."""
        config, notices = self.run.config, []
        if config.get("status") != "complete":
            notices.append(f"This run is {config.get('status')}, not complete.")
        images = len(self.run.image_ids)
        for name in self.run.networks:
            missing = images - len(self.run.errors) - self.found.networks[name].images
            if missing:
                notices.append(
                    f"{missing:,} of {images:,} images have neither explanations "
                    f"of {name} nor an error: shards are missing."
                )
        notices += [
            f"{name} has random weights: it shows what its architecture does, nothing that it "
            "learned."
            for name, network in self.run.networks.items()
            if network["weights"] == "random"
        ]
        for network in self.networks:
            largest = network.largest
            if largest and network.images >= _LOPSIDED and largest.images > network.images / 2:
                part = share(largest.images / network.images)
                notices.append(
                    f"{network.network} says {largest.class_name} of {part} of the images."
                )
        if self.gallery.missing:
            notices.append(
                f"{len(self.gallery.missing)} of the photos shown could not be read; their "
                f"heatmaps stand on grey. The first is {min(self.gallery.missing)}."
            )
        return notices

    def _network(self, network: NetworkAudit) -> dict[str, Any]:
        """One network: what it is, its classes, its suspects, its methods."""
        one_class = network.largest if network.largest and network.largest.images > 1 else None
        return {
            "audit": network,
            "config": self.run.networks[network.network],
            "labels": self._labels(network),
            "worrying": self._cards(network),
            "top_classes": self._top_classes(network, self.spread[0]),
            "one_class": one_class,
            "images_of_class": self._images_of_class(network, one_class) if one_class else [],
            "suspects": [self._ranked(network, entry) for entry in network.suspects[:_RANKED]],
            "ends": [self._localized(network, end) for end in self.ends[network.network]],
            "least": [self._least(network, entry) for entry in self.least[network.network]],
            "shortcut": pictured(
                self.shortcuts.get(network.network), self.gallery, network.judge.name
            ),
            "disputed": [self._disputed(network, entry) for entry in network.disputed[:_PAIRS]],
        }

    def _labels(self, network: NetworkAudit) -> dict[str, Any] | None:
        """Top-1 and top-5 error on the labelled images, None without labels."""
        k = min(5, int(self.run.config["top_k"]))
        rows = self.run.explanations(
            network.network,
            network.judge.method,
            ["label", "class_id", "rank"],
            (pc.field("label") >= 0) & (pc.field("rank") <= k),
            layer=network.judge.layer,
        )
        images = top_1 = top_k = 0
        for batch in rows.to_batches():
            label, class_id, rank = (column.to_numpy() for column in batch)
            right = label == class_id
            images += int(np.count_nonzero(rank == 1))
            top_1 += int(np.count_nonzero(right & (rank == 1)))
            top_k += int(np.count_nonzero(right))
        if not images:
            return None
        return {"images": images, "top_1": 1 - top_1 / images, "k": k, "top_k": 1 - top_k / images}

    def _cards(self, network: NetworkAudit) -> list[dict[str, Any]]:
        """The classes to look at first."""
        shown = _worrying(network)
        top = max((float(entry.mean_map.max()) for entry in shown), default=1.0)
        cards = []
        for entry in shown:
            image_ids = self.examples[network.network][entry.class_id][:_PER_CLASS]
            rows = [self.gallery.top(network.network, i, network.judge.name) for i in image_ids]
            cards.append(
                {
                    "audit": entry,
                    "worries": [_WORRIES[name](entry) for name in entry.worries],
                    "mean": _mean_map(entry, top),
                    "pictures": [self._example(row) for row in rows],
                    "entries": rows,
                }
            )
        return cards

    def _example(self, row: Row, maximum: float | None = None) -> Picture:
        lines = [share(row["probability"]), self.gallery.truth(row)]
        return self.gallery.overlay(row, lines, maximum)

    def _same_image(self, image_id: int) -> dict[str, Any]:
        """One image through every method and network."""
        panels = []
        photo = None
        for network in self.networks:
            found = self.gallery.tops(network.network, image_id, _in_order(network))
            if found:
                photo = photo or self.gallery.photo(found[0])
                panels.append(
                    {
                        "network": network.network,
                        "said": self.gallery.title(found[0]),
                        "truth": self.gallery.truth(found[0]),
                        "pictures": [self.gallery.overlay(row, [row["claimant"]]) for row in found],
                    }
                )
        return {"photo": photo, "panels": panels}

    def _top_classes(self, network: NetworkAudit, image_id: int) -> dict[str, list[Picture]]:
        """The top classes of one image, each claimant on one scale: the judge, and extent_cam."""
        found = {}
        for claimant in dict.fromkeys((network.judge.name, _LOCALIZER)):
            rows = self.gallery.rows(network.network, image_id, claimant)
            top = self._common_maximum(rows)
            pictures = [self.gallery.overlay(row, [self.gallery.title(row)], top) for row in rows]
            if pictures:
                found[claimant] = pictures
        return found

    def _images_of_class(self, network: NetworkAudit, shown: ClassAudit) -> list[Picture]:
        """Many images of one class, on one scale."""
        image_ids = self.examples[network.network][shown.class_id]
        rows = [self.gallery.top(network.network, i, network.judge.name) for i in image_ids]
        top = self._common_maximum(rows)
        return [self._example(row, top) for row in rows]

    def _common_maximum(self, rows: Iterable[Row]) -> float:
        return max((float(self.run.heatmap(row).max()) for row in rows), default=0.0)

    def _ranked(self, network: NetworkAudit, entry: dict[str, Any]) -> Picture:
        """An image most likely right for the wrong reason."""
        row = self.gallery.top(network.network, entry["image_id"], network.judge.name)
        if np.isfinite(entry["outside"]):
            why = f"{_density(entry['outside'])} off the object as on it"
        else:
            why = f"{entry['border']:.0%} of the map at the border"
        return self.gallery.overlay(row, [self.gallery.title(row), why, self.gallery.truth(row)])

    def _localized(self, network: NetworkAudit, entries: list[dict[str, Any]]) -> list[Picture]:
        """Images by how well the map of the labelled class finds the object."""
        pictures = []
        for entry in entries:
            for row in self.gallery.rows(network.network, entry["image_id"], network.judge.name):
                if row["class_id"] == entry["class_id"]:
                    lines = [row["class_name"], f"best overlap {entry['iou_any']:.0%}"]
                    pictures.append(self.gallery.overlay(row, lines))
        return pictures

    def _least(self, network: NetworkAudit, entry: dict[str, Any]) -> Picture:
        """An image whose map is least faithful."""
        row = self.gallery.top(network.network, entry["image_id"], network.judge.name)
        why = f"insertion {entry['insertion_auc']:.0%}, deletion {entry['deletion_auc']:.0%}"
        return self.gallery.overlay(row, [self.gallery.title(row), why, self.gallery.truth(row)])

    def _disputed(self, network: NetworkAudit, entry: dict[str, Any]) -> list[Picture]:
        """The two methods that agree least about an image."""
        rows = self.gallery.tops(network.network, entry["image_id"], network.methods)
        maps = [self.run.heatmap(row) for row in rows]
        finest = max((heatmap.shape for heatmap in maps), key=np.prod)
        flat = standard_ranks(np.concatenate([flattened(m[None], finest) for m in maps]))
        alike = np.nan_to_num(flat @ flat.T, nan=1.0)
        pair = min(combinations(range(len(rows)), 2), key=lambda pair: alike[pair])
        return [
            self.gallery.overlay(
                rows[index], [rows[index]["claimant"], f"rank correlation {alike[pair]:.2f}"]
            )
            for index in pair
        ]

    def _pair(self, pair: PairAudit) -> dict[str, Any]:
        """Two networks: how alike they look at the same images."""
        pictures = []
        for entry in pair.apart[:_PAIRS]:
            rows = [
                self.gallery.top(name, entry["image_id"], self.found.networks[name].judge.name)
                for name in pair.networks
            ]
            pictures.append(
                [
                    self.gallery.overlay(
                        row,
                        [row["network"], self.gallery.title(row), f"moved {entry['moved']:.0%}"],
                    )
                    for row in rows
                ]
            )
        return {"audit": pair, "pictures": pictures}


def _in_order(network: NetworkAudit) -> list[str]:
    """The methods of a network, the one that localizes beside the one that judges."""
    judge = network.judge.name
    order = {name: index for index, name in enumerate(network.methods)}
    return sorted(order, key=lambda name: order[judge] + 0.5 if name == _LOCALIZER else order[name])


_WORRIES = {
    "outside": lambda entry: f"its maps are {_density(entry.outside)} off the object as on it",
    "fixed": lambda entry: f"it looks at one fixed place: its maps are {entry.fixed:.0%} alike",
    "corner": lambda entry: f"{entry.corner:.0%} of its maps lies in the corners",
    "border": lambda entry: f"{entry.border:.0%} of its maps lies at the border",
}


def _density(outside: float) -> str:
    """How many times as dense maps are off the object as on it."""
    return (
        "over 20 × as dense" if outside > 20 / 21 else f"{outside / (1 - outside):.1f} × as dense"
    )


def _worrying(network: NetworkAudit) -> list[ClassAudit]:
    return [entry for entry in network.classes if entry.worries][:_CLASSES_SHOWN]


def _ids(entries: Sequence[dict[str, Any]]) -> list[int]:
    return [entry["image_id"] for entry in entries]


def _mean_map(entry: ClassAudit, top: float) -> Picture:
    """The mean map of a class, on the scale of those beside it."""
    alt = f"the mean map of {entry.class_name}"
    return small_map(entry.mean_map / top, alt, [f"mean of {entry.images:,}"])
