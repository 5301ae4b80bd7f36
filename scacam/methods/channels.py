"""The channels that speak most for a class, and where each of them is largest."""

from typing import NamedTuple

import torch
from torch import Tensor

from scacam.methods.gradients import Gradients, pooled_product

__all__ = ["Channels", "top_channels"]


class Channels(NamedTuple):
    """The M channels that add most to the logits of K classes of each of B images, in that order.

    Attributes:
        ids: int64 `[B, K, M]`.
        contributions: `[B, K, M]`, `Σ_ij G_k(i, j) A_k(i, j)`; behind global average pooling and a
            linear classifier that is `w_k · mean(A_k)`.
        cells: int64 `[B, K, M]`, the cell of the feature map where the channel is largest, counted
            by rows.
    """

    ids: Tensor
    contributions: Tensor
    cells: Tensor


def top_channels(features: Tensor, gradients: Gradients, count: int) -> Channels:
    """The channels that matter most.

    Args:
        features: `[B, C, h, w]`.
        gradients: of the logits of K classes with respect to them.
        count: how many channels, at most all.
    """
    found = pooled_product(gradients, features).topk(min(count, features.shape[1]))
    cells = features.flatten(2).argmax(2)[:, None].expand(-1, found.indices.shape[1], -1)
    return Channels(found.indices, found.values, torch.gather(cells, 2, found.indices))
