"""What the audit job left in `OUT/metrics`, as the report shows it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from scacam.audit.kinds import KINDS
from scacam.audit.passes import top_k
from scacam.report.gallery import Gallery, share, small_map
from scacam.report.html import Picture
from scacam.runs.results import Claimant, Run

__all__ = ["Audited", "ClassCard", "audited", "located"]

_STRIP, _LISTED, _TOLD = 5, 10, 12
_CARDS, _PER_CARD, _CLASSES = 5, 4, 100
_EVERY, _PAIRS = 12, 4

_Rows = list[dict[str, Any]]


@dataclass
class ClassCard:
    """A class that stands out, why, and the images that show it most."""

    row: dict[str, Any]
    told: list[str]
    image_ids: list[int]


@dataclass
class Audited:
    """What the audit says of a network.

    Attributes:
        classes: rows of `CLASSES`, the most frequent first.
        findings: rows of `FINDINGS`, those that stand out first, then by strength.
        suspects: the images most likely right for the wrong reason.
        cards: the classes that stand out.
        first: the finding of the class whose answers owe most to one component, if any do.
        most, least: suspects of that class, those that owe most to it and least.
        attention: rows of `ATTENTION`.
        agreement: rows of `AGREEMENT`, of its methods.
        k: so many classes of an image count as its top ones.
    """

    classes: _Rows
    findings: _Rows
    suspects: _Rows
    cards: list[ClassCard]
    attention: _Rows
    agreement: _Rows
    k: int
    first: dict[str, Any] | None = None
    most: _Rows = field(default_factory=list)
    least: _Rows = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many it explains."""
        return sum(row["images"] for row in self.classes)

    @property
    def labels(self) -> dict[str, Any] | None:
        """Top-1 and top-k error on the labelled images, None without labels."""
        images, right, in_top = (
            sum(row[name] for row in self.classes) for name in ("labelled", "right", "in_top")
        )
        if not images:
            return None
        return {
            "images": images, "k": self.k, "top_1": 1 - right / images, "top_k": 1 - in_top / images
        }  # fmt: skip

    @property
    def told(self) -> list[str]:
        """The findings that stand out of classes that have no card, in words."""
        return [_told(row) for row in self._out][:_TOLD]

    @property
    def more(self) -> int:
        """How many more there are."""
        return len(self._out[_TOLD:])

    @property
    def _out(self) -> _Rows:
        carded = {card.row["class_id"] for card in self.cards}
        out = (row for row in self.findings if row["stands_out"])
        return [row for row in out if row["class_id"] not in carded]

    @property
    def hanging(self) -> int:
        """How many answers of the class that owes most would not be confident without it."""
        return 0 if self.first is None else round(self.first["share"] * self.first["images"])

    @property
    def judged(self) -> int:
        """How many classes have a finding, weak as it may be."""
        return len({row["class_id"] for row in self.findings})

    def table(self) -> _Rows:
        """The classes with findings, the strongest first, with the strengths by kind."""
        cells: dict[int, dict[str, dict[str, Any]]] = {}
        for row in self.findings:
            cells.setdefault(row["class_id"], {})[row["kind"]] = row
        classes = {row["class_id"]: row for row in self.classes}
        shown = list(cells.items())[:_CLASSES]
        return [{**classes[class_id], "cells": found} for class_id, found in shown]

    @property
    def kinds(self) -> dict[str, str]:
        """The kinds of its findings with their titles."""
        found = {row["kind"] for row in self.findings}
        return {name: kind.title for name, kind in KINDS.items() if name in found}

    @property
    def furthest(self) -> dict[str, Any] | None:
        """The two methods that agree least."""
        known = [row for row in self.agreement if row["rank_correlation"] is not None]
        found = min(known, key=lambda row: row["rank_correlation"], default=None)
        return found and {**found, "furthest": found["furthest"][:_PAIRS]}

    def matrix(self, claimants: list[Claimant], column: str) -> np.ndarray:
        """A column of the agreement of methods, each with each; NaN where unknown."""
        places = {(each.method, each.layer): place for place, each in enumerate(claimants)}
        found = np.eye(len(claimants))
        for row in self.agreement:
            one = places[row["method"], row["layer"]]
            other = places[row["other_method"], row["other_layer"]]
            value = np.nan if row[column] is None else row[column]
            found[one, other] = found[other, one] = value
        return found

    def image_ids(self) -> list[int]:
        """The images that are shown."""
        listed = [*self.suspects, *self.most, *self.least]
        return [
            *(row["image_id"] for row in listed),
            *(image_id for card in self.cards for image_id in card.image_ids),
            *(self.classes[0]["confident"][:_EVERY] if self.classes else ()),
            *(self.furthest["furthest"] if self.furthest else ()),
        ]

    def suspected(self, rows: _Rows, gallery: Gallery, claimant: str) -> list[Picture]:
        """Suspects, drawn with the maps of a claimant."""
        pictures = []
        for entry in rows:
            without = max(entry["probability"] - entry["fall"], 0.0)
            falls = f"{share(entry['probability'])} → {share(without)} without it"
            for row in gallery.tops(entry["network"], entry["image_id"], [claimant]):
                pictures.append(gallery.overlay(row, [row["class_name"], falls]))
        return pictures


