"""The path from features to logits: the operations of the autograd graph, one after the other."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node

from scacam.networks.anatomy.output import SHAPING, operation

__all__ = ["LINEAR", "POOLING", "at_own_scale", "is_linear_at_own_scale", "path"]

# Operations of the autograd graph, without their suffix `Backward0`.
POOLING = {"Mean", "AvgPool2D"}
LINEAR = {"Addmm", "Mm", "Linear", "Convolution", "MkldnnConvolution"}
_OTHERS = {
    "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D", "AdaptiveMaxPool2D", "MaxPool2DWithIndices",
    "Relu", "LeakyRelu", "Elu", "Hardtanh", "Hardswish", "Silu", "Gelu", "Tanh", "Sigmoid", "Mul",
    "NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm", "Pow", "Clamp",
}  # fmt: skip
_SINGLE_PATH = SHAPING | POOLING | LINEAR | _OTHERS
_DIVISION = "Div"
_AT_OWN_SCALE = LINEAR | {
    _DIVISION, "NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "Mul",
}  # fmt: skip


def path(logits: Tensor, features: Tensor) -> list[Node]:
    """The operations from features to logits, if they are a single path of known ones.

    The division of a vector by its own length counts as one operation.
    """
    node, end = logits.grad_fn, features.grad_fn
    nodes: list[Node] = []
    while node is not None and node != end and "AccumulateGrad" not in node.name():
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        is_known = len(parents) == 1 and operation(node) in _SINGLE_PATH
        if not is_known and not _divides_by_length(node):
            return []
        nodes.append(node)
        node = parents[0]
    return nodes[::-1]


def _divides_by_length(node: Node) -> bool:
    if operation(node) != _DIVISION or len(node.next_functions) != 2:
        return False
    vector, length = (parent for parent, _ in node.next_functions)
    while length is not None and operation(length) in ("Expand", "Clamp", "ClampMin"):
        length = length.next_functions[0][0]
    if length is None or operation(length) not in ("LinalgVectorNorm", "Norm"):
        return False
    return length.next_functions[0][0] is vector


def is_linear_at_own_scale(operations: list[str]) -> bool:
    """Whether a path is pooling, then linear but for what it divides each image's vector by."""
    first, *rest = [step for step in operations if step not in SHAPING] or [""]
    return first in POOLING and bool(LINEAR & {*rest}) and {*rest} <= _AT_OWN_SCALE


@contextmanager
def at_own_scale(logits: Tensor, features: Tensor) -> Iterator[None]:
    """Inside this context, gradients to features take what an image is divided by for a constant.

    That is the length of a vector, or the standard deviation in a LayerNorm. So they are the
    weights of the linear map that the head is at the scale of each image (as Ali et al. 2022, XAI
    for Transformers: Better Explanations through Conservative Propagation, treat a LayerNorm).
    """

    def keep(node: Node) -> Callable[..., object] | None:
        if operation(node) == _DIVISION:
            return lambda inputs, _outputs: (inputs[0], torch.zeros_like(inputs[1]))
        if operation(node) == "NativeLayerNorm":
            return lambda inputs, outputs: (_centred(node, outputs[0]), *inputs[1:])
        return None

    with ExitStack() as hooks:
        for node in path(logits, features):
            if hook := keep(node):
                hooks.callback(node.register_hook(hook).remove)
        yield


def _centred(node: Node, gradients: Tensor) -> Tensor:
    """Of a LayerNorm `γ (x - mean(x)) / σ + β`, the gradient to x if σ is a constant."""
    weight, scale, shape = (
        getattr(node, f"_saved_{name}") for name in ("weight", "result2", "normalized_shape")
    )
    weighted = gradients if weight is None else gradients * weight
    axes = tuple(range(-len(shape), 0))
    return (weighted - weighted.mean(axes, keepdim=True)) * scale
