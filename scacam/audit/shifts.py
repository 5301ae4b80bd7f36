"""Which classes a network looks at elsewhere after a change, beyond what chance makes of it.

The maps of a class are averaged over its images, before and after. Two halves of the images of one
run have different averages as well, since their objects lie elsewhere: that is the yardstick.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

__all__ = ["MIN_IMAGES", "SHIFTS", "Class", "Shifts"]

MIN_IMAGES = 10
"""Of a class of which anything is said: fewer have no distribution to speak of."""

_CELLS = 8
_DRAWS = 9999
_RATE = 0.05
_SEED = 0
_INTERVAL = 1.96

SHIFTS = pa.schema(
    [
        ("network_a", pa.string()),
        ("network_b", pa.string()),
        ("method", pa.string()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("images", pa.int64()),
        ("same", pa.float64()),
        ("moved", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("shift", pa.float64()),
        ("chance", pa.float64()),
        ("p_value", pa.float64()),
        ("elsewhere", pa.bool_()),
    ]
)
"""One row per class that the first run predicts: how many of its images have the same class in the
second; the mean of `moved` over images with its 95 % interval; the `shift` of the mean map, the
share of it that lies elsewhere; how large that is between two halves of one run, at most, in 95 of
100 divisions (`chance`); the share of divisions with as large a one; and whether that is a finding,
at a false discovery rate of 5 % over all classes."""


class Class(NamedTuple):
    """A class as the first of two runs predicts it."""

    networks: tuple[str, str]
    method: str
    class_id: int
    name: str


@dataclass
class _Sums:
    """Over the images of a class. Maps are flat, `[cells]`, and products `[cells, cells]`."""

    images: int = 0
    same: float = 0
    moved: np.ndarray = field(default_factory=lambda: np.zeros(3))
    maps: np.ndarray = field(default_factory=lambda: np.zeros((2, _CELLS**2)))
    products: np.ndarray = field(default_factory=lambda: np.zeros((_CELLS**2, _CELLS**2)))


class Shifts:
    """Adds up the maps of classes, and says which of them have shifted."""

    def __init__(self) -> None:
        self._sums: dict[Class, _Sums] = {}

    def add(
        self, classes: Sequence[Class], same: np.ndarray, moved: np.ndarray, shares: np.ndarray
    ) -> None:
        """Add N images.

        Args:
            classes: of each.
            same: whether the second run says the same: 1, 0, or NaN where that has no meaning.
            moved: as of `audit.likeness.Likeness`; NaN where a map is empty.
            shares: the positive maps of both runs, each with sum 1: `[2, N, 2 · 8, 2 · 8]`.
        """
        coarse = shares.reshape(2, -1, _CELLS, 2, _CELLS, 2).sum((3, 5)).reshape(2, -1, _CELLS**2)
        places: dict[Class, list[int]] = {}
        for place, each in enumerate(classes):
            places.setdefault(each, []).append(place)
        for each, chosen in places.items():
            sums = self._sums.setdefault(each, _Sums())
            known = np.array(chosen)[np.isfinite(moved[chosen])]
            sums.images += len(chosen)
            sums.same += float(same[chosen].sum())
            sums.moved += [len(known), moved[known].sum(), (moved[known] ** 2).sum()]
            sums.maps += coarse[:, known].sum(1)
            sums.products += sum(maps.T @ maps for maps in coarse[:, known]) / 2

    def table(self) -> pa.Table:
        """All classes with enough images, as in `SHIFTS`: those that shifted, by the most moved."""
        rows = list(self._rows())
        found = _discovered([row["p_value"] for row in rows])
        rows = [{**row, "elsewhere": bool(one)} for row, one in zip(rows, found, strict=True)]
        rows.sort(key=lambda row: (not row["elsewhere"], -row["moved"]))
        return pa.Table.from_pylist(rows, SHIFTS)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for each, sums in self._sums.items():
            count = sums.moved[0]
            if count < MIN_IMAGES:
                continue
            mean = sums.moved[1] / count
            spread = np.sqrt(max(0.0, sums.moved[2] / count - mean**2) / count)
            means = sums.maps / count
            shift = np.abs(means[0] - means[1]).sum() / 2
            halves = _between_halves(sums.products / count, means, int(count))
            yield {
                "network_a": each.networks[0],
                "network_b": each.networks[1],
                "method": each.method,
                "class_id": each.class_id,
                "class_name": each.name,
                "images": sums.images,
                "same": sums.same / sums.images,
                "moved": mean,
                "ci_low": mean - _INTERVAL * spread,
                "ci_high": mean + _INTERVAL * spread,
                "shift": shift,
                "chance": float(np.quantile(halves, 0.95)),
                "p_value": (1 + int((halves >= shift).sum())) / (1 + _DRAWS),
            }


def _between_halves(products: np.ndarray, means: np.ndarray, count: int) -> np.ndarray:
    """Shifts between random halves of the images of one run, `[draws]`.

    By the central limit theorem: the difference of the means of two halves is normal, and has four
    times the covariance of the maps, divided by their number.
    """
    covariance = products - sum(np.outer(mean, mean) for mean in means) / 2
    values, vectors = np.linalg.eigh(covariance * 4 / count)
    deviations = vectors * np.sqrt(values.clip(min=0))
    drawn = np.random.default_rng(_SEED).standard_normal((_DRAWS, len(values)))
    return np.abs(drawn @ deviations.T).sum(1) / 2


def _discovered(p_values: Sequence[float]) -> np.ndarray:
    """Which of several tests are findings (Benjamini and Hochberg 1995)."""
    order = np.argsort(p_values)
    limits = _RATE * np.arange(1, len(order) + 1) / max(len(order), 1)
    below = np.flatnonzero(np.asarray(p_values)[order] <= limits)
    found = np.zeros(len(order), dtype=bool)
    found[order[: below[-1] + 1 if len(below) else 0]] = True
    return found
