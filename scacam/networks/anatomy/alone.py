"""A head that is run by itself, for each cell of its features alone.

What a module does behind a layer cannot be called: it stands somewhere in its `forward`. So the
whole module runs, but the layers before are not: they give zeros, which nobody reads.

Where features are pooled first, the map of a cell alone, all others 0, has the mean of a map of
this one cell by the number of cells. Where a class token is classified, the keys and values of a
token that is 0 are the same wherever it stands, so that the attention to one cell and so many of
those is known, and all that follows is run for the class token alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scacam.networks.anatomy.backward import differentiable, differentiate
from scacam.networks.anatomy.block import Attended, LastBlock, attended, attending_by, pruned
from scacam.networks.anatomy.layer import TargetLayer, capture
from scacam.networks.anatomy.output import eagerly
from scacam.networks.anatomy.path import at_own_scale
from scacam.networks.anatomy.tokens import kept

__all__ = ["Alone", "find_alone"]

_SHARE = 0.2
"""Of a forward pass, what running the head for every cell may cost at most."""


class Alone(NamedTuple):
    """A head that can be run by itself.

    Attributes:
        target: the layer whose output it reads.
        before: the calls of layers that are left out, in their order: the name, and the shape of
            what it gives for one image.
        block: the last block of a transformer that classifies a token; None where features are
            pooled first.
        is_cheap: whether it may be run for every cell.
    """

    target: TargetLayer
    before: tuple[tuple[str, tuple[int, ...]], ...]
    block: LastBlock | None
    is_cheap: bool = True

    def of_cells(
        self,
        module: nn.Module,
        run: Callable[[Tensor], Tensor],
        images: Tensor,
        features: Tensor,
        seen: Sequence[Attended],
    ) -> Tensor:
        """Logits of each cell alone, `[B, h · w, classes]`.

        Args:
            module: the network.
            run: from images to logits, by the module.
            images: `[B, channels, H, W]`, of which the shape counts alone.
            features: of the target layer, `[B, C, h, w]`.
            seen: what the block's attention showed, if there is one.
        """
        cells = features.shape[2] * features.shape[3]
        # Image by image, as there may be layers wider than all the classes.
        if self.block is None:
            alone = (features.flatten(2).mT / cells).to(images)
            logits = [self.of_pooled(module, run, images, of_image) for of_image in alone]
        else:
            made = _attending_to_one(module, self.block, self.target.others or (), seen[0])
            tokens = seen[0].tokens.to(images)[:, None].expand(-1, cells, -1, -1)
            logits = [
                self._of_made(module, run, images, *of_image)
                for of_image in zip(tokens, made.to(images), strict=True)
            ]
        return torch.stack(logits).to(features)

    def of_pooled(
        self, module: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, pooled: Tensor
    ) -> Tensor:
        """Logits `[n, classes]` of pooled features `[n, C]`."""
        tokens = pooled.new_zeros(len(pooled), 1 + len(self.target.others or ()), pooled.shape[1])
        output = self.target.output(pooled[..., None, None], tokens)
        name = self.target.name
        return self._logits(module, run, images, len(pooled), name, lambda *_, **__: output)

    def weights_at_own_scale(
        self,
        module: nn.Module,
        run: Callable[[Tensor], Tensor],
        images: Tensor,
        pooled: Tensor,
        class_ids: Tensor,
    ) -> Tensor:
        """Weights `[B, K, C]` from pooled features `[B, C]` to the logits of classes `[B, K]`."""
        with differentiable(module):
            leaf = pooled.to(images).requires_grad_()
            logits = self.of_pooled(module, run, images, leaf)
            with at_own_scale(logits, leaf):
                (weights,) = differentiate(logits, [leaf], class_ids)
        return weights.to(pooled)

    def _of_made(
        self,
        module: nn.Module,
        run: Callable[[Tensor], Tensor],
        images: Tensor,
        tokens: Tensor,
        made: Tensor,
    ) -> Tensor:
        """Logits `[n, classes]` of n class tokens `[n, Q, C]` that attend to `[n, heads, Q, D]`."""
        assert self.block is not None
        whole = module.get_submodule(self.block.name).forward

        def block(_tokens: Tensor, *arguments: Any, **keywords: Any) -> Any:
            with attending_by(lambda *_, **__: made):
                return whole(tokens, *arguments, **keywords)

        return self._logits(module, run, images, 1, self.block.name, block)

    def _logits(
        self,
        module: nn.Module,
        run: Callable[[Tensor], Tensor],
        images: Tensor,
        batch: int,
        name: str,
        last: Callable[..., Any],
    ) -> Tensor:
        """What a module says of that many images if a layer gives this behind those left out."""
        zero = images.new_zeros(())
        given: dict[str, list[Callable[..., Any]]] = {}
        for left_out, shape in self.before:
            zeros = zero.expand(batch, *shape)
            given.setdefault(left_out, []).append(lambda *_, zeros=zeros, **__: zeros)
        given.setdefault(name, []).append(last)
        with ExitStack() as layers, eagerly():
            for layer, calls in given.items():
                layers.enter_context(_calling(module.get_submodule(layer), calls))
            return run(zero.expand(batch, *images.shape[1:]))


@contextmanager
def _calling(layer: nn.Module, calls: list[Callable[..., Any]]) -> Iterator[None]:
    """Inside this context a layer runs these, one after the other, before it runs itself again."""
    own, whole = vars(layer).get("forward"), layer.forward
    left = iter(calls)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        return next(left, whole)(*arguments, **keywords)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _attending_to_one(
    module: nn.Module, block: LastBlock, others: Sequence[int], seen: Attended
) -> Tensor:
    """What a block's attention makes if all tokens of the image but one are 0, for each of them.

    Returns:
        `[B, h · w, heads, Q, D]`.
    """
    assert block.layer is not None
    layer, whole = module.get_submodule(block.layer), module.get_submodule(block.name)
    nothing = next(iter(layer.parameters())).new_zeros(1, 1, seen.tokens.shape[2])
    with layer.register_forward_hook(lambda *_: nothing):
        key, value, _ = attended(lambda: whole(nothing))
    dtype = torch.promote_types(value.dtype, torch.float32)  # exponentials need it
    query, scores, values, key, value = (
        each.detach().to(dtype) for each in (seen.query, seen.scores, seen.value, key, value)
    )
    of_nothing = (query @ key.mT + (0 if seen.mask is None else seen.mask)).expand_as(scores)
    largest = torch.maximum(scores, of_nothing).amax(3, keepdim=True)
    one, zero = (scores - largest).exp(), (of_nothing - largest).exp()
    image = kept(scores.shape[3], others).to(scores.device)
    beside = one[..., list(others)]
    one, zero = one[..., image], zero[..., image]
    rest = zero.sum(3, keepdim=True) - zero  # of all the others
    total = beside.sum(3, keepdim=True) + one + rest
    always = (beside @ values[..., list(others), :])[:, :, :, None]
    own = one[..., None] * values[..., image, :][:, :, None]
    made = (always + own + rest[..., None] * value[:, :, None]) / total[..., None]
    return made.permute(0, 3, 1, 2, 4)


def find_alone(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    target: TargetLayer,
    block: LastBlock | None,
) -> Alone | None:
    """How to run a head by itself, if that says of a cell what the module says.

    Args:
        module: a network whose head pools the features first, or has a linear block.
        run: from images to logits, by the module.
        images: of random values, `[B, channels, H, W]`.
        target: the layer that the head begins behind.
        block: that block.
    """
    with torch.no_grad():
        with capture(module, images.shape[2:], [target], []) as captured, _Operations() as whole:
            run(images)
        features = captured.of(target)
        before = _calls_before(module, images, target if block is None else block)
        if before is None:
            return None
        with torch.no_grad(), pruned(module, block) as seen:
            if block is not None:
                run(images)
        alone = Alone(target, before, block)
        try:
            with _Operations() as of_cells:
                found = alone.of_cells(module, run, images, features, seen)[:, 0]
        except Exception:  # whatever the module says to a map of one cell, or to other batches
            return None
        only = torch.zeros_like(features)
        only[..., 0, 0] = features[..., 0, 0]
        with _replaced(module, target, only):
            expected = run(images)
    is_same = bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())
    is_cheap = of_cells.count <= _SHARE * whole.count
    return alone._replace(is_cheap=is_cheap) if is_same else None


@contextmanager
def _replaced(module: nn.Module, target: TargetLayer, features: Tensor) -> Iterator[None]:
    """Inside this context a layer gives other features."""
    calls = count()

    def replace(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
        return target.output(features, output) if next(calls) == target.call else None

    with module.get_submodule(target.name).register_forward_hook(replace):
        yield


class _Operations(TorchDispatchMode):
    """Counts the multiplications and additions of what runs inside this context."""

    def __init__(self) -> None:
        """Nothing has run yet."""
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # slow, and actors are given the answer

        self.registry = flop_registry
        self.count = 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
    ) -> Any:
        keywords = keywords or {}
        output = function(*arguments, **keywords)
        counted = self.registry.get(function.overloadpacket)
        if counted is not None:
            self.count += counted(*arguments, **keywords, out_val=output)
        return output


def _calls_before(
    module: nn.Module, images: Tensor, end: TargetLayer | LastBlock
) -> tuple[tuple[str, tuple[int, ...]], ...] | None:
    """The outermost calls that end before a layer does, or before a block begins.

    None if one of them gives anything else than one tensor.
    """
    frames: list[list[tuple[str, object]]] = []  # of each call that has begun, those inside it
    before: list[list[tuple[str, object]]] = []
    calls = count()

    def begin(name: str) -> Callable[..., None]:
        def beginning(*_: object) -> None:
            if isinstance(end, LastBlock) and name == end.name:
                before.extend(list(inside) for inside in frames)
            frames.append([])

        return beginning

    def leave(name: str) -> Callable[..., None]:
        def leaving(_layer: nn.Module, _inputs: object, output: object) -> None:
            frames.pop()
            if isinstance(end, TargetLayer) and name == end.name and next(calls) == end.call:
                before.extend(list(inside) for inside in frames)
            if frames:
                frames[-1].append((name, output.shape if isinstance(output, Tensor) else None))

        return leaving

    with ExitStack() as hooks:
        for name, layer in module.named_modules():
            hooks.callback(layer.register_forward_pre_hook(begin(name)).remove)
            hooks.callback(layer.register_forward_hook(leave(name)).remove)
        module(images)
    found = [call for inside in before for call in inside]
    shapes = [
        (name, tuple(shape[1:]))
        for name, shape in found
        if isinstance(shape, torch.Size) and shape[:1] == (len(images),)
    ]
    return tuple(shapes) if len(shapes) == len(found) else None
