"""Arrow schemas of what a pass over a run leaves in `OUT/metrics`."""

import pyarrow as pa

from scacam.evaluation.tables import DIFFERENCES, LOCALIZATION
from scacam.trials.metrics import CURVES, METRICS

__all__ = [
    "ERRORS",
    "FAITHFULNESS",
    "FAITHFULNESS_CURVES",
    "FAITHFULNESS_DIFFERENCES",
    "IMAGE_FAITHFULNESS",
    "PASS",
    "images_folder",
]

PASS = "faithfulness"
"""The folder of the pass below `OUT/metrics`: its record, its manifest, its errors."""

ERRORS = f"{PASS}/errors"

FAITHFULNESS = pa.schema([field for field in LOCALIZATION if field.name != "thresholds"])
"""Means over images, with 95 % intervals. Baselines have no layer, here as in all tables."""

FAITHFULNESS_DIFFERENCES = DIFFERENCES
"""As of localization: a method minus another on the same images, with paired intervals."""

FAITHFULNESS_CURVES = pa.schema(
    [
        ("network", pa.string()),
        ("layer", pa.string()),
        ("method", pa.string()),
        ("curve", pa.string()),
        ("share", pa.float64()),
        ("probability", pa.float64()),
    ]
)
"""The mean probability of the top class over the share of pixels taken out or put in."""

IMAGE_FAITHFULNESS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("method", pa.string()),
        ("layer", pa.string()),
        ("class_id", pa.int32()),
        ("probability", pa.float32()),
        *((name, pa.float64()) for name in METRICS),
        *((name, pa.list_(pa.float32())) for name in CURVES),
    ]
)
"""How faithful one map is: every metric, null where it was not asked for, and the curves."""


def images_folder(network: str) -> str:
    """The folder of a network's table of images, below `OUT/metrics`."""
    return f"faithfulness_images/network={network}"
