"""Arrow schemas of what a pass over a run leaves in `OUT/metrics`, and reading it back."""

import pyarrow as pa

from scacam.evaluation.tables import DIFFERENCES, LOCALIZATION
from scacam.trials.metrics import CURVES, METRICS

__all__ = ["FAITHFULNESS", "FAITHFULNESS_CURVES", "FAITHFULNESS_DIFFERENCES", "IMAGE_FAITHFULNESS"]

FAITHFULNESS = pa.schema([field for field in LOCALIZATION if field.name != "thresholds"])
"""Means over images, with 95 % intervals. Methods that a network has at several layers have these
in their names."""

FAITHFULNESS_DIFFERENCES = DIFFERENCES
"""As of localization: a method minus another on the same images, with paired intervals."""

FAITHFULNESS_CURVES = pa.schema(
    [
        ("network", pa.string()),
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
        ("class_id", pa.int32()),
        ("probability", pa.float32()),
        *((name, pa.float64()) for name in METRICS),
        *((name, pa.list_(pa.float32())) for name in CURVES),
    ]
)
"""How faithful one map is: every metric, null where it was not asked for, and the curves."""
