"""Maps of what a class token attends to, in the last blocks of a transformer.

These functions take an `Attention` and give raw maps `[B, K, h, w]` like those in `maps`.

References:
    Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers.
    Bousselham et al. 2025, LeGrad.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Attention", "attention_rollout", "legrad"]


class Attention(NamedTuple):
    """How N tokens of B images attend to one another, and what that is to K classes.

    Attributes:
        blocks: of each block, in the order in which they run, the attention averaged over its
            heads, `[B, N, N]`; of the last, that of its first Q tokens alone, `[B, Q, N]`. Rows sum
            to 1. Empty if it was not asked for.
        gradients: of the classes' logits with respect to the last block's attention, for each of
            its heads, `[B, K, heads, Q, N]`.
        image: the positions of the image's tokens, `[h · w]`, row by row.
        shape: rows and columns of the image's tokens, h and w.
    """

    blocks: Sequence[Tensor]
    gradients: Tensor
    image: Tensor
    shape: tuple[int, int]


def legrad(attention: Attention) -> Tensor:
    """`mean(relu(∂y / ∂attention))` over heads and queries (Bousselham et al. 2025).

    Of the last block, whose attention is all that a class token sees of the image there. The paper
    averages several blocks, each with a score of its own.
    """
    maps = attention.gradients.relu().mean((2, 3))
    return maps.index_select(2, attention.image).unflatten(2, attention.shape)


def attention_rollout(attention: Attention) -> Tensor:
    """The product of `(attention + 1) / 2` of all blocks, as the class token sees it.

    The same for every class (Abnar and Zuidema 2020): a baseline that knows none. Where several
    tokens are classified, as in DeiT, it is their mean.
    """
    *earlier, last = attention.blocks
    flow = _with_skip(last)
    for weights in reversed(earlier):
        flow = flow @ _with_skip(weights)
    is_read = (attention.gradients != 0).any(4).any(2).any(1).to(flow)
    seen = (flow * is_read[..., None]).sum(1) / is_read.sum(1, keepdim=True).clamp(min=1)
    maps = seen.index_select(1, attention.image).unflatten(1, attention.shape)
    return maps[:, None].expand(-1, attention.gradients.shape[1], -1, -1)


def _with_skip(weights: Tensor) -> Tensor:
    """Half of what passes a block passes beside its attention."""
    return (weights + torch.eye(*weights.shape[1:]).to(weights)) / 2
