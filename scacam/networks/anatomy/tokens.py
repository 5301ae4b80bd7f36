"""The token grid: the tokens of a transformer that stand for parts of the image, as a map.

A transformer gives `[B, N, C]`: `h · w` tokens, one per patch and row by row, and beside them
perhaps some that are no part of the image: class and distillation tokens, registers. These are told
from the others by what they are: before the first block that mixes tokens they are the same for
every image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scacam.errors import NetworkError

__all__ = ["grid_of", "kept", "replaced", "shape_of_grid", "unlike_images"]


def unlike_images(tokens: Tensor) -> tuple[int, ...]:
    """Positions of the tokens that are the same for every image.

    Args:
        tokens: `[B, N, C]` of B images that differ everywhere, before tokens are mixed.
    """
    same = (tokens[1:] == tokens[:1]).all(2).all(0)
    return tuple(same.nonzero()[:, 0].tolist())


def shape_of_grid(count: int, size: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a grid of `count` tokens with the aspect of the images, or None.

    Args:
        count: how many tokens there are.
        size: height and width of the images.
    """
    aspect = math.log(size[0] / size[1])
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    if not pairs:
        return None
    rows, columns = min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1]) - aspect))
    # What is left of an image at its border may make one row or column more or less.
    allowed = math.log(1 + 1 / min(rows, columns))
    is_alike = abs(math.log(rows / columns) - aspect) <= allowed
    return (rows, columns) if is_alike and count > 1 else None


def grid_of(tokens: Tensor, others: Sequence[int], size: Sequence[int]) -> Tensor:
    """The image's tokens `[B, C, h, w]` out of all of them.

    Args:
        tokens: `[B, N, C]`.
        others: positions of those that are no part of the image.
        size: height and width of the images.

    Raises:
        NetworkError: so many tokens make no grid of the images' aspect.
    """
    image = kept(tokens.shape[1], others).to(tokens.device)
    shape = shape_of_grid(len(image), size)
    if shape is None:
        raise NetworkError(
            f"{len(image)} tokens make no grid with the aspect of {size[0]} × {size[1]} pixels"
        )
    return tokens.index_select(1, image).transpose(1, 2).unflatten(2, shape)


def replaced(tokens: Tensor, others: Sequence[int], grid: Tensor) -> Tensor:
    """The tokens `[B, N, C]` with the image's replaced by a grid `[B, C, h, w]`; a copy."""
    return tokens.index_copy(
        1, kept(tokens.shape[1], others).to(tokens.device), grid.flatten(2).transpose(1, 2)
    )


def kept(count: int, others: Sequence[int]) -> Tensor:
    """Positions of the image's tokens among all `count` of them."""
    return torch.tensor(sorted(set(range(count)) - set(others)))
