"""The report of a run: what ran, where the networks looked, and what to worry about.

It reads the tables that other jobs left and a few images, so that neither its size nor its time or
memory grows with the run.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from scacam.audit.attention import BORDER_AREA, CORNER_AREA
from scacam.audit.components import MIN_IMAGES
from scacam.audit.maps import judge
from scacam.errors import RunError
from scacam.report.audit import Audited, ClassCard, audited, located
from scacam.report.faithfulness import faithfulness, least_faithful
from scacam.report.gallery import Gallery, share
from scacam.report.html import Picture, render
from scacam.report.sections import (
    best_and_worst,
    class_activation_weights,
    localization,
)
from scacam.runs.results import Row, Run

__all__ = ["report"]

_SPREAD, _MATRIX, _LOPSIDED = 3, 48, 20
_ENDS, _OF_CLASS = 5, 12
_LOCALIZER = "extent_cam"
_ERRORS_LISTED = 20


def report(run: Run) -> str:
    """Describe a run and what was found in it as one HTML page.

    Raises:
        RunError: the run cannot be read, or nothing in it was explained.
    """
    if len(run.errors) >= run.images.count:
        raise RunError(f"{run.path}: no image was explained; its errors say why")
    return render("report.html", _Content(run).all())


class _Content:
    """What the template of the report is filled with."""

    def __init__(self, run: Run) -> None:
        """Of a run in which some image has no error."""
        self.run = run
        self.networks = list(run.networks)
        self.judges = {name: judge(run, name) for name in self.networks}
        self.audited, self.pairs = audited(run)
        self.gallery = Gallery(run, with_objects=True)
        self.spread = self._spread()
        judges = self.judges.items()
        self.ends = {name: best_and_worst(run, name, each, _ENDS) for name, each in judges}
        self.least = {name: least_faithful(run, name, each, _ENDS) for name, each in judges}
        for name in self.networks:
            listed = [*self.least[name], *(entry for end in self.ends[name] for entry in end)]
            self.gallery.want(name, [*self.spread, *(entry["image_id"] for entry in listed)])
            if name in self.audited:
                self.gallery.want(name, self.audited[name].image_ids())
        for pair in self.pairs:
            for name in (pair["network"], pair["other_network"]):
                self.gallery.want(name, pair["furthest"])
        self.gallery.load()

    def all(self) -> dict[str, Any]:
        """Everything, by the names that the template uses."""
        content = {
            "path": self.run.path,
            "config": self.run.config,
            "networks": [self._network(name) for name in self.networks],
            "reasons": Counter(self.run.errors["error"].to_pylist()).most_common(),
            "errors": self.run.errors.slice(0, _ERRORS_LISTED).to_pylist(),
            "same_image": [
                image for image in map(self._same_image, self.spread) if image["panels"]
            ],
            "weights": class_activation_weights(self.run),
            "localization": localization(self.run),
            "faithfulness": faithfulness(self.run),
            "audited": bool(self.audited),
            "pairs": [self._pair(pair) for pair in self.pairs],
            "border_area": BORDER_AREA,
            "corner_area": CORNER_AREA,
            "min_images": MIN_IMAGES,
            "objects": self.gallery.objects is not None,
        }
        return content | {"notices": self._notices()}

    def _spread(self) -> list[int]:
        """Images evenly spaced through those explained, few enough for all methods' pictures."""
        pictures = sum(len(self.run.claimants(name)) for name in self.networks)
        count = max(1, min(_SPREAD, _MATRIX // pictures))
        failed = np.sort(self.run.errors["image_id"].to_numpy())
        last = self.run.images.count - len(failed) - 1
        places = np.linspace(0, last, min(count, last + 1)).round().astype(int)
        # The i-th that failed has so many before it that did not.
        return (places + np.searchsorted(failed - np.arange(len(failed)), places, "right")).tolist()

    def _notices(self) -> list[str]:
        """What a reader must know before believing anything."""
        config, notices = self.run.config, []
        if config.get("status") != "complete":
            notices.append(f"This run is {config.get('status')}, not complete.")
        if not self.audited:
            notices.append(
                "This run has not been audited: scacam audit says what to worry about in it, and "
                "this page then shows it."
            )
        images = self.run.images.count
        for name, found in self.audited.items():
            missing = images - len(self.run.errors) - found.images
            if missing:
                notices.append(
                    f"{missing:,} of {images:,} images have neither an error nor explanations of "
                    f"{name} that were audited: shards are missing, or the run has gone on since."
                )
        notices += [
            f"{name} has random weights: it shows what its architecture does, nothing that it "
            "learned."
            for name, network in self.run.networks.items()
            if network["weights"] == "random"
        ]
        for name, found in self.audited.items():
            largest = found.classes[0]
            if found.images >= _LOPSIDED and largest["images"] > found.images / 2:
                part = share(largest["images"] / found.images)
                notices.append(f"{name} says {largest['class_name']} of {part} of the images.")
        if self.gallery.missing:
            notices.append(
                f"{len(self.gallery.missing)} of the photos shown could not be read; their "
                f"heatmaps stand on grey. The first is {min(self.gallery.missing)}."
            )
        return notices

    def _network(self, name: str) -> dict[str, Any]:
        """One network: what it is, its classes, its suspects, its methods."""
        claimant = self.judges[name].name
        return {
            "name": name,
            "judge": claimant,
            "config": self.run.networks[name],
            "top_classes": self._top_classes(name, self.spread[0]),
            "ends": [self._localized(name, end) for end in self.ends[name]],
            "least": self._pictures(
                name,
                {entry["image_id"]: entry for entry in self.least[name]},
                lambda row, entry: [
                    self.gallery.title(row),
                    f"insertion {entry['insertion_auc']:.0%}, deletion {entry['deletion_auc']:.0%}",
                    self.gallery.truth(row),
                ],
            ),
            "audit": self.audited.get(name),
        } | (self._audited(name, self.audited[name]) if name in self.audited else {})

    def _audited(self, name: str, found: Audited) -> dict[str, Any]:
        """What the audit found, with pictures."""
        claimant = self.judges[name].name
        largest = found.classes[0] if found.classes[0]["images"] > 1 else None
        claimants = self.run.claimants(name)
        names = {(each.method, each.layer): each.name for each in claimants}
        component = [] if found.first is None else [
            located(found.first, "located", ["the component", "in these images"])
        ]  # fmt: skip
        return {
            "suspects": found.suspected(found.suspects, self.gallery, claimant),
            "most": [*component, *found.suspected(found.most, self.gallery, claimant)],
            "fewest": found.suspected(found.least, self.gallery, claimant),
            "cards": self._cards(name, found.cards),
            "one_class": largest,
            "images_of_class": self._images_of_class(name, largest) if largest else [],
            "methods": [each.name for each in claimants],
            "correlation": found.matrix(claimants, "rank_correlation"),
            "iou": found.matrix(claimants, "box_iou"),
            "attention": [(names[row["method"], row["layer"]], row) for row in found.attention],
            "disputed": self._disputed(name, found.furthest, names) if found.furthest else [],
        }

    def _pictures(
        self, name: str, entries: dict[int, Any], words: Callable[[Row, Any], Sequence[str]]
    ) -> list[Picture]:
        """The maps that judge of images, by their ids, as far as they are there."""
        return [
            self.gallery.overlay(row, words(row, entry))
            for image_id, entry in entries.items()
            for row in self.gallery.tops(name, image_id, [self.judges[name].name])
        ]

    def _cards(self, name: str, cards: Sequence[ClassCard]) -> list[dict[str, Any]]:
        """The classes that stand out, their mean maps on one scale."""
        top = max((max(card.row["map"]) for card in cards), default=1.0)
        return [
            {
                "card": card,
                "mean": located(card.row, "map", [f"mean of {card.row['images']:,}"], top),
                "pictures": self._pictures(
                    name,
                    dict.fromkeys(card.image_ids),
                    lambda row, _: [share(row["probability"]), self.gallery.truth(row)],
                ),
            }
            for card in cards
        ]

    def _same_image(self, image_id: int) -> dict[str, Any]:
        """One image through every method and network."""
        panels = []
        photo = None
        for name in self.networks:
            found = self.gallery.tops(name, image_id, self._in_order(name))
            if found:
                photo = photo or self.gallery.photo(found[0])
                panels.append(
                    {
                        "network": name,
                        "said": self.gallery.title(found[0]),
                        "truth": self.gallery.truth(found[0]),
                        "pictures": [self.gallery.overlay(row, [row["claimant"]]) for row in found],
                    }
                )
        return {"photo": photo, "panels": panels}

    def _in_order(self, name: str) -> list[str]:
        """What has maps of a network, the one that localizes beside the one that judges."""
        order = {each.name: place for place, each in enumerate(self.run.claimants(name))}
        beside = order[self.judges[name].name] + 0.5
        return sorted(order, key=lambda one: beside if one == _LOCALIZER else order[one])

    def _top_classes(self, network: str, image_id: int) -> dict[str, list[Picture]]:
        """The top classes of one image, each claimant on one scale: the judge, and extent_cam."""
        found = {}
        for claimant in dict.fromkeys((self.judges[network].name, _LOCALIZER)):
            rows = self.gallery.rows(network, image_id, claimant)
            top = self._common_maximum(rows)
            pictures = [self.gallery.overlay(row, [self.gallery.title(row)], top) for row in rows]
            if pictures:
                found[claimant] = pictures
        return found

    def _images_of_class(self, name: str, shown: dict[str, Any]) -> list[Picture]:
        """Many images of one class, on one scale."""
        claimant = [self.judges[name].name]
        found = [self.gallery.tops(name, i, claimant) for i in shown["confident"][:_OF_CLASS]]
        rows = [row for few in found for row in few]
        top = self._common_maximum(rows)
        words = [[share(row["probability"]), self.gallery.truth(row)] for row in rows]
        return [self.gallery.overlay(*each, top) for each in zip(rows, words, strict=True)]

    def _common_maximum(self, rows: Iterable[Row]) -> float:
        return max((float(self.run.heatmap(row).max()) for row in rows), default=0.0)

    def _localized(self, name: str, entries: list[dict[str, Any]]) -> list[Picture]:
        """Images by how well the map of the labelled class finds the object."""
        pictures = []
        for entry in entries:
            for row in self.gallery.rows(name, entry["image_id"], self.judges[name].name):
                if row["class_id"] == entry["class_id"]:
                    lines = [row["class_name"], f"best overlap {entry['iou_any']:.0%}"]
                    pictures.append(self.gallery.overlay(row, lines))
        return pictures

    def _disputed(
        self, name: str, found: dict[str, Any], names: dict[tuple[str, str], str]
    ) -> list[list[Picture]]:
        """The images about which the two methods that agree least do so."""
        both = (found["method"], found["layer"]), (found["other_method"], found["other_layer"])
        claimants = [names[each] for each in both]
        rows = [self.gallery.tops(name, image_id, claimants) for image_id in found["furthest"]]
        return [[self.gallery.overlay(row, [row["claimant"]]) for row in few] for few in rows]

    def _pair(self, pair: dict[str, Any]) -> dict[str, Any]:
        """Two networks: how alike they look at the same images."""
        networks = pair["network"], pair["other_network"]
        pictures = []
        for image_id in pair["furthest"]:
            rows = [
                row
                for name in networks
                for row in self.gallery.tops(name, image_id, [self.judges[name].name])
            ]
            words = [[row["network"], self.gallery.title(row)] for row in rows]
            pictures.append(list(map(self.gallery.overlay, rows, words)))
        return {"row": pair, "networks": networks, "pictures": pictures}
