"""Images with pixels taken out or put in, in the order in which a map ranks them.

All on the device of the images, where they come into being batch by batch, as they are asked for.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Pairs", "blurred", "edge_strength", "perturbed", "ranks", "same", "upsampled"]

_BLUR_SIZE, _BLUR_SIGMA = 11, 5.0
"""Of the image that insertion starts from (Petsiuk et al. 2018, RISE)."""


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps `[N, h, w]` bilinearly at the size of the input, without aligned corners."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def ranks(maps: Tensor) -> Tensor:
    """The place of each pixel, from the largest value on, of equal ones in reading order.

    Args:
        maps: `[N, H, W]`.

    Returns:
        int32 `[N, H·W]`, from 0.
    """
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], dtype=torch.int32, device=maps.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places.expand_as(order))


class Pairs(NamedTuple):
    """Image and claimant, those of an image that are the same only once.

    Attributes:
        images, claimants: int64 `[P]`, which they are; a claimant stands for all that are like it.
        places: int64 `[B, M]`, which pair speaks for each claimant.
    """

    images: Tensor
    claimants: Tensor
    places: Tensor


def same(values: Tensor) -> Pairs:
    """Which claimants have the same values, image by image.

    Args:
        values: `[B, M, D]` of integers, or of floats, which are compared bit by bit.
    """
    if values.is_floating_point():
        values = (values.float() + 0.0).contiguous().view(torch.int32)  # -0 is 0
    weights = _hash_weights(values.shape[2]).to(values.device)
    # By the image, for the integers are wide; products wrap around.
    keys = torch.stack([(of_image * weights).sum(1) for of_image in values])
    first = (keys[:, :, None] == keys[:, None, :]).int().argmax(2)
    own = first == torch.arange(first.shape[1], device=first.device)
    numbers = own.flatten().cumsum(0).reshape(own.shape) - 1
    images, claimants = own.nonzero(as_tuple=True)
    return Pairs(images, claimants, numbers.gather(1, first))


@cache
def _hash_weights(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 62), 1 << 62, (count,), generator=generator) * 2 + 1


def perturbed(
    front: Tensor,
    back: Tensor,
    of_images: Tensor,
    places: Tensor,
    counts: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of which the first pixels in some order come from `front`, the others from `back`.

    Args:
        front, back: `[B, C, H, W]` each, or `[1, C, 1, 1]` for one colour.
        of_images: int64 `[P]`, which image each order is for.
        places: `[P, H·W]`, the orders, as `ranks` gives them.
        counts: how many pixels come from the front, S numbers.
        batch_size: of the batches.

    Yields:
        Batches `[N, C, H, W]` of P · S images, those of an order one after the other, and for each
        which image it is of: `[N]`.
    """
    device, steps = places.device, len(counts)
    limits = torch.tensor(counts, dtype=torch.int32, device=device)
    change = front - back
    back = back.expand_as(change)
    images = of_images.tolist()
    for start in range(0, len(places) * steps, batch_size):
        end = min(start + batch_size, len(places) * steps)
        number = torch.arange(start, end, device=device)
        order, step = number // steps, number % steps
        inside = (places[order] < limits[step, None]).unflatten(1, change.shape[2:])
        weights = inside[:, None].to(change)
        made = change.new_empty(len(number), *change.shape[1:])
        # An image at a time, which stays in the cache of a processor meanwhile.
        done = 0
        for image, same_image in groupby(images[index // steps] for index in range(start, end)):
            rows = slice(done, done := done + len(list(same_image)))
            torch.addcmul(back[image], weights[rows], change[image], out=made[rows])
        yield made, of_images[order]


def blurred(images: Tensor) -> Tensor:
    """Images `[B, C, H, W]` under a Gaussian kernel of 11 pixels, σ 5, with reflected borders."""
    down, across = (_blur(length).to(images) for length in images.shape[2:])
    return down @ images @ across.T


@cache
def _blur(length: int) -> Tensor:
    """The blur along an axis as a matrix `[length, length]`, whatever its length."""
    offsets = torch.arange(_BLUR_SIZE) - _BLUR_SIZE // 2
    kernel = torch.exp(-(offsets**2) / (2 * _BLUR_SIGMA**2))
    period = max(2 * (length - 1), 1)
    reflected = (torch.arange(length)[:, None] + offsets) % period
    reflected = torch.minimum(reflected, period - reflected).clamp(max=length - 1)
    matrix = torch.zeros(length, length)
    return matrix.scatter_add_(1, reflected, (kernel / kernel.sum()).expand(length, -1))


def edge_strength(images: Tensor) -> Tensor:
    """The length of the Sobel gradient of the mean over channels: `[B, H, W]`."""
    # Sums of shifted images, which are many times quicker than a convolution of one channel.
    gray = sum(images.float().unbind(1), torch.zeros(())) / images.shape[1]
    around = F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    down = (around[:, :-2] + around[:, 2:]).add_(around[:, 1:-1], alpha=2)
    across = (around[..., :-2] + around[..., 2:]).add_(around[..., 1:-1], alpha=2)
    return torch.hypot(down[..., 2:] - down[..., :-2], across[:, 2:] - across[:, :-2])
