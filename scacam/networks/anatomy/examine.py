"""A look inside a network, which says what its layers and its head are, found by watching it run.

The target layer is the one whose output the classifier pools: the last with a spatial output. The
autograd graph from that output to the logits then says, operation by operation, what the head is.
The usual heads have a gradient in closed form, so that explaining a class costs no backward pass;
every other head is differentiated by autograd. What the graph says is checked by the numbers.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.methods.gradients import MaskedGradients
from scacam.networks.anatomy.alone import find_alone
from scacam.networks.anatomy.backward import differentiable, differentiate, through_block
from scacam.networks.anatomy.block import LastBlock, attending, pruned
from scacam.networks.anatomy.head import ExplainedLayer, Head, Kind
from scacam.networks.anatomy.layer import TargetLayer, capture
from scacam.networks.anatomy.output import (
    SHAPING,
    Output,
    both_classes,
    eagerly,
    look_at_output,
    operation,
)
from scacam.networks.anatomy.path import LINEAR, POOLING, is_linear_at_own_scale, path
from scacam.networks.anatomy.search import Reach, find_layers

__all__ = ["Anatomy", "examine"]

_SEED = 0

# By what happens between features and logits: pooling, linear layer, ReLU.
_KINDS: dict[str, Kind] = {"pl": "pooled", "lp": "pooled", "rpl": "rectified", "lrp": "scores"}


class Anatomy(NamedTuple):
    """What a look inside a network found.

    Attributes:
        layers: those that are explained, in the order in which they run; the last is the target
            layer.
        finer_layer: the last layer with twice the target layer's resolution, just before it is
            halved, or None.
        finer_shape: channels, height and width of its output, or None.
        output: how logits and probabilities come from what the module returns.
        num_classes: how many logits there are.
    """

    layers: tuple[ExplainedLayer, ...]
    finer_layer: TargetLayer | None
    finer_shape: tuple[int, int, int] | None
    output: Output
    num_classes: int


def examine(
    module: nn.Module,
    images: Tensor,
    target_layers: Sequence[str] = (),
    finer_layer: str | None = None,
    output_kind: str | None = None,
) -> Anatomy:
    """Find the layers and what the heads do: by their autograd graphs, checked numerically.

    Args:
        module: a network that returns logits, or what its last step makes of them `[B, classes]`.
            It comes back as it was.
        images: three images of random values `[3, channels, H, W]`.
        target_layers: layers of the module; their last calls are taken. Without any, it is the last
            layer with a spatial output before the classifier, pooling layers aside.
        finer_layer: a layer of the module; left out, it is found by the resolutions.
        output_kind: as `look_at_output` takes it.

    Raises:
        NetworkError: there is no such layer, the logits do not depend on it or cannot be had, or
            what the module says of an image is not always the same.
        RuntimeError: the module cannot be watched or differentiated.
    """
    layers: list[ExplainedLayer] = []
    answers: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: answers.append(output))
    try:
        with eagerly(), differentiable(module):
            found = find_layers(
                module,
                images[:2],
                target_layers,
                finer_layer,
                reach=lambda *asked: _reach(module, images[:2], *asked),
            )
            for target in found.explained:
                # A pass for each: its operations are those of a graph that begins at this layer.
                with capture(module, images.shape[2:], [target], [target]) as captured:
                    output, raw = look_at_output(module, images[1:], output_kind)
                again = answers[-1][0]
                features = captured.of(target)
                layers.append(_explained(module, images[1:], target, features, output, raw))
    finally:
        handle.remove()
    _refuse_other_answer(answers[0][1], again)
    num_classes = both_classes(raw).shape[1]
    return Anatomy(tuple(layers), found.finer, found.finer_shape, output, num_classes)


def _refuse_other_answer(one: Tensor, other: Tensor) -> None:
    """Of one image, in two batches."""
    difference = (one - other).detach().abs().max()
    if difference > max(1e-3, 10 * torch.finfo(one.dtype).eps) * one.abs().max():
        raise NetworkError(
            "it gives an image another answer at another time or in another batch (a dropout that "
            "is always on, or statistics of the batch)"
        )


def _reach(module: nn.Module, images: Tensor, target: TargetLayer, classifier: str | None) -> Reach:
    """How what a module returns depends on a layer.

    Asked is what the classifier takes, where that is known: a new one may have weights of zero.
    """
    taken: list[Tensor] = []
    with ExitStack() as hooks:
        captured = hooks.enter_context(capture(module, images.shape[2:], [target], [target]))
        if classifier is not None:
            layer = module.get_submodule(classifier)
            hook = layer.register_forward_pre_hook(lambda _layer, inputs: taken.append(inputs[0]))
            hooks.callback(hook.remove)
        returned = module(images)
    read = taken[-1] if taken else returned
    if read.grad_fn is None:
        return Reach(False, False)
    # Sums over the channels behind a normalisation are the same for every image.
    random = torch.randn(read.shape, generator=torch.Generator().manual_seed(_SEED)).to(read)
    (gradients,) = torch.autograd.grad(
        (read * random).sum(), captured.of(target), retain_graph=True, allow_unused=True
    )
    reached = gradients is not None and bool((gradients != 0).any())
    straight = bool(_operations(returned, captured.of(target))) or (
        target.others is None and _is_neck(module, images, target)
    )
    return Reach(reached, reached and straight)


def _explained(
    module: nn.Module,
    images: Tensor,
    target: TargetLayer,
    features: Tensor,
    output: Output,
    raw: Tensor,
) -> ExplainedLayer:
    """A layer with what lies between its features and the logits as the module has them."""
    unread = NetworkError(
        f"the logits do not depend on layer {target.name!r}: it is not used, or what comes "
        "after it runs under torch.inference_mode, torch.no_grad or detach, or reads the class "
        "token alone; name another layer or take that out"
    )
    if raw.grad_fn is None:
        raise unread
    logits = both_classes(raw)
    class_ids = logits.detach().topk(min(3, logits.shape[1])).indices
    (expected,) = differentiate(logits, [features], class_ids)
    if target.others is not None and not expected.any() and logits.any():
        raise unread
    operations = _operations(raw, features)
    head = _head(module, operations, features, raw, class_ids, expected)
    if target.others and not operations:
        block = _last_block(module, images, target, logits, class_ids, expected)
        head = replace(head, block=block)
    is_linear = head.block is not None and head.block.layer is not None
    if head.is_even or is_linear:
        run = partial(output.logits, module)
        alone = find_alone(module, run, images, target, head.block)
        head = replace(head, alone=alone, is_scaled=head.is_scaled and alone is not None)
    straight = bool(operations) or target.others is not None or _is_neck(module, images, target)
    channels, height, width = features.shape[1:]
    return ExplainedLayer(target, head, straight, (channels, height, width))


def _head(
    module: nn.Module,
    operations: list[str],
    features: Tensor,
    raw: Tensor,
    class_ids: Tensor,
    expected: Tensor,
) -> Head:
    """The head whose gradients of some classes are those expected."""
    tolerance = 1e-4 * expected.abs().max()
    for candidate in _candidates(module, operations, features.shape[1], raw.shape[1]):
        with torch.no_grad():
            found = candidate.gradients(module, features, class_ids)
        actual = found.values * found.mask if isinstance(found, MaskedGradients) else found
        if (actual - expected).abs().max() <= tolerance:
            return candidate
    first = next((step for step in operations if step not in SHAPING), None)
    spread = (expected - expected[..., :1, :1]).abs().max()
    is_even = first in POOLING and bool(spread <= tolerance)
    is_scaled = is_even and is_linear_at_own_scale(operations) and raw.shape[1] > 1
    return Head("general", None, is_even, is_scaled)


def _last_block(
    module: nn.Module,
    images: Tensor,
    target: TargetLayer,
    logits: Tensor,
    class_ids: Tensor,
    expected: Tensor,
) -> LastBlock | None:
    """The block around a layer, if it gives the same logits and gradients when it is pruned."""
    others = target.others or ()
    name = target.name.rpartition(".")[0]
    if not name or target.call or others != tuple(range(len(others))):
        return None
    block = LastBlock(name, len(others))
    try:
        with (
            pruned(module, block),
            capture(module, images.shape[2:], [target], [target]) as captured,
        ):
            found = both_classes(module(images))
        (actual,) = differentiate(found, [captured.of(target)], class_ids)
    except Exception:  # whatever the module says to fewer tokens
        return None
    is_same = all(
        one.shape == other.shape and (one - other).abs().max() <= 1e-4 * other.abs().max()
        for one, other in ((found, logits), (actual, expected))
    )
    if not is_same:
        return None
    block = block._replace(follows=_earlier_blocks(module, images, name))
    linear = block._replace(layer=target.name)
    try:
        with pruned(module, linear) as seen:
            found = both_classes(module(images))
        actual, _ = through_block(module, linear, seen[0], found, class_ids)
    except Exception:  # its keys and values are more than a function of each token
        return block
    actual = actual[..., len(others) :].unflatten(3, expected.shape[3:])
    is_linear = (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    return linear if is_linear else block


def _earlier_blocks(module: nn.Module, images: Tensor, last: str) -> int | None:
    """How many blocks stand before the last, if the attention of all of them can be had."""
    siblings = list(module.get_submodule(last.rpartition(".")[0]).children())
    with torch.no_grad(), attending() as seen:
        module(images)
    is_whole = len(seen) == len(siblings) and siblings[-1] is module.get_submodule(last)
    is_alike = len({weights.shape for weights in seen}) == 1
    return len(siblings) - 1 if is_whole and is_alike else None


def _is_neck(module: nn.Module, images: Tensor, target: TargetLayer) -> bool:
    """Whether all that the logits know of the image passes through a layer."""
    calls = count()

    def give_all_the_first(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
        return output[:1].expand_as(output).clone() if next(calls) == target.call else None

    with module.get_submodule(target.name).register_forward_hook(give_all_the_first):
        answers = module(images).detach()
    return torch.allclose(answers[1:], answers[:1].expand_as(answers[1:]), rtol=1e-3, atol=1e-5)


def _operations(logits: Tensor, features: Tensor) -> list[str]:
    """What happens on the path from features to logits, if it is a single one."""
    return [operation(node) for node in path(logits, features)]


def _candidates(
    module: nn.Module, operations: list[str], channels: int, classes: int
) -> list[Head]:
    """What the head may be by its operations, with each layer that may classify by its shape."""
    steps = "".join(
        "p" if step in POOLING else "l" if step in LINEAR else "r" if step == "Relu" else "?"
        for step in operations
        if step not in SHAPING
    )
    kind = _KINDS.get(steps)
    if kind is None or (kind == "scores" and classes == 1):  # one ReLU for both classes
        return []
    return [
        Head(kind, name)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and layer.weight.shape in ((classes, channels), (classes, channels, 1, 1))
    ]
