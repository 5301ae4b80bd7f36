"""Arrow schemas of what an evaluation leaves in `OUT/metrics`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from scacam.evaluation.measures import MEASURES
from scacam.tables import claimant_names

__all__ = ["CURVES", "DIFFERENCES", "IMAGE_SCORES", "LOCALIZATION", "TRUE_BOXES", "named", "placed"]

Row = Mapping[str, Any]

LOCALIZATION = pa.schema(
    [
        ("network", pa.string()),
        ("layer", pa.string()),
        ("method", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("images", pa.int64()),
        ("thresholds", pa.list_(pa.float64())),
    ]
)
"""Metrics as fractions, with 95 % intervals. Of metrics whose thresholds are the best on the data
set: these thresholds, as shares of the maximum. Baselines have no layer, here as in all tables."""

DIFFERENCES = pa.schema(
    [
        ("network", pa.string()),
        ("metric", pa.string()),
        ("layer", pa.string()),
        ("method", pa.string()),
        ("other_layer", pa.string()),
        ("other", pa.string()),
        ("difference", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("images", pa.int64()),
    ]
)
"""The metric of a method minus that of another on the same images, with paired intervals."""

CURVES = pa.schema(
    [
        ("network", pa.string()),
        ("layer", pa.string()),
        ("method", pa.string()),
        ("metric", pa.string()),
        ("iou", pa.float64()),
        ("threshold", pa.float64()),
        ("accuracy", pa.float64()),
    ]
)
"""The share of images with a right box, over the threshold on the map, by the overlap wanted."""

IMAGE_SCORES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("class_id", pa.int32()),
        ("method", pa.string()),
        ("layer", pa.string()),
        ("top1", pa.bool_()),
        ("iou", pa.float64()),
        ("iou_any", pa.float64()),
        *((name, pa.float64()) for name in MEASURES),
    ]
)
"""How one method localizes one image: whether the top class is the labelled one; the best overlap
of the largest contour's box and of any contour's, at the thresholds of `max_box_acc` and of
`max_box_acc_v2` at IoU 0.5; the measures of `scacam.evaluation.measures.MEASURES`."""

TRUE_BOXES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("x0", pa.float64()),
        ("y0", pa.float64()),
        ("x1", pa.float64()),
        ("y1", pa.float64()),
    ]
)
"""The true boxes that a run was evaluated against, one row per object, by image id."""


def named(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Other rows of a network with its methods, and what they are compared with, by their names.

    As `claimant_names` has them. Tables of before runs had layers say nothing of them.

    Args:
        rows: as in `LOCALIZATION`: all that was measured of the network.
        others: these, or rows of another table.
    """
    names = claimant_names((row.get("layer"), row["method"]) for row in rows)
    found: list[Row] = []
    for other in others:
        row = {**other, "method": names[other.get("layer"), other["method"]]}
        if "other" in row:
            row["other"] = names[row.get("other_layer"), row["other"]]
        found.append(row)
    return found


def placed(
    network: str, rows: Iterable[Row], claimants: Mapping[str, tuple[str | None, str]]
) -> list[Row]:
    """Rows in which claimants have their names, as they are in tables: the reverse of `named`.

    Args:
        network: whose they are.
        rows: with `method`, and perhaps `other`.
        claimants: by name their layer and method.
    """
    found: list[Row] = []
    for row in rows:
        layer, method = claimants[row["method"]]
        of_table = {"network": network, **row, "layer": layer, "method": method}
        if "other" in row:
            of_table["other_layer"], of_table["other"] = claimants[row["other"]]
        found.append(of_table)
    return found