def audited(run: Run) -> tuple[dict[str, Audited], _Rows]:
    """What the audit says of each network, and of pairs of them; nothing where it has not run."""
    names = ("classes", "findings", "suspects", "attention", "agreement", "findings_images")
    found = [dataset for name in names if (dataset := run.metrics(name)) is not None]
    if len(found) < len(names):
        return {}, []
    *small, images = found
    classes, findings, suspects, attention, agreement = (dataset.to_table() for dataset in small)
    networks = {}
    for network in run.networks:
        of_network = pc.field("network") == network
        if not len(own := classes.filter(of_network)):
            continue
        rows = findings.filter(of_network).sort_by("finding").to_pylist()
        listed = suspects.filter(of_network)
        by_class = own.to_pylist()
        methods = agreement.filter(of_network & (pc.field("other_network") == network))
        one = Audited(
            by_class,
            rows,
            listed.slice(0, _LISTED).to_pylist(),
            _cards(by_class, rows, images),
            attention.filter(of_network).to_pylist(),
            methods.to_pylist(),
            top_k(run),
        )
        one.first = next((row for row in rows if row["kind"] == "component"), None)
        if one.first is not None:
            its = listed.filter(pc.field("class_id") == one.first["class_id"])
            order = np.argsort(-its["fall"].to_numpy(), kind="stable")
            size = min(_STRIP, (len(order) + 1) // 2)
            one.most = its.take(pa.array(order[:size])).to_pylist()
            one.least = its.take(pa.array(order[size:][::-1][:size])).to_pylist()
        networks[network] = one
    across = pc.field("network") != pc.field("other_network")
    pairs = agreement.filter(across).to_pylist()
    return networks, [{**row, "furthest": row["furthest"][:_PAIRS]} for row in pairs]


def _cards(classes: _Rows, findings: _Rows, images: ds.Dataset) -> list[ClassCard]:
    of_class: dict[int, _Rows] = {}
    for row in findings:
        if row["stands_out"]:
            of_class.setdefault(row["class_id"], []).append(row)
    by_id = {row["class_id"]: row for row in classes}
    cards = []
    for class_id, rows in list(of_class.items())[:_CARDS]:
        shown = images.to_table(filter=pc.field("finding") == rows[0]["finding"])
        ids = shown.sort_by([("score", "descending")])["image_id"].to_pylist()[:_PER_CARD]
        cards.append(ClassCard(by_id[class_id], [_told(row) for row in rows], ids))
    return cards


def located(row: dict[str, Any], column: str, lines: Iterable[str], top: float = 0) -> Picture:
    """A map that a row of a table holds, by itself, divided by its maximum or by another one."""
    values = np.array(row[column]).reshape(row["map_height"], row["map_width"])
    alt = f"{' '.join(lines)}: {row['class_name']}"
    return small_map(values / (top or values.max() or 1), alt, list(lines))


def _told(row: dict[str, Any]) -> str:
    return (
        f"{row['class_name']} {KINDS[row['kind']].title}: {row['strength']:.1f} times the median "
        f"class [{row['ci_low']:.1f}, {row['ci_high']:.1f}]; {share(row['share'])} of "
        f"{row['images']:,} images are affected"
    )
