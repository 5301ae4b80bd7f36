"""The maps of the top classes of a run, and the few rows that matter most."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.evaluation.truth import TrueBoxes
from scacam.runs.results import Claimant, Run
from scacam.tables import stacked

__all__ = ["Ranking", "TopMaps", "judge", "top_maps", "true_boxes"]


class TopMaps(NamedTuple):
    """The heatmaps of the top class of N images, by one network, layer and method.

    Attributes:
        rows: the other columns of these explanations, by rising image id.
        heatmaps: float32 `[N, h, w]`, signed, before any ReLU, the largest magnitude of each 1.
    """

    rows: pa.Table
    heatmaps: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One column as an array; what is null is NaN."""
        return self.rows[name].to_numpy()

    def rectangles(self, kind: str) -> np.ndarray:
        """`view` or `box` as float32 `[N, 4]`: x0, y0, x1, y1; NaN where there is none."""
        corners = [f"{kind}_{side}" for side in ("x0", "y0", "x1", "y1")]
        return stacked(self.rows, corners).astype(np.float32)

    def of(self, image_ids: np.ndarray) -> "TopMaps":
        """Only these images, which must be among them, in this order."""
        places = np.searchsorted(self.column("image_id"), image_ids)
        return TopMaps(self.rows.take(places), self.heatmaps[places])


class Ranking:
    """The few rows with the largest scores of however many are added."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: list[dict[str, Any]] = []

    def add(self, scores: np.ndarray, rows: pa.Table, **columns: np.ndarray) -> None:
        """Add N rows with their scores and further columns; those with NaN scores do not count."""
        known = np.flatnonzero(np.isfinite(scores))
        best = known[np.argsort(-scores[known], kind="stable")[: self.size]]
        for place, row in zip(best, rows.take(best).to_pylist(), strict=True):
            extra = {name: float(values[place]) for name, values in columns.items()}
            self.entries.append({**row, "score": float(scores[place]), **extra})
        self.entries.sort(key=lambda entry: -entry["score"])
        del self.entries[self.size :]


def judge(run: Run, network: str) -> Claimant:
    """Whose maps count, where one has to be chosen: `sca_cam` of the target layer if there is one.

    It weighs evidence for the class. `extent_cam` localizes better, for it shows the extent of the
    object even where that is not what the class was found by, so it does not judge.
    """
    target = run.networks[network]["target_layer"]
    claimants = run.claimants(network)
    return min(
        claimants,
        key=lambda each: (
            each.method == "extent_cam",
            each.layer != target,
            each.method != "sca_cam",
        ),
    )


def top_maps(run: Run, network: str, image_ids: np.ndarray) -> dict[str, TopMaps]:
    """Read the heatmaps of the top class of some images, by the name of what claims them.

    No method or layer may be missing; images that are not in the run are left out.
    """
    if not len(image_ids):
        return {}
    top = pc.field("rank") == 1
    found = {}
    claimants = run.claimants(network)
    for layer in run.networks[network]["layers"]:
        table = run.explanations(network, where=top, image_ids=image_ids, layer=layer).to_table()
        for claimant in claimants:
            if claimant.layer == layer:
                rows = table.filter(pc.field("method") == claimant.method).sort_by("image_id")
                packed = rows["heatmap"].combine_chunks()
                values = packed.storage.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
                found[claimant.name] = TopMaps(
                    rows.drop_columns("heatmap"), values.reshape(len(rows), *claimant.map_shape)
                )
    return found


def true_boxes(run: Run, image_ids: Sequence[int] | None = None) -> TrueBoxes | None:
    """Where the objects of a run's images, or of some, are, if it was evaluated against boxes."""
    dataset = run.metrics("localization_boxes")
    if dataset is None:
        return None
    some = None if image_ids is None else pc.field("image_id").isin(list(image_ids))
    return TrueBoxes.from_table(dataset.to_table(filter=some).sort_by("image_id"))
