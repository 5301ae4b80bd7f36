"""Gradients of logits by autograd: through a whole head, or cheaply through a last block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scacam.networks.anatomy.block import Attended, LastBlock, attended

__all__ = ["differentiable", "differentiate", "through_block"]


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Inside this context a graph begins at a captured layer, and nowhere else.

    No parameter requires a gradient; after it, those that did do again. Gradients are enabled from
    the start, so that a backbone that the module runs under `torch.no_grad()` leaves them so.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def differentiate(logits: Tensor, features: Sequence[Tensor], class_ids: Tensor) -> list[Tensor]:
    """One backward pass for all explained classes of the whole batch, to all of some features.

    Args:
        logits: `[B, classes]`, with a graph that leads to the features.
        features: `[B, C, h, w]` each.
        class_ids: `[B, K]`.

    Returns:
        The gradients with respect to each of the features, `[B, K, C, h, w]`.
    """
    with torch.enable_grad():
        chosen = logits.gather(1, class_ids).sum(0)
    each = torch.eye(len(chosen)).to(chosen)
    try:
        gradients = torch.autograd.grad(
            chosen, features, each, retain_graph=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation that is not made for this, or too little memory for it
        one_by_one = [torch.autograd.grad(chosen, features, one, retain_graph=True) for one in each]
        gradients = tuple(torch.stack(of_layer) for of_layer in zip(*one_by_one, strict=True))
    return [of_layer.transpose(0, 1) for of_layer in gradients]


def through_block(
    module: nn.Module, block: LastBlock, seen: Attended, logits: Tensor, class_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits of some classes with respect to the tokens of a linear block's layer.

    With `s` the scores, `p` their softmax, `q` the scaled query and `o = p V` in each head, that of
    token n is `Σ_heads (∂y/∂s_n) W_Kᵀ q + p_n W_Vᵀ (∂y/∂o)`.

    Args:
        module: the network.
        block: its last block, whose `layer` is not None.
        seen: what its attention showed.
        logits: `[B, classes]`.
        class_ids: `[B, K]`.

    Returns:
        Those gradients `[B, K, C, N]`, and those with respect to the attention
        `[B, K, heads, Q, N]`.
    """
    to_scores, to_made, to_weights = differentiate(
        logits, [seen.scores, seen.made, seen.weights], class_ids
    )
    classes = class_ids.shape[1]
    keys, values = _transposed(module, block, seen.query, to_made)
    keys = keys[:, None].expand(-1, classes, -1, -1)
    weights = seen.weights.detach()[:, None].expand(-1, classes, -1, -1, -1)
    numbers = torch.cat([to_scores.flatten(2, 3), weights.flatten(2, 3)], 2).to(keys)
    return torch.cat([keys, values], 2).mT @ numbers, to_weights


def _transposed(
    module: nn.Module, block: LastBlock, queries: Tensor, made: Tensor
) -> tuple[Tensor, Tensor]:
    """The transposed weights of keys and values times vectors of the heads.

    By a backward pass through the block up to its attention, with one token for each vector.

    Args:
        module: the network.
        block: its last block.
        queries: `[B, heads, Q, D]`, for the weights of the keys.
        made: `[B, K, heads, Q, D]`, for those of the values.

    Returns:
        `[B, heads · Q, C]` and `[B, K, heads · Q, C]`.
    """
    heads = queries.shape[1]
    own = torch.eye(heads).to(queries)
    for_keys = torch.einsum("gh,bhqd->gbhqd", own, queries).flatten(1, 3)
    for_values = torch.einsum("gh,bkhqd->gbkhqd", own, made).flatten(1, 4)
    count = for_keys.shape[1]
    assert block.layer is not None
    layer = module.get_submodule(block.layer)
    scale = next(iter(layer.parameters()))  # as its weights are, also where attention is half
    with torch.enable_grad():
        tokens = scale.new_zeros(1, count + for_values.shape[1], len(scale)).requires_grad_()
        handle = layer.register_forward_hook(lambda *_: tokens.clone())
        try:
            key, value, _ = attended(lambda: module.get_submodule(block.name)(tokens.detach()))
        finally:
            handle.remove()
        sums = (key[0, :, :count] * for_keys).sum() + (value[0, :, count:] * for_values).sum()
    (found,) = torch.autograd.grad(sums, tokens)
    of_keys, of_values = found[0, :count], found[0, count:]
    return (
        of_keys.unflatten(0, (len(queries), -1)),
        of_values.unflatten(0, (*made.shape[:2], -1)),
    )
