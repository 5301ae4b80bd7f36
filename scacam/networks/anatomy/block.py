"""The last block of a transformer, run for the few tokens that the logits depend on.

Where a class token is classified, the last block's other tokens serve as keys and values of one
attention and are read no more. So keys and values are made of all tokens, and all that follows is
run for the class token, with its distillation token and registers, alone: the same logits for less.

With one query, what a class's logit is to the keys is one vector per head times a number per token,
and likewise to the values. Where keys and values are the same linear function of every token, so
is its gradient to the tokens: a class costs a backward pass for two vectors per head and a small
product, where autograd takes one for every token.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scacam.errors import NetworkError

__all__ = ["Attended", "LastBlock", "attended", "attending", "attending_by", "pruned"]

_PATCHED = threading.RLock()
"""Held while torch's attention is another function than torch's."""


class LastBlock(NamedTuple):
    """A block whose output is read at its first tokens alone.

    Attributes:
        name: of the block, a module that takes tokens `[B, N, C]`.
        read: how many of the first tokens are no part of the image.
        follows: how many blocks before it let the same tokens attend to one another, if those are
            all that there are; else None.
        layer: name of the layer whose tokens its keys and values are a linear function of, the
            same for every token; None if they are not.
    """

    name: str
    read: int
    follows: int | None = None
    layer: str | None = None


@dataclass
class Attended:
    """What a pruned block's attention shows when it runs: of Q queries, in each head.

    Attributes:
        tokens: that come to the block, `[B, Q, C]`.
        query: times its scale, `[B, heads, Q, D]`.
        scores: before the softmax, `[B, heads, Q, N]`; a leaf where the block is linear.
        weights: after it.
        made: `[B, heads, Q, D]`.
        value: of all tokens, `[B, heads, N, D]`.
        mask: what is added to the scores, if anything.
    """

    tokens: Tensor
    query: Tensor
    scores: Tensor
    weights: Tensor
    made: Tensor
    value: Tensor
    mask: Tensor | None


class _Seen(Exception):
    """Keys and values are known: what follows of all tokens is not needed."""


@contextmanager
def pruned(module: nn.Module, block: LastBlock | None) -> Iterator[list[Attended]]:
    """Inside this context the block, if there is one, gives its first tokens alone.

    A graph begins at its attention's scores where `backward.through_block` has its gradients.

    Yields:
        A list to which is added what its attention shows when it runs.

    Raises:
        NetworkError: in the forward pass: the block does not call torch's attention.
    """
    seen: list[Attended] = []
    if block is None:
        yield seen
        return
    layer = module.get_submodule(block.name)
    whole = layer.forward

    def forward(tokens: Tensor, *arguments: Any, **keywords: Any) -> Any:
        key, value, mask = attended(lambda: whole(tokens, *arguments, **keywords))
        of_image = tokens.shape[1] - block.read

        def attend(
            query: Tensor,
            _key: Tensor,
            _value: Tensor,
            *_: Any,
            scale: float | None = None,
            **__: Any,
        ) -> Tensor:
            query = _scaled(query, scale)
            of_read = None if mask is None else mask[..., : block.read, :]
            scores = _scores(query, key, of_read)
            if block.layer is not None:
                torch.set_grad_enabled(True)
                scores = scores.detach().requires_grad_()
            weights = scores.softmax(-1)
            made = weights @ value
            read = tokens[:, : block.read]
            seen.append(Attended(read, query, scores, weights, made, value, of_read))
            return made

        def cut(given: Any) -> Any:
            """Without what belongs to the image's tokens: their rotary embeddings."""
            if isinstance(given, tuple | list):
                return type(given)(cut(each) for each in given)
            has_rows = isinstance(given, Tensor) and given.shape[-2:-1] == (of_image,)
            return given[..., :0, :] if has_rows else given

        with attending_by(attend):
            return whole(
                tokens[:, : block.read],
                *cut(arguments),
                **{name: cut(given) for name, given in keywords.items()},
            )

    layer.forward = forward
    try:
        yield seen
    finally:
        del layer.forward


@contextmanager
def attending(wanted: bool = True) -> Iterator[list[Tensor]]:
    """A list to which every attention of torch's is added that runs inside this context.

    Those of N tokens to the same N, averaged over their heads, `[B, N, N]`; none if not `wanted`.
    """
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *_: Any,
        scale: float | None = None,
        **__: Any,
    ) -> Tensor:
        weights = _scores(_scaled(query, scale), key, attn_mask).softmax(-1)
        if weights.ndim == 4 and weights.shape[2] == weights.shape[3]:
            seen.append(weights.detach().mean(1))
        return weights @ value

    with attending_by(attend):
        yield seen


def _scaled(query: Tensor, scale: float | None) -> Tensor:
    return query * (query.shape[-1] ** -0.5 if scale is None else scale)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Attention before its softmax, `[B, heads, queries, keys]`, of a scaled query."""
    scores = query @ key.mT
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def attended(run: Callable[[], object]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Key, value and additive mask of the first attention of a call, which ends there."""
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def see(
        _query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        seen.append((key, value, attn_mask))
        raise _Seen

    with attending_by(see), suppress(_Seen):
        run()
    if not seen:
        raise NetworkError("the last block calls no attention of torch")
    return seen[0]


@contextmanager
def attending_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside this context, that function is the attention of torch, which has no hook for it."""
    with _PATCHED:
        original, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
        F.scaled_dot_product_attention = function
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original
            torch.backends.mha.set_fastpath_enabled(fast)
