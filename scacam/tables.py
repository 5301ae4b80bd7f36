"""Every Arrow schema: the manifest, explanations, errors; and heatmaps as they are stored.

Plain Arrow types only, so that any Parquet reader opens a shard without scacam.
"""

import numpy as np
import pyarrow as pa

__all__ = [
    "BOXES",
    "CURVES",
    "DIFFERENCES",
    "ERRORS",
    "EXPLANATION",
    "IMAGE",
    "IMAGE_SCORES",
    "INDEX",
    "LOCALIZATION",
    "MANIFEST",
    "SCHEMA_VERSION",
    "TRUE_BOXES",
    "explanations",
    "pack_heatmaps",
    "unpack_heatmaps",
]

SCHEMA_VERSION = 1

MANIFEST = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        ("label", pa.int32()),
        ("size", pa.int64()),
        ("offset", pa.int64()),
    ]
)
"""The size in bytes, where known; the offset only of an image that lies in a container."""

ERRORS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
    ]
)

INDEX = pa.schema(
    [
        ("path", pa.string()),
        ("network", pa.string()),
        ("rows", pa.int64()),
        ("images", pa.int64()),
        ("first_image_id", pa.int64()),
        ("last_image_id", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
"""The shards of a complete run, by their paths below the output; of errors the network is null."""

IMAGE = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.int32()),
    ]
)
"""What the explanations of one image have in common."""

EXPLANATION = pa.schema(
    [
        ("view_x0", pa.float32()),
        ("view_y0", pa.float32()),
        ("view_x1", pa.float32()),
        ("view_y1", pa.float32()),
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("rank", pa.int16()),
        ("probability", pa.float32()),
        ("method", pa.string()),
        ("heatmap", pa.list_(pa.float16())),
        ("map_height", pa.int16()),
        ("map_width", pa.int16()),
        ("scale", pa.float32()),
        ("peak_x", pa.float32()),
        ("peak_y", pa.float32()),
        ("box_x0", pa.float32()),
        ("box_y0", pa.float32()),
        ("box_x1", pa.float32()),
        ("box_y1", pa.float32()),
    ]
)
"""One explanation, its heatmap still flat; stored, it is a `fixed_shape_tensor` of its shape."""


def pack_heatmaps(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Store maps in half precision without underflow.

    Args:
        maps: raw maps `[..., h, w]`, finite.

    Returns:
        float16 heatmaps of the same shape whose largest magnitude is 1, and their float32 scales
        `[...]`; raw map = heatmap · scale. An all-zero map has scale 0.
    """
    scales = np.abs(maps).max((-2, -1)).astype(np.float32)
    divisors = np.where(scales > 0, scales, 1).astype(np.float64)
    return (maps / divisors[..., None, None]).astype(np.float16), scales


def unpack_heatmaps(heatmaps: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The raw float32 maps `[..., h, w]` that were packed."""
    return heatmaps.astype(np.float32) * scales[..., None, None].astype(np.float32)


def explanations(images: pa.Table, lists: pa.ListArray, shape: tuple[int, int]) -> pa.Table:
    """Unfold images into rows, one per class and method.

    Args:
        images: the columns of `IMAGE`, one row per image.
        lists: for each image the list of its explanations, structs as in `EXPLANATION`.
        shape: height and width of this network's heatmaps.

    Returns:
        The table as it is stored, with the columns of the output contract in their order.
    """
    rows = pa.Table.from_struct_array(lists.flatten())
    parents = images.select(IMAGE.names).take(lists.value_parent_indices())
    tensor = pa.fixed_shape_tensor(pa.float16(), shape)
    values = rows["heatmap"].combine_chunks().flatten()
    storage = pa.FixedSizeListArray.from_arrays(values, shape[0] * shape[1])
    columns = {name: parents[name] for name in ("image_id", "uri", "width", "height")}
    columns |= {name: rows[name] for name in EXPLANATION.names[:4]}
    columns["label"] = parents["label"]
    columns |= {name: rows[name] for name in EXPLANATION.names[4:]}
    columns["heatmap"] = pa.ExtensionArray.from_storage(tensor, storage)
    return pa.table(columns)


BOXES = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        ("x0", pa.float64()),
        ("y0", pa.float64()),
        ("x1", pa.float64()),
        ("y1", pa.float64()),
        ("class_id", pa.int32()),
    ]
)
"""True boxes, one row per object, in pixels of the original image, as they were annotated."""

LOCALIZATION = pa.schema(
    [
        ("network", pa.string()),
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
set: these thresholds, as shares of the maximum."""

DIFFERENCES = pa.schema(
    [
        ("network", pa.string()),
        ("metric", pa.string()),
        ("method", pa.string()),
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
        ("top1", pa.bool_()),
        ("iou", pa.float64()),
        ("iou_any", pa.float64()),
        ("iou_15", pa.float64()),
        ("iou_20", pa.float64()),
        ("peak_distance", pa.float64()),
        ("energy", pa.float64()),
    ]
)
"""How one method localizes one image: whether the top class is the labelled one; the best overlap
of the largest contour's box and of any contour's, at the thresholds of `max_box_acc` and of
`max_box_acc_v2` at IoU 0.5; of the boxes at 15 and 20 % of the maximum; pixels from the peak to the
nearest true box (0 inside, ∞ without a peak); the share of the positive map inside the boxes."""

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
