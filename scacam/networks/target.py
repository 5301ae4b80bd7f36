"""The target layer: finding it by watching one forward pass, and capturing its output."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scacam.errors import NetworkError

__all__ = ["Capture", "TargetLayer", "capture", "find_target_layer"]


# Their output is their input, or is pooled already: never the features.
_NOT_FEATURES = (
    nn.Identity,
    nn.Flatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


class TargetLayer(NamedTuple):
    """A layer's output.

    Attributes:
        name: of the layer.
        call: which of its calls in one forward pass is meant; the first is 0.
        channels_last: whether it gives `[B, h, w, C]`, as the layers of a Swin transformer do.
    """

    name: str
    call: int = 0
    channels_last: bool = False


@dataclass
class Capture:
    """The target layer's output `[B, C, h, w]`, safe from what runs after it."""

    features: Tensor | None = None

    def of(self, target: TargetLayer) -> Tensor:
        """The features; raises NetworkError if the target layer did not run."""
        if self.features is None:
            raise NetworkError(f"layer {target.name!r} did not run in the forward pass")
        return self.features


@contextmanager
def capture(module: nn.Module, target: TargetLayer, *, differentiable: bool) -> Iterator[Capture]:
    """Capture the target layer's output in the forward pass run inside this context.

    With `differentiable`, the features become the leaf from which the graph of the head starts:
    run the module under `torch.no_grad()`, which is lifted once the features are there. The hook
    is removed on exit, also after an exception.
    """
    captured = Capture()
    calls = 0

    def hook(_layer: nn.Module, _inputs: object, output: object) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls != target.call + 1:
            return None
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise NetworkError(
                f"layer {target.name!r} gives {_described(output)}, not a spatial map "
                "[batch, channels, h, w]; name another target layer"
            )
        features = output.detach()
        if target.channels_last:
            features = features.permute(0, 3, 1, 2)
        captured.features = features
        if differentiable:
            torch.set_grad_enabled(True)
            features.requires_grad_()
        # What runs next may work in place: it gets a copy.
        copy = features.clone()
        return copy.permute(0, 2, 3, 1) if target.channels_last else copy

    handle = module.get_submodule(target.name).register_forward_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def find_target_layer(module: nn.Module, images: Tensor, name: str | None) -> TargetLayer:
    """The named layer, else the last one with a spatial output before the classifier."""
    calls: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def recorder(layer_name: str):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, _inputs: object, output: object) -> None:
            calls.append((layer_name, layer, tuple(getattr(output, "shape", ()))))

        return hook

    layers = {layer_name: layer for layer_name, layer in module.named_modules() if layer_name}
    if name is not None and name not in layers:
        raise NetworkError(f"the network has no layer {name!r}; it has {_shortened(layers)}")
    handles = [layer.register_forward_hook(recorder(key)) for key, layer in layers.items()]
    try:
        with torch.no_grad():
            logits = module(images)
    except Exception as error:  # the user's code may raise anything
        raise NetworkError(
            f"it does not run on images of shape {list(images.shape)}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise NetworkError(
            f"the network returns {_described(logits)}, not logits [batch, classes]; "
            "wrap it in a module that returns its logits"
        )
    if name is None:
        name = _last_spatial(calls, images.shape, classes=logits.shape[1])
    shapes = [shape for other, _, shape in calls if other == name]
    if not shapes:
        raise NetworkError(f"layer {name!r} did not run in the forward pass; name another")
    return TargetLayer(name, len(shapes) - 1, _is_channels_last(shapes[-1], images.shape))


def _is_channels_last(shape: tuple[int, ...], images: Sequence[int]) -> bool:
    """Whether a map has the aspect of the images as `[B, h, w, C]` rather than `[B, C, h, w]`."""
    if len(shape) != 4:
        return False
    _, first, second, third = shape
    aspect = math.log(images[2] / images[3])
    return abs(math.log(first / second) - aspect) < abs(math.log(second / third) - aspect)


def _last_spatial(
    calls: list[tuple[str, nn.Module, tuple[int, ...]]], images: Sequence[int], classes: int
) -> str:
    found = None
    spatial = None
    for name, layer, shape in calls:
        if isinstance(layer, nn.Linear | nn.Conv2d) and shape[1:2] == (classes,):
            found = spatial  # the classifier, unless another one follows
        if len(shape) != 4 or shape[0] != images[0] or isinstance(layer, _NOT_FEATURES):
            continue
        cells = shape[1:3] if _is_channels_last(shape, images) else shape[2:]
        if cells != (1, 1):
            spatial = name
    if found is None:
        raise NetworkError(
            "the network has no layer with a spatial output [batch, channels, h, w] before a "
            "linear or convolutional classifier; name a target layer"
        )
    return found


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    return f"a {type(output).__name__}"


def _shortened(names: dict[str, nn.Module]) -> str:
    shallow = [name for name in names if name.count(".") < 2]
    return ", ".join(shallow[-12:])
