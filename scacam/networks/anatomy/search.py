"""The layers to look at, found by watching one forward pass."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.networks.anatomy.layer import TargetLayer, described
from scacam.networks.anatomy.tokens import shape_of_grid, unlike_images

__all__ = ["FoundLayers", "Reach", "find_layers"]

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


class Reach(NamedTuple):
    """How the logits depend on a layer.

    Attributes:
        reached: whether they do at all, on its map or on its image's tokens.
        straight: whether by a single path of pooling, linear and pointwise operations; or, of a
            map, whether all that they know of the image passes through it.
    """

    reached: bool
    straight: bool


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
    """A call of a layer in the watched forward pass, with the shapes that it takes and gives.

    `others` are the positions of the tokens that are no part of the image; None if what it gives
    is no token grid.
    """

    name: str
    layer: nn.Module
    taken: tuple[int, ...]
    given: tuple[int, ...]
    others: tuple[int, ...] | None


def find_layers(
    module: nn.Module,
    images: Tensor,
    names: Sequence[str],
    finer: str | None,
    reach: Callable[[TargetLayer, str | None], Reach],
) -> FoundLayers:
    """Find the layers to look at by watching a forward pass.

    Args:
        module: the network.
        images: `[B, channels, H, W]`.
        names: of the layers to explain; their last calls are taken. Without any it is the last
            layer with a spatial output before the classifier: a map, or tokens. The last tokens
            are taken where they are pooled; else, since the last block leaves all tokens but the
            class token unread, those of the last normalisation layer that the logits depend on.
        finer: name of the finer layer; left out, it is found.
        reach: says how the logits depend on a layer; it is told the name of the classifier if that
            is known.

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
            f"the network returns {described(logits)}, not logits [batch, classes]; "
            "wrap it in a module that returns its logits"
        )
    if names:
        explained = sorted({_last_call(calls, name) for name in names})
    else:
        explained = [_last_spatial(calls, images.shape, logits.shape[1], reach)]
    index: int | None
    if finer is not None:
        index = _last_call(calls, finer, of_maps=True)
    elif calls[explained[-1]].others is None:
        index = _find_finer(calls, explained, images.shape)
    else:
        index = None
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
    others: dict[int, tuple[int, ...]] = {}  # by how many tokens there are, when first seen

    def others_of(values: object) -> tuple[int, ...] | None:
        if not isinstance(values, Tensor) or values.ndim != 3 or len(values) != len(images):
            return None
        count = values.shape[1]
        if count not in others:
            others[count] = unlike_images(values)
        # A class token that was mixed already, and comes to a coarser grid, is where it was before.
        for known in (others[count], *reversed(others.values())):
            if shape_of_grid(count - len(known), images.shape[2:]):
                return known
        return None

    def recorder(name: str):  # type: ignore[no-untyped-def]
        def hook(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            taken = inputs[0] if inputs else None
            others_of(taken)
            before, after = (tuple(getattr(values, "shape", ())) for values in (taken, output))
            calls.append(_Call(name, layer, before, after, others_of(output)))

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


def _last_call(calls: list[_Call], name: str, of_maps: bool = False) -> int:
    found = [index for index, call in enumerate(calls) if call.name == name]
    if not found:
        raise NetworkError(f"layer {name!r} did not run in the forward pass; name another")
    call = calls[found[-1]]
    if len(call.given) != 4 and (of_maps or call.others is None):
        tokens = "" if of_maps else " and not the tokens of one [batch, tokens, channels]"
        raise NetworkError(
            f"the output of layer {name!r} is not a spatial map [batch, channels, h, w]{tokens}; "
            "name another layer"
        )
    return found[-1]


def _target(calls: list[_Call], index: int, images: Sequence[int]) -> TargetLayer:
    name, _, _, given, others = calls[index]
    earlier = sum(call.name == name for call in calls[:index])
    return TargetLayer(name, earlier, _is_channels_last(given, images), others)


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


def _last_spatial(
    calls: list[_Call],
    images: Sequence[int],
    classes: int,
    reach: Callable[[TargetLayer, str | None], Reach],
) -> int:
    classifiers = [
        index
        for index, call in enumerate(calls)
        if isinstance(call.layer, nn.Linear | nn.Conv2d) and call.given[1:2] == (classes,)
    ]
    end = classifiers[-1] if classifiers else None
    classifier = None if end is None else calls[end].name
    before = range(len(calls))[:end]
    maps = [index for index in before if _is_map(calls[index], images)]
    tokens = [
        index
        for index in before
        if calls[index].others is not None and not isinstance(calls[index].layer, _NOT_FEATURES)
    ]

    def found(index: int) -> Reach:
        return reach(_target(calls, index, images), classifier)

    last_map = maps[-1] if maps else -1
    if tokens and tokens[-1] > last_map and found(tokens[-1]).straight:
        return tokens[-1]
    norms = [index for index in tokens if _normalises(calls[index].layer)]
    for index in sorted([*norms, *maps[-1:]] if norms else [], reverse=True):
        if found(index).straight if index == last_map else found(index).reached:
            return index
    if not maps:
        raise NetworkError(
            "the network has no layer with a spatial output [batch, channels, h, w], or tokens of "
            "one [batch, tokens, channels], before a linear or convolutional classifier; name a "
            "target layer"
        )
    return maps[-1]


def _is_map(call: _Call, images: Sequence[int]) -> bool:
    return (
        len(call.given) == 4
        and call.given[0] == images[0]
        and not isinstance(call.layer, _NOT_FEATURES)
        and _cells(call.given, images) != (1, 1)
    )


def _normalises(layer: nn.Module) -> bool:
    """By its name: every library has normalisations of its own."""
    return any(word in type(layer).__name__.lower() for word in ("norm", "affine"))


def _shortened(names: dict[str, nn.Module]) -> str:
    shallow = [name for name in names if name.count(".") < 2]
    return ", ".join(shallow[-12:])
