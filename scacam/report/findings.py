"""The section of the report about what the audit job found and left in `OUT/metrics`."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.audit.kinds import KINDS
from scacam.report.gallery import Gallery, share, small_map
from scacam.report.html import Picture
from scacam.runs.results import Run

__all__ = ["Shortcut", "pictured", "shortcuts"]

_STRIP, _LISTED, _TOLD = 5, 10, 12

_Rows = list[dict[str, Any]]


class Shortcut(NamedTuple):
    """What the audit says of a network.

    Attributes:
        told: the findings that stand out, in words.
        more: how many more there are.
        suspects: the images most likely right for the wrong reason.
        first: the finding of the class whose answers owe most to one component, if any do.
        most, least: images of that class, those that owe most to it and least.
    """

    told: list[str]
    more: int
    suspects: _Rows
    first: dict[str, Any] | None
    most: _Rows
    least: _Rows

    @property
    def image_ids(self) -> list[int]:
        """The images that are shown."""
        return [row["image_id"] for row in (*self.suspects, *self.most, *self.least)]

    @property
    def hanging(self) -> int:
        """How many answers of that class would not be confident without the component."""
        return 0 if self.first is None else round(self.first["share"] * self.first["images"])


def shortcuts(run: Run) -> dict[str, Shortcut]:
    """By network, what the audit job found; nothing where it has not run."""
    findings, suspects = run.metrics("findings"), run.metrics("suspects")
    if findings is None or suspects is None:
        return {}
    found = {}
    for network in run.networks:
        of_network = pc.field("network") == network
        rows = findings.to_table(filter=of_network).sort_by("finding").to_pylist()
        out = [_told(row) for row in rows if row["stands_out"]]
        listed = suspects.to_table(filter=of_network)
        first = next((row for row in rows if row["kind"] == "component"), None)
        most: _Rows = []
        least: _Rows = []
        if first is not None:
            own = listed.filter(pc.field("class_id") == first["class_id"])
            order = np.argsort(-own["fall"].to_numpy(), kind="stable")
            size = min(_STRIP, (len(order) + 1) // 2)
            most = own.take(pa.array(order[:size])).to_pylist()
            least = own.take(pa.array(order[size:][::-1][:size])).to_pylist()
        found[network] = Shortcut(
            out[:_TOLD],
            len(out[_TOLD:]),
            listed.slice(0, _LISTED).to_pylist(),
            first,
            most,
            least,
        )
    return found


def pictured(found: Shortcut | None, gallery: Gallery, claimant: str) -> dict[str, Any] | None:
    """The same with its images, drawn with the maps of a claimant."""
    if found is None:
        return None

    def strip(entries: _Rows) -> list[Picture]:
        pictures = []
        for entry in entries:
            row = gallery.top(entry["network"], entry["image_id"], claimant)
            without = max(entry["probability"] - entry["fall"], 0.0)
            falls = f"{share(entry['probability'])} → {share(without)} without it"
            pictures.append(gallery.overlay(row, [row["class_name"], falls]))
        return pictures

    return {
        "found": found,
        "suspects": strip(found.suspects),
        "most": [*_located(found.first), *strip(found.most)],
        "least": strip(found.least),
    }


def _located(first: dict[str, Any] | None) -> list[Picture]:
    """Where the component of a class lies, as a map."""
    if first is None:
        return []
    values = np.array(first["located"]).reshape(first["map_height"], first["map_width"])
    name = first["class_name"]
    lines = ["the component", "in these images"]
    return [small_map(values / (values.max() or 1), f"where the component of {name} lies", lines)]


def _told(row: dict[str, Any]) -> str:
    return (
        f"{row['class_name']} {KINDS[row['kind']].title}: {row['strength']:.1f} times the median "
        f"class [{row['ci_low']:.1f}, {row['ci_high']:.1f}]; {share(row['share'])} of "
        f"{row['images']:,} images are affected"
    )
