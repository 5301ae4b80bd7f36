"""The gradients in the forms in which they come, and the sums over them that methods are made of.

Behind the usual heads the gradient of a class is one number per channel, everywhere or where some
mask is 1. Kept in that form no `[B, K, C, h, w]` needs to exist, and each sum below is a product of
small matrices, whatever the form.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Gradients",
    "MaskedGradients",
    "Product",
    "averaged",
    "elementwise",
    "pooled_product",
    "product",
    "weigh",
    "weigh_product",
]


class MaskedGradients(NamedTuple):
    """Gradients `values ⊙ mask`.

    Attributes:
        values: `[B, K, C, 1, 1]`.
        mask: zeros and ones, `[B, 1, C, h, w]` where it is the same for every class, or
            `[B, K, 1, h, w]` where it is the same for every channel.
    """

    values: Tensor
    mask: Tensor


Gradients = Tensor | MaskedGradients
"""`[B, K, C, h, w]`; `[B, K, C, 1, 1]` where they do not depend on the position; or masked."""


class Product(NamedTuple):
    """`G ⊙ A` as features times weights times mask, broadcast over the axis that each one lacks.

    N·R = B·K: an image's features serve its R = K classes, or each class has features of its own.

    Attributes:
        features: `[N, C, h, w]`.
        weights: `[N, R, C]`.
        mask: `[N, R, h, w]`, or None for ones.
    """

    features: Tensor
    weights: Tensor
    mask: Tensor | None


def product(gradients: Gradients, features: Tensor) -> Product:
    """`G ⊙ A` of features `[B, C, h, w]`."""
    if isinstance(gradients, MaskedGradients):
        weights, mask = gradients.values[..., 0, 0], gradients.mask
        if mask.shape[1] == 1:
            return Product(features * mask[:, 0], weights, None)
        return Product(features, weights, mask[:, :, 0])
    if gradients.shape[3:] == (1, 1):
        return Product(features, gradients[..., 0, 0], None)
    own = (gradients * features[:, None]).flatten(0, 1)
    return Product(own, own.new_ones(len(own), 1, own.shape[1]), None)


def averaged(gradients: Gradients) -> Tensor:
    """The averaged gradient `α = mean(G)`, `[B, K, C]` (Equation 5)."""
    if isinstance(gradients, MaskedGradients):
        return gradients.values[..., 0, 0] * gradients.mask.mean((3, 4))
    return gradients.mean((3, 4))


def elementwise(function: Callable[[Tensor], Tensor], gradients: Gradients) -> Gradients:
    """A function of every gradient. It must be 0 at 0."""
    if isinstance(gradients, MaskedGradients):
        return MaskedGradients(function(gradients.values), gradients.mask)
    return function(gradients)


def weigh(weights: Tensor, features: Tensor) -> Tensor:
    """`Σ_k weights_k A_k`, `[B, K, h, w]`, with weights `[B, K, C]` (Equation 1)."""
    return torch.einsum("bkc,bchw->bkhw", weights, features)


def weigh_product(gradients: Gradients, features: Tensor, weights: Tensor | None = None) -> Tensor:
    """`Σ_k weights_k (G_k ⊙ A_k)`, `[B, K, h, w]`, with weights `[B, K, C]` or all 1."""
    factors = product(gradients, features)
    scales = factors.weights
    if weights is not None:
        scales = scales * weights.reshape(scales.shape)
    maps = weigh(scales, factors.features)
    if factors.mask is not None:
        maps = maps * factors.mask
    return maps.reshape(len(features), -1, *features.shape[2:])


def pooled_product(gradients: Gradients, features: Tensor) -> Tensor:
    """`Σ_ij G_k(i, j) A_k(i, j)`, `[B, K, C]`."""
    factors = product(gradients, features)
    if factors.mask is None:
        sums = factors.features.sum((2, 3))[:, None]
    else:
        sums = torch.einsum("nrhw,nchw->nrc", factors.mask, factors.features)
    return (factors.weights * sums).reshape(len(features), -1, features.shape[1])
