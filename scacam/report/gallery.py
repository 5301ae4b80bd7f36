"""The few explanations of a run that a page shows, and their pictures.

What has maps is called by its name in `scacam.runs.results.Claimant`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from scacam.audit.maps import true_boxes
from scacam.drawing import TRUTH, colours, draw_box, fit, grey
from scacam.evaluation.truth import TrueBoxes
from scacam.inputs.containers import Place
from scacam.report.html import Picture, encoded
from scacam.runs.results import Row, Run

__all__ = ["Gallery", "share", "small_map"]

_SIZE, _THUMBNAIL = 260, 120


class Gallery:
    """Collects which images are wanted, reads their explanations in one go, and draws them.

    Attributes:
        objects: where the objects of these images are, if that is known and to be drawn.
        missing: uris of photos that could not be read.
    """

    def __init__(self, run: Run, *, with_objects: bool = False) -> None:
        """Draw from a run, and with its objects, if it was evaluated against boxes, these."""
        self.run, self.with_objects = run, with_objects
        self.objects: TrueBoxes | None = None
        self.missing: set[str] = set()
        self._wanted: dict[str, set[int]] = {name: set() for name in run.networks}
        self._rows: dict[tuple[str, int], list[Row]] = {}
        self._places: dict[int, Place] = {}
        self._photos: dict[int, Image.Image] = {}
        self._names: dict[tuple[str, int], str] = {}

    def want(self, network: str, image_ids: Iterable[int]) -> None:
        """Ask for all explanations of these images by a network."""
        self._wanted[network].update(image_ids)

    def load(self) -> None:
        """Read what was asked for."""
        every = sorted(set().union(*self._wanted.values()))
        self._places = self.run.images.places(every)
        if self.with_objects:
            self.objects = true_boxes(self.run, every)
        for network, wanted in self._wanted.items():
            found = self.run.explanations(network, image_ids=sorted(wanted))
            names = {(each.layer, each.method): each.name for each in self.run.claimants(network)}
            for batch in found.to_batches():
                for row in batch.to_pylist():
                    row["claimant"] = names[row["layer"], row["method"]]
                    self._rows.setdefault((network, row["image_id"]), []).append(row)
                    self._names[network, row["class_id"]] = row["class_name"]

    def rows(self, network: str, image_id: int, claimant: str) -> list[Row]:
        """The explanations of an image by a claimant: its classes by rank, the label last."""
        found = self._rows.get((network, image_id), [])
        rows = [row for row in found if row["claimant"] == claimant]
        return sorted(rows, key=lambda row: row["rank"] or len(rows))

    def tops(self, network: str, image_id: int, claimants: Iterable[str]) -> list[Row]:
        """The explanations of the top class of an image by several claimants."""
        rows = [row for name in claimants for row in self.rows(network, image_id, name)]
        return [row for row in rows if row["rank"] == 1]

    def top(self, network: str, image_id: int, claimant: str) -> Row:
        """The explanation of the top class of an image by one claimant."""
        return self.tops(network, image_id, [claimant])[0]

    def name(self, network: str, class_id: int) -> str:
        """The name of a class, as far as the explanations read say it."""
        return self._names.get((network, class_id), f"class {class_id}")

    def title(self, row: Row) -> str:
        """What the network said and how sure it was."""
        return f"{row['class_name']} {share(row['probability'])}"

    def truth(self, row: Row) -> str:
        """Whether that is right; nothing without a label."""
        if row["label"] is None:
            return ""
        if row["label"] == row["class_id"]:
            return "✓ right"
        return f"✗ label: {self.name(row['network'], row['label'])}"

    def photo(self, row: Row, lines: Sequence[str] = ()) -> Picture:
        """The photo alone."""
        name = basename(row["uri"])
        return encoded(self._photo(row), f"the photo {name}", [name, *lines])

    def overlay(self, row: Row, lines: Sequence[str] = (), maximum: float | None = None) -> Picture:
        """The heatmap of a row over its photo."""
        alt = (
            f"{row['claimant']} of {row['network']} for {row['class_name']} over "
            f"{basename(row['uri'])}"
        )
        picture = self.run.overlay(row, self._photo(row), maximum)
        if self.objects is not None:
            scale = picture.width / row["width"], picture.height / row["height"]
            for box in self.objects.of(row["image_id"]):
                draw_box(picture, (box * np.tile(scale, 2)).tolist(), TRUTH, dashed=True)
        return encoded(picture, alt, lines)

    def _photo(self, row: Row) -> Image.Image:
        image_id = row["image_id"]
        if image_id not in self._photos:
            photo = self.run.photo(row, self._places.get(image_id))
            if photo is None:
                self.missing.add(row["uri"])
                photo = grey(row["width"], row["height"])
            self._photos[image_id] = fit(photo, _SIZE, _SIZE)
        return self._photos[image_id]


def small_map(values: np.ndarray, alt: str, lines: Sequence[str]) -> Picture:
    """A map `[h, w]` by itself, from 0 to 1, enlarged."""
    height, width = values.shape
    small = Image.fromarray(colours(values))
    scale = _THUMBNAIL / max(height, width)
    large = small.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    return encoded(large, alt, lines)


def share(part: float) -> str:
    """A share in words, so that a small one is not none."""
    return f"{part:.0%}" if part == 0 or part >= 0.01 else f"{part:.1%}"


def basename(uri: str) -> str:
    """The last component of a uri."""
    return uri.rstrip("/").rpartition("/")[2]
