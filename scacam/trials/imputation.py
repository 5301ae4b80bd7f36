"""Removed pixels filled in from their neighbours: the linear imputation of ROAD.

Rong et al. 2022, A Consistent and Efficient Evaluation Strategy for Attribution Methods. Every
removed pixel is the mean of its neighbours, the direct ones with weight 1/6, diagonal ones with
1/12, those outside of the image left out. That is one sparse linear system per image, symmetric and
positive definite, which is solved here for a batch at once, on the device of the images, by
conjugate gradients with one multigrid cycle as their preconditioner.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["impute"]

_DIRECT, _DIAGONAL = 1 / 6, 1 / 12
_TOLERANCE = 1e-5
"""Of the residual's length, as a share of what it is for zeros."""
_ROUNDS = 100
_COARSEST = 4


def impute(images: Tensor, known: Tensor) -> Tensor:
    """Fill in what is not known of images.

    Args:
        images: float `[N, C, H, W]`; where they are not known their values do not matter.
        known: bool `[N, H, W]`, the same for all channels; nowhere known is 0 everywhere.

    Returns:
        The images, their removed pixels at the solution; there is no noise on it.
    """
    removed = (~known)[:, None].to(images)
    kept = images * known[:, None]
    # A x = b on removed pixels: A x = degree · x - Σ weight · removed neighbours of x.
    residual = _neighbours(kept) * removed
    levels = _levels(removed)
    degree = levels[0][1]
    enough = _TOLERANCE * _length(residual)
    solution = torch.zeros_like(images)
    direction, before = torch.zeros_like(images), None
    for _ in range(_ROUNDS):
        if bool((_length(residual) <= enough).all()):
            break
        better = _cycle(residual, levels)
        product = _dot(residual, better)
        ratio = torch.zeros_like(product) if before is None else _ratio(product, before)
        direction = better + ratio * direction
        applied = (degree * direction - _neighbours(direction)) * removed
        step = _ratio(product, _dot(direction, applied))
        solution += step * direction
        residual = residual - step * applied
        before = product
    return kept + solution


def _levels(removed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Which pixels are removed and their neighbours' weights, at the full size and ever coarser.

    A coarse pixel is removed if all that it stands for are.
    """
    levels = []
    while True:
        levels.append((removed, _degree(removed.shape[2], removed.shape[3]).to(removed)))
        if min(removed.shape[2:]) <= _COARSEST or not bool(removed.any()):
            return levels
        removed = -F.max_pool2d(-removed, 2, ceil_mode=True)


def _cycle(residual: Tensor, levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One multigrid V-cycle from zero, symmetric: about the solution for a residual."""
    (removed, degree), coarser = levels[0], levels[1:]
    found = residual / degree
    if not coarser:
        for _ in range(_COARSEST):
            found = (residual + _neighbours(found) * removed) / degree
        return found
    size, half = residual.shape, (*residual.shape[:2], *coarser[0][0].shape[2:])
    left = _neighbours(found) * removed
    sums = torch.ops.aten.upsample_bilinear2d_backward(left, size[2:], half, False)
    found = found + removed * F.interpolate(
        _cycle(sums * coarser[0][0], coarser), size[2:], mode="bilinear", align_corners=False
    )
    return (residual + _neighbours(found) * removed) / degree


def _neighbours(values: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbours; outside of the image are none."""
    channels = values.shape[1]
    kernel = torch.full((3, 3), _DIAGONAL)
    kernel[1, :], kernel[:, 1], kernel[1, 1] = _DIRECT, _DIRECT, 0
    weights = kernel.to(values).expand(channels, 1, 3, 3)
    return F.conv2d(values, weights, padding=1, groups=channels)


@cache
def _degree(height: int, width: int) -> Tensor:
    """The sum of the weights of the neighbours that each pixel has: `[1, 1, H, W]`."""
    # A single pixel has none, and then nothing that is known reaches it.
    return _neighbours(torch.ones(1, 1, height, width)).clamp(min=_DIAGONAL)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((1, 2, 3), keepdim=True)


def _length(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=(1, 2, 3))


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """0 for an image that is done, where both are."""
    return torch.where(other > 0, one / other, 0)
