"""Class activation weights: how the class weight `w` and the averaged gradient `α` are related.

The paper (Section 4.1.1) divides one by the other, channel by channel, and finds one constant per
network. Here the same over a data set: by class, with the spread of the ratio over channels and
over images, so that one sees where the linear relation holds, and up to what.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

__all__ = ["CAW", "Relation", "Weights", "relate", "verdict"]

CAW = pa.schema(
    [
        pa.field("network", pa.string(), nullable=False),
        ("head", pa.string()),
        pa.field("class_id", pa.int32(), nullable=False),
        ("class_name", pa.string()),
        ("images", pa.int64()),
        ("class_weights", pa.list_(pa.float32())),
        ("averaged_gradients", pa.list_(pa.float32())),
        ("ratio", pa.float64()),
        ("ratio_spread_channels", pa.float64()),
        ("ratio_spread_images", pa.float64()),
        ("correlation", pa.float64()),
        ("silent_channels", pa.float64()),
        ("verdict", pa.string()),
    ]
)
"""One row per network and class: the two weights per channel, the averaged gradient as the mean
over the images that were taken for this class, and how they are related (see `Relation`).
`ratio_spread_images` is the range of the images' ratios as a share of their median."""


class Relation(NamedTuple):
    """How `w / α` behaves, for N images or for all of a class.

    Attributes:
        ratio: the median of `w / α` over channels; of many images, the median of theirs.
        spread_channels: the interquartile range of `w / α` over channels, as a share of `ratio`: 0
            where the relation is linear. Of many images, the median of theirs.
        correlation: Pearson's, over channels. Of many images, the median of theirs.
        silent_channels: the share of channels whose averaged gradient is 0, so that there is no
            ratio. Of many images, the mean of theirs.
    """

    ratio: np.ndarray
    spread_channels: np.ndarray
    correlation: np.ndarray
    silent_channels: np.ndarray


def relate(weights: np.ndarray, averaged: np.ndarray) -> Relation:
    """Relate class weights and averaged gradients `[N, C]`, image by image.

    Returns:
        Arrays `[N]`; NaN where no channel has a ratio, or where either weight is constant.
    """
    weights, averaged = weights.astype(np.float64), averaged.astype(np.float64)
    silent = averaged == 0
    ratios = np.divide(weights, averaged, out=np.full_like(averaged, np.nan), where=~silent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an image without any ratio
        low, middle, high = np.nanquantile(ratios, (0.25, 0.5, 0.75), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (high - low) / np.abs(middle)
        centred = [x - x.mean(1, keepdims=True) for x in (weights, averaged)]
        norms = [np.sqrt((x**2).sum(1)) for x in centred]
        correlation = (centred[0] * centred[1]).sum(1) / (norms[0] * norms[1])
    return Relation(middle, spread, correlation, silent.mean(1))


class Weights:
    """Gathers, image by image, what one network's classifier weighs channels with."""

    def __init__(
        self,
        network: str,
        *,
        head: str,
        cells: int,
        class_weights: np.ndarray | None,
        categories: Sequence[str] | None,
    ) -> None:
        """Start with no images.

        Args:
            network: its name.
            head: the kind of its head, see `scacam.networks.anatomy.head.Head`.
            cells: positions of its feature map, the paper's `Z`.
            class_weights: `[classes, C]`, or None if it has none.
            categories: the names of its classes, or None.
        """
        self.network = network
        self.head = head
        self.cells = cells
        self.class_weights = class_weights
        self.categories = categories
        self._sums: dict[int, np.ndarray] = {}
        self._ids: list[np.ndarray] = []
        self._relations: list[Relation] = []

    def add(self, class_ids: np.ndarray, averaged: np.ndarray) -> None:
        """Add images by the classes `[N]` that they were taken for and their `α` `[N, C]`."""
        for class_id in np.unique(class_ids).tolist():
            total = averaged[class_ids == class_id].sum(0, dtype=np.float64)
            self._sums[class_id] = self._sums.get(class_id, 0) + total
        self._ids.append(class_ids)
        if self.class_weights is not None:
            self._relations.append(relate(self.class_weights[class_ids], averaged))

    @property
    def images(self) -> int:
        """How many images were added."""
        return sum(map(len, self._ids))

    def table(self) -> pa.Table:
        """The rows of this network, as `CAW`, the most frequent class first."""
        ids = np.concatenate(self._ids) if self._ids else np.zeros(0, dtype=np.int64)
        classes, counts = np.unique(ids, return_counts=True)
        relations = [np.concatenate(parts) for parts in zip(*self._relations, strict=True)]
        rows = []
        for index in np.argsort(-counts, kind="stable"):
            class_id, count = int(classes[index]), int(counts[index])
            row = {
                "network": self.network,
                "head": self.head,
                "class_id": class_id,
                "class_name": self.categories[class_id] if self.categories else f"class {class_id}",
                "images": count,
                "averaged_gradients": self._sums[class_id] / count,
                "verdict": verdict(self.head, self.cells),
            }
            if self.class_weights is not None:
                of_class = Relation(*(values[ids == class_id] for values in relations))
                row |= {"class_weights": self.class_weights[class_id], **_summary(of_class)}
            rows.append(row)
        return pa.Table.from_pylist(rows, schema=CAW)

    def summary(self) -> dict[str, float | None]:
        """The relation over all images of all classes, in the names of `CAW`."""
        if not self._relations:
            return {}
        return _summary(
            Relation(*(np.concatenate(part) for part in zip(*self._relations, strict=True)))
        )


def _summary(relation: Relation) -> dict[str, float | None]:
    def median(values: np.ndarray) -> float | None:
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if len(finite) else None

    ratio = median(relation.ratio)
    finite = relation.ratio[np.isfinite(relation.ratio)]
    return {
        "ratio": ratio,
        "ratio_spread_channels": median(relation.spread_channels),
        "ratio_spread_images": float(np.ptp(finite) / abs(ratio)) if ratio else None,
        "correlation": median(relation.correlation),
        "silent_channels": float(relation.silent_channels.mean()),
    }


def verdict(head: str, cells: int) -> str:
    """Where the relation between the two weights is linear, and why, by the kind of the head."""
    return {
        "pooled": (
            f"linear, w = {cells} α for every image and class: global average pooling over {cells} "
            "cells feeds a linear classifier"
        ),
        "scores": (
            f"linear up to one constant per image and class, w = {cells}² / n · α: a ReLU lies "
            "between the class's score map, n of whose cells are positive, and the pooling"
        ),
        "rectified": (
            f"not linear, α_k = w_k n_k / {cells}²: a ReLU lies between the features and the "
            "pooling, and n_k, the positive cells of channel k, differs from channel to channel"
        ),
        "general": (
            "not defined: the classifier is not linear on globally pooled features, so there is no "
            "one weight per channel and class to compare the averaged gradient with"
        ),
    }[head]
