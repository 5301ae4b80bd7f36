"""The last block of a transformer, run for the few tokens that the logits depend on.

Where a class token is classified, the last block's other tokens serve as keys and values of one
attention and are read no more. So keys and values are made of all tokens, and all that follows is
run for the class token, with its distillation token and registers, alone: the same logits for less,
and a backward pass for each class that is one product with the weights of keys and values.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scacam.errors import NetworkError

__all__ = ["LastBlock", "attending", "pruned"]

_PATCHED = threading.RLock()
"""Held while torch's attention is another function than torch's."""


class LastBlock(NamedTuple):
    """A block whose output is read at its first tokens alone.

    Attributes:
        name: of the block, a module that takes tokens `[B, N, C]`.
        read: how many of the first tokens are no part of the image.
        follows: how many blocks before it let the same tokens attend to one another, if those are
            all that there are; else None.
    """

    name: str
    read: int
    follows: int | None = None


class _Seen(Exception):
    """Keys and values are known: what follows of all tokens is not needed."""


@contextmanager
def pruned(module: nn.Module, block: LastBlock | None) -> Iterator[list[Tensor]]:
    """Inside this context the block, if there is one, gives its first tokens alone.

    Yields:
        A list to which its attention `[B, heads, read, N]` is added when it runs.

    Raises:
        NetworkError: in the forward pass: the block does not call torch's attention.
    """
    seen: list[Tensor] = []
    if block is None:
        yield seen
        return
    layer = module.get_submodule(block.name)
    whole = layer.forward

    def forward(tokens: Tensor, *arguments: Any, **keywords: Any) -> Any:
        key, value, mask = _attended(lambda: whole(tokens, *arguments, **keywords))
        of_image = tokens.shape[1] - block.read

        def attend(
            query: Tensor,
            _key: Tensor,
            _value: Tensor,
            *_: Any,
            scale: float | None = None,
            **__: Any,
        ) -> Tensor:
            of_read = None if mask is None else mask[..., : block.read, :]
            seen.append(_weights(query, key, of_read, scale))
            return seen[-1] @ value

        def cut(given: Any) -> Any:
            """Without what belongs to the image's tokens: their rotary embeddings."""
            if isinstance(given, tuple | list):
                return type(given)(cut(each) for each in given)
            has_rows = isinstance(given, Tensor) and given.shape[-2:-1] == (of_image,)
            return given[..., :0, :] if has_rows else given

        with _attention(attend):
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
        weights = _weights(query, key, attn_mask, scale)
        if weights.ndim == 4 and weights.shape[2] == weights.shape[3]:
            seen.append(weights.detach().mean(1))
        return weights @ value

    with _attention(attend):
        yield seen


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention `[B, heads, queries, keys]`."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if mask is not None:
        absent = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if absent else scores + mask
    return scores.softmax(-1)


def _attended(run: Callable[[], object]) -> tuple[Tensor, Tensor, Tensor | None]:
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

    with _attention(see), suppress(_Seen):
        run()
    if not seen:
        raise NetworkError("the last block calls no attention of torch")
    return seen[0]


@contextmanager
def _attention(function: Callable[..., Tensor]) -> Iterator[None]:
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
