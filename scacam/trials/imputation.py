"""Removed pixels filled in from their neighbours: the linear imputation of ROAD.

Rong et al. 2022, A Consistent and Efficient Evaluation Strategy for Attribution Methods. Every
removed pixel is the mean of its neighbours, the direct ones with weight 1/6, diagonal ones with
1/12, those outside of the image left out. That is one sparse linear system per image, symmetric and
positive definite, which is solved here for a batch at once, on the device of the images: for the
image at a few pixels, then at twice the size from there, and so on; in the end by conjugate
gradients with a multigrid cycle as their preconditioner.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["impute"]

_DIRECT, _DIAGONAL = 1 / 6, 1 / 12
_AROUND = torch.full((3, 3), _DIAGONAL)
_AROUND[1], _AROUND[:, 1], _AROUND[1, 1] = _DIRECT, _DIRECT, 0
_LACK = _AROUND.clone()
_LACK[1, 1] = -1
_SHARES = torch.outer(torch.tensor([1, 3, 3, 1]), torch.tensor([1, 3, 3, 1])) / 16
_ROUNDS = 100
_COARSEST, _SWEEPS = 4, 8


class _Level(NamedTuple):
    """The pixels of images at one size, each `[1, N, h, w]`.

    Attributes:
        removed: 1 for those that are filled in, 0 for others.
        weight: of these one over the sum of the weights of all neighbours.
    """

    removed: Tensor
    weight: Tensor


def impute(images: Tensor, known: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Fill in what is not known of images.

    Args:
        images: float `[N, C, H, W]`; where they are not known their values do not matter.
        known: bool `[N, H, W]`, the same for all channels; nowhere known is 0 everywhere.
        tolerance: by how much the last round may still change an image, as the root of the mean
            square over its pixels. What is wrong after it is about a quarter of that.

    Returns:
        The images, their removed pixels at the solution; there is no noise on it.
    """
    values = _side_by_side(images.transpose(0, 1))
    levels = _levels(_side_by_side((~known)[None].to(images)))
    return torch.empty_like(images).copy_(_filled(values, levels, tolerance).transpose(0, 1))


def _side_by_side(values: Tensor) -> Tensor:
    """`[C, N, H, W]`, on a processor with the images next to each other at every pixel.

    So they are what it computes at once, in step, whatever their width.
    """
    if values.device.type != "cpu":
        return values.contiguous()
    return values.contiguous(memory_format=torch.channels_last)


def _levels(removed: Tensor) -> list[_Level]:
    """The pixels at full size and ever coarser. One is removed if all that it stands for are."""
    levels = []
    while True:
        # A single pixel has no neighbours, and then nothing that is known reaches it.
        degree = _neighbours(torch.ones_like(removed)).clamp(min=_DIAGONAL)
        levels.append(_Level(removed, removed / degree))
        if max(removed.shape[2:]) <= _COARSEST:
            return levels
        removed = (F.avg_pool2d(removed, 2, ceil_mode=True) == 1).to(removed)


def _filled(values: Tensor, levels: Sequence[_Level], tolerance: float) -> Tensor:
    """The solution, at the pixels that are not removed the values: `[C, N, H, W]`.

    Residuals are left as they come out there: all that is made of them is weighed with 0.
    """
    filled = _started(torch.addcmul(values, values, levels[0].removed, value=-1), levels)
    residual = _residual(filled)
    direction = before = torch.zeros(())
    for number in range(_ROUNDS):
        better = _cycle(levels, residual)
        last = _dot(better, better).amax() <= tolerance**2 * better[:, 0].numel()
        product = _dot(residual, better)
        if number:
            better.addcmul_(_ratio(product, before), direction)
        direction = better
        applied = _residual(direction)
        step = _ratio(product, -_dot(direction, applied))
        filled.addcmul_(step, direction)
        if bool(last):
            break
        residual.addcmul_(step, applied)
        before = product
    return filled


def _started(kept: Tensor, levels: Sequence[_Level]) -> Tensor:
    """What was found at half the size, where pixels are removed, for a start.

    Args:
        kept: the values, 0 where removed.
        levels: from this one on.
    """
    if len(levels) == 1:
        return kept
    share = 1 - F.avg_pool2d(levels[0].removed, 2, ceil_mode=True)
    means = F.avg_pool2d(kept, 2, ceil_mode=True).div_(torch.where(share > 0, share, 1))
    coarse = _started(means, levels[1:])
    coarse = coarse + _cycle(levels[1:], _residual(coarse))
    return torch.addcmul(kept, levels[0].removed, _finer(coarse, kept))


def _cycle(levels: Sequence[_Level], residual: Tensor) -> Tensor:
    """One multigrid V-cycle from zero, symmetric: about the solution for a residual."""
    removed, weight = levels[0]
    first = weight * residual
    if len(levels) == 1:
        found = first
        for _ in range(_SWEEPS):
            found = torch.addcmul(first, weight, _neighbours(found))
        return found
    left = _coarser(_neighbours(first).mul_(removed))
    found = _finer(_cycle(levels[1:], left), first)
    found = torch.addcmul(first, removed, found, out=found)
    return first.addcmul_(weight, _neighbours(found))


def _residual(values: Tensor) -> Tensor:
    """What pixels lack to the sum of their neighbours."""
    found = _convolved(values, _LACK, stride=1)
    height, width = values.shape[2:]
    missing = _missing(height, width).to(values)
    for row in {0, height - 1}:
        found[:, :, row].addcmul_(values[:, :, row], missing[row])
    for column in {0, width - 1}:
        inside = (..., slice(1, -1), column)
        found[inside].addcmul_(values[inside], missing[1:-1, column])
    return found


@cache
def _missing(height: int, width: int) -> Tensor:
    """What the weights of a pixel's neighbours lack to 1 at the border: `[height, width]`."""
    return 1 - _neighbours(torch.ones(1, 1, height, width))[0, 0]


def _coarser(values: Tensor) -> Tensor:
    """The sum of what each coarse pixel stands for, the reverse of `_finer`."""
    size = values.shape[2:]
    if size[0] % 2 or size[1] % 2:
        half = *values.shape[:2], -(-size[0] // 2), -(-size[1] // 2)
        return torch.ops.aten.upsample_bilinear2d_backward(values, size, half, False)
    return _convolved(values, _SHARES, stride=2)


def _finer(values: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(values, like.shape[2:], mode="bilinear", align_corners=False)


def _neighbours(values: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbours; outside of the image are none."""
    return _convolved(values, _AROUND, stride=1)


def _convolved(values: Tensor, kernel: Tensor, stride: int) -> Tensor:
    images = values.shape[1]
    weights = kernel.to(values).expand(images, 1, -1, -1)
    return F.conv2d(values, weights, stride=stride, padding=1, groups=images)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((0, 2, 3), keepdim=True)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """0 for an image that is done, where both are."""
    return torch.where(other > 0, one / other, 0)
