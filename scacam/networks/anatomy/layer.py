"""A layer's output as features `[B, C, h, w]`, captured in a forward pass."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scacam.errors import NetworkError
from scacam.networks.anatomy.tokens import grid_of, replaced

__all__ = ["Capture", "TargetLayer", "capture", "described"]


class TargetLayer(NamedTuple):
    """A layer's output.

    Attributes:
        name: of the layer.
        call: which of its calls in one forward pass is meant; the first is 0.
        channels_last: whether it gives `[B, h, w, C]`, as the layers of a Swin transformer do.
        others: where it gives tokens `[B, N, C]`, the positions of those that are no part of the
            image (class token, registers); None where it gives a map.
    """

    name: str
    call: int = 0
    channels_last: bool = False
    others: tuple[int, ...] | None = None

    def features(self, output: Tensor, size: Sequence[int]) -> Tensor:
        """What the layer gives of images of some height and width, as `[B, C, h, w]`."""
        if self.others is not None:
            return grid_of(output, self.others, size)
        return output.permute(0, 3, 1, 2) if self.channels_last else output

    def output(self, features: Tensor, output: Tensor) -> Tensor:
        """A copy of what the layer gives, with other features `[B, C, h, w]` in it."""
        if self.others is not None:
            return replaced(output, self.others, features)
        copy = features.clone()
        return copy.permute(0, 2, 3, 1) if self.channels_last else copy


@dataclass
class Capture:
    """Some layers' outputs `[B, C, h, w]`, safe from what runs after them."""

    features: dict[TargetLayer, Tensor] = field(default_factory=dict)

    def of(self, layer: TargetLayer) -> Tensor:
        """The features of a layer; raises NetworkError if it did not run."""
        if layer not in self.features:
            raise NetworkError(f"layer {layer.name!r} did not run in the forward pass")
        return self.features[layer]


@contextmanager
def capture(
    module: nn.Module,
    size: Sequence[int],
    layers: Collection[TargetLayer],
    differentiable: Collection[TargetLayer],
) -> Iterator[Capture]:
    """Capture the output of layers in the forward pass run inside this context.

    Args:
        module: the network.
        size: height and width of the images that it is given.
        layers: what to capture.
        differentiable: those of them with respect to which something is differentiated.

    The first of the `differentiable` ones to run becomes the leaf from which the graph of all that
    follows starts, even if the module runs it under `torch.no_grad()`, which is lifted then. The
    hooks are removed on exit, also after an exception.
    """
    captured = Capture()

    def hooked(layer: TargetLayer) -> RemovableHandle:
        calls = 0

        def hook(_layer: nn.Module, _inputs: object, output: object) -> Tensor | None:
            nonlocal calls
            calls += 1
            if calls != layer.call + 1:
                return None
            dimensions = 4 if layer.others is None else 3
            if not isinstance(output, Tensor) or output.ndim != dimensions:
                raise NetworkError(
                    f"layer {layer.name!r} gives {described(output)}, not a spatial map "
                    "[batch, channels, h, w]; name another target layer"
                )
            features = layer.features(output, size)
            if layer in differentiable and not features.requires_grad:
                torch.set_grad_enabled(True)
                features = features.detach().requires_grad_()
            captured.features[layer] = features
            # What runs next may work in place: it gets a copy.
            return layer.output(features, output)

        return module.get_submodule(layer.name).register_forward_hook(hook)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(hooked(layer).remove)
        yield captured


def described(output: object) -> str:
    """What a layer gives, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    return f"a {type(output).__name__}"
