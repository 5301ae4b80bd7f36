"""The layers to look at: finding them by watching one forward pass, and capturing their output."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scacam.errors import NetworkError

__all__ = ["Capture", "FoundLayers", "TargetLayer", "capture", "find_layers"]


# Their output is their input, padded perhaps, or is pooled already: never the features.
_NOT_FEATURES = (
    nn.Identity,
    nn.Flatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
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
    """Some layers' outputs `[B, C, h, w]`, safe from what runs after them."""

    features: dict[TargetLayer, Tensor] = field(default_factory=dict)

    def of(self, layer: TargetLayer) -> Tensor:
        """The features of a layer; raises NetworkError if it did not run."""
        if layer not in self.features:
            raise NetworkError(f"layer {layer.name!r} did not run in the forward pass")
        return self.features[layer]


@contextmanager
def capture(
    module: nn.Module, layers: Collection[TargetLayer], differentiable: Collection[TargetLayer]
) -> Iterator[Capture]:
    """Capture the output of layers in the forward pass run inside this context.

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
            if not isinstance(output, Tensor) or output.ndim != 4:
                raise NetworkError(
                    f"layer {layer.name!r} gives {_described(output)}, not a spatial map "
                    "[batch, channels, h, w]; name another target layer"
                )
            features = output.permute(0, 3, 1, 2) if layer.channels_last else output
            if layer in differentiable and not features.requires_grad:
                torch.set_grad_enabled(True)
                features = features.detach().requires_grad_()
            captured.features[layer] = features
            # What runs next may work in place: it gets a copy.
            copy = features.clone()
            return copy.permute(0, 2, 3, 1) if layer.channels_last else copy

        return module.get_submodule(layer.name).register_forward_hook(hook)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(hooked(layer).remove)
        yield captured


class FoundLayers(NamedTuple):
    """The layers of a network to look at.

    Attributes:
        explained: those whose features are weighed, in the order in which they run.
        finer: the finer layer of the last of them, or None.
        finer_shape: channels, height and width of the finer layer's output, or None.
    """

    explained: list[TargetLayer]
    finer: TargetLayer | None
    finer_shape: tuple[int, int, int] | None


class _Call(NamedTuple):
    """A call of a layer in the watched forward pass, with the shapes that it takes and gives."""

    name: str
    layer: nn.Module
    taken: tuple[int, ...]
    given: tuple[int, ...]


def find_layers(
    module: nn.Module, images: Tensor, names: Sequence[str], finer: str | None
) -> FoundLayers:
    """Find the layers to look at in one forward pass.

    Args:
        module: the network.
        images: `[B, channels, H, W]`.
        names: of the layers to explain; their last calls are taken. Without any it is the last
            layer with a spatial output before the classifier.
        finer: name of the finer layer; left out, it is found.

    Raises:
        NetworkError: a named layer does not exist, did not run or gives no spatial map, or the
            module does not return logits.
    """
    layers = {name: layer for name, layer in module.named_modules() if name}
    for name in (*names, *([] if finer is None else [finer])):
        if name not in layers:
            raise NetworkError(f"the network has no layer {name!r}; it has {_shortened(layers)}")
    calls, logits = _watched(module, layers, images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise NetworkError(
            f"the network returns {_described(logits)}, not logits [batch, classes]; "
            "wrap it in a module that returns its logits"
        )
    names = names or [_last_spatial(calls, images.shape, classes=logits.shape[1])]
    explained = sorted({_last_call(calls, name) for name in names})
    if finer is None:
        index = _find_finer(calls, explained, images.shape)
    else:
        index = _last_call(calls, finer)
    targets = [_target(calls, each, images.shape) for each in explained]
    if index is None:
        return FoundLayers(targets, None, None)
    found, shape = _target(calls, index, images.shape), calls[index].given
    height, width = _cells(shape, images.shape)
    return FoundLayers(targets, found, (shape[3 if found.channels_last else 1], height, width))


def _watched(
    module: nn.Module, layers: dict[str, nn.Module], images: Tensor
) -> tuple[list[_Call], object]:
    """The calls of layers in a forward pass, in the order in which they end, and what it gives."""
    calls: list[_Call] = []

    def recorder(name: str):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            taken = tuple(getattr(inputs[0], "shape", ())) if inputs else ()
            calls.append(_Call(name, layer, taken, tuple(getattr(output, "shape", ()))))

        return hook

    handles = [layer.register_forward_hook(recorder(key)) for key, layer in layers.items()]
    try:
        with torch.no_grad():
            return calls, module(images)
    except Exception as error:  # the user's code may raise anything
        raise NetworkError(
            f"it does not run on images of shape {list(images.shape)}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _last_call(calls: list[_Call], name: str) -> int:
    found = [index for index, call in enumerate(calls) if call.name == name]
    if not found:
        raise NetworkError(f"layer {name!r} did not run in the forward pass; name another")
    if len(calls[found[-1]].given) != 4:
        raise NetworkError(
            f"the output of layer {name!r} is not a spatial map [batch, channels, h, w]; "
            "name another layer"
        )
    return found[-1]


def _target(calls: list[_Call], index: int, images: Sequence[int]) -> TargetLayer:
    name, given = calls[index].name, calls[index].given
    earlier = sum(call.name == name for call in calls[:index])
    return TargetLayer(name, earlier, _is_channels_last(given, images))


def _find_finer(calls: list[_Call], explained: list[int], images: Sequence[int]) -> int | None:
    """The last call with twice the target layer's resolution, just before the layer that halves it.

    That layer is the outermost one that takes twice the resolution and gives the target's: a stage,
    a block or a pooling. What runs inside of it is passed over: the wide features of a bottleneck
    before its stride, say.
    """
    target = explained[-1]
    halves = _cells(calls[target].given, images)

    def is_double(shape: tuple[int, ...]) -> bool:
        if len(shape) != 4 or shape[0] != images[0]:
            return False
        # 2 n ± 1 become n by a stride of 2, 2 n + 2 by one without padding.
        return all(
            half < cells and 2 * half - 1 <= cells <= 2 * half + 2
            for cells, half in zip(_cells(shape, images), halves, strict=True)
        )

    halving = tuple(
        f"{call.name}."
        for call in calls
        if is_double(call.taken)
        and call.taken != tuple(images)
        and len(call.given) == 4
        and _cells(call.given, images) == halves
    )
    explained_names = {calls[index].name for index in explained}
    for index in reversed(range(target)):
        call = calls[index]
        # Maps are stored by the layer's name, which may not stand for two calls.
        if call.name in explained_names and index not in explained:
            continue
        if (
            is_double(call.given)
            and not isinstance(call.layer, _NOT_FEATURES)
            and not call.name.startswith(halving)
        ):
            return index
    return None


def _cells(shape: tuple[int, ...], images: Sequence[int]) -> tuple[int, int]:
    """Height and width of a spatial map."""
    height, width = shape[1:3] if _is_channels_last(shape, images) else shape[2:]
    return height, width


def _is_channels_last(shape: tuple[int, ...], images: Sequence[int]) -> bool:
    """Whether a map has the aspect of the images as `[B, h, w, C]` rather than `[B, C, h, w]`."""
    if len(shape) != 4:
        return False
    _, first, second, third = shape
    aspect = math.log(images[2] / images[3])
    return abs(math.log(first / second) - aspect) < abs(math.log(second / third) - aspect)


def _last_spatial(calls: list[_Call], images: Sequence[int], classes: int) -> str:
    found = None
    spatial = None
    for name, layer, _, shape in calls:
        if isinstance(layer, nn.Linear | nn.Conv2d) and shape[1:2] == (classes,):
            found = spatial  # the classifier, unless another one follows
        if len(shape) != 4 or shape[0] != images[0] or isinstance(layer, _NOT_FEATURES):
            continue
        if _cells(shape, images) != (1, 1):
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
