"""What a run is made of, as Arrow tables: manifest, explanations, errors, index, heatmaps.

Other rooms have the schemas of what they write themselves.

Plain Arrow types only, so that any Parquet reader opens a shard without scacam.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

__all__ = [
    "BOXES",
    "CHANNELS",
    "ERRORS",
    "EXPLANATION",
    "IMAGE",
    "INDEX",
    "MANIFEST",
    "NETWORK",
    "PREDICTION",
    "SCHEMA_VERSION",
    "SHARDED",
    "claimant_names",
    "embeddings",
    "embeddings_folder",
    "explanations",
    "explanations_folder",
    "network_path",
    "pack_heatmaps",
    "predictions",
    "predictions_folder",
    "stacked",
    "unfolded",
    "unpack_heatmaps",
]

SCHEMA_VERSION = 2
"""In version 1 a network had one layer, and its explanations lay in one folder for all."""

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
        ("layer", pa.string()),
        ("rows", pa.int64()),
        ("images", pa.int64()),
        ("first_image_id", pa.int64()),
        ("last_image_id", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
"""The shards of a complete run, by their paths below the output; of errors network and layer are
null."""

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


CHANNELS = 32
"""So many channels are stored of the top class and of the label, those that add most to it."""

PREDICTION = pa.schema(
    [
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("rank", pa.int16()),
        ("probability", pa.float32()),
        ("logit", pa.float32()),
        ("channel_ids", pa.list_(pa.int16())),
        ("channel_contributions", pa.list_(pa.float16())),
        ("channel_cells", pa.list_(pa.int16())),
    ]
)
"""One explained class. The channels, the one that adds most first, are null but for the top class
and the label; cells are those of the feature map where each is largest, counted by rows."""

_OF_IMAGE = ["image_id", "uri", "label"]
_PREDICTED = _OF_IMAGE + PREDICTION.names

NETWORK = pa.schema(
    [
        ("class_id", pa.int32()),
        ("class_name", pa.string()),
        ("bias", pa.float32()),
        ("weights", pa.list_(pa.float32())),
    ]
)
"""The classes of a network; weights and biases are null where it has no class weights."""

SHARDED = ("explanations", "predictions", "embeddings", "errors")
"""The folders below an output in which shards lie, at any depth."""


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


def claimant_names(
    claimants: Iterable[tuple[str | None, str]],
) -> dict[tuple[str | None, str], str]:
    """What those are called that have maps of one network, each a layer and a method.

    By the method alone, but with the layer where the network has several layers of it.
    """
    claimants = list(dict.fromkeys(claimants))
    layers = Counter(method for _, method in claimants)
    return {
        (layer, method): method if layers[method] == 1 else f"{method} ({layer})"
        for layer, method in claimants
    }


def explanations_folder(network: str, layer: str) -> str:
    """Where the explanations of a network's layer lie, below the output."""
    return f"explanations/network={network}/layer={layer}"


def predictions_folder(network: str) -> str:
    """Where the predictions of a network lie, below the output."""
    return f"predictions/network={network}"


def embeddings_folder(network: str) -> str:
    """Where the pooled features of a network lie, below the output."""
    return f"embeddings/network={network}"


def network_path(network: str) -> str:
    """Where the class weights of a network lie, below the output."""
    return f"networks/{network}.parquet"


def predictions(images: pa.Table, lists: pa.ListArray) -> pa.Table:
    """Unfold images into rows, one per class.

    Args:
        images: the columns of `IMAGE`, one row per image.
        lists: for each image the list of its predictions, structs as in `PREDICTION`.
    """
    rows = pa.Table.from_struct_array(lists.flatten())
    parents = images.select(_OF_IMAGE).take(lists.value_parent_indices())
    return pa.table({name: (parents if name in _OF_IMAGE else rows)[name] for name in _PREDICTED})


def embeddings(images: pa.Table, lists: pa.ListArray) -> pa.Table:
    """The pooled features of images, as they are stored.

    Args:
        images: the columns of `IMAGE`, one row per image.
        lists: their features, float16, equally many of each.
    """
    values = lists.flatten()
    vectors = pa.FixedSizeListArray.from_arrays(values, len(values) // len(images))
    return images.select(_OF_IMAGE).append_column("embedding", vectors)


def unfolded(images: pa.Table, folder: str, map_shapes: Mapping[str, tuple[int, int]]) -> pa.Table:
    """The rows of images that belong into a folder, from the column of that name.

    Args:
        images: at least one.
        folder: of explanations, predictions or embeddings.
        map_shapes: height and width of the heatmaps, by the folders of explanations.
    """
    lists = images[folder].combine_chunks()
    if folder in map_shapes:
        return explanations(images, lists, map_shapes[folder])
    return (embeddings if folder.startswith("embeddings/") else predictions)(images, lists)


def explanations(images: pa.Table, lists: pa.ListArray, shape: tuple[int, int]) -> pa.Table:
    """Unfold images into rows, one per class and method.

    Args:
        images: the columns of `IMAGE`, one row per image.
        lists: for each image the list of its explanations, structs as in `EXPLANATION`.
        shape: height and width of the heatmaps.

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


def stacked(table: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """Numeric columns as an array `[rows, columns]`; what is null is NaN."""
    return np.stack([table[name].to_numpy() for name in columns], axis=1)
