"""What a network returns, and how its logits and probabilities come from that.

Explained are logits. A module that ends in a softmax or sigmoid of its own is run with an eye on
that last step, whose input they are. A single logit z stands for two classes, class 1 with z and
class 0 with -z: their probabilities sigmoid(z) and sigmoid(-z) sum to 1, and each has its own map.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scacam.errors import NetworkError

__all__ = ["SHAPING", "Output", "both_classes", "eagerly", "look_at_output", "operation"]

# By the name of the function of torch, which function makes probabilities of its input.
_LAST_STEPS = {
    "softmax": "softmax",
    "log_softmax": "softmax",
    "sigmoid": "sigmoid",
    "expit": "sigmoid",
    "log_sigmoid": "sigmoid",
}
_ITS_LOGITS = "let it return its logits"

SHAPING = {
    "Clone", "View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "AsStrided",
    "Permute", "Transpose", "IndexCopy", "Slice", "Alias",
}  # fmt: skip
"""Operations of the autograd graph that leave the values as they are."""


@dataclass(frozen=True)
class Output:
    """How logits and probabilities come from what a module returns.

    Attributes:
        kind: the function from logits to probabilities, `softmax` or `sigmoid`.
        last_step: the step of the module itself that is left out, as torch calls it, since its
            input are the logits; None where the module returns them.
    """

    kind: str
    last_step: str | None = None

    def logits(self, module: nn.Module, images: Tensor) -> Tensor:
        """Run a module: logits `[B, classes]`, two for a module that has only one."""
        if self.last_step is None:
            return both_classes(module(images))
        with eagerly(), _LastStep() as seen:
            returned = module(images)
        return both_classes(seen.input.reshape(returned.shape))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of logits `[…, classes]`, in single precision; of `sigmoid` they need not sum to 1."""
        return logits.float().softmax(-1) if self.kind == "softmax" else logits.float().sigmoid()


def both_classes(logits: Tensor) -> Tensor:
    """`[B, 1]` as `[B, 2]`, the logits of class 0 and 1; more of them as they are."""
    return torch.cat([-logits, logits], dim=1) if logits.shape[1] == 1 else logits


class _LastStep(TorchFunctionMode):
    """Keeps input and output of the last softmax or sigmoid that runs inside this context."""

    name: str | None = None
    input: Tensor
    output: Tensor

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
    ) -> Any:
        output = function(*arguments, **(keywords or {}))
        name = getattr(function, "__name__", "").removeprefix("special_")
        if name in _LAST_STEPS:
            self.input = arguments[0] if arguments else (keywords or {})["input"]
            self.name, self.output = name, output
        return output


def eagerly() -> AbstractContextManager[object]:
    """Inside this context, what torch.compile made runs as it was written, and can be watched."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to load it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def look_at_output(
    module: nn.Module, images: Tensor, kind: str | None = None
) -> tuple[Output, Tensor]:
    """Run a module and see what it returns, by what it did last and by the numbers.

    Args:
        module: returns `[B, classes]`.
        images: random.
        kind: what somebody who knows says of it; left out, logits are those of a softmax, but for
            a single one, which is that of a sigmoid.

    Returns:
        The output, and the logits as the module has them `[B, classes]`, a single one too.

    Raises:
        NetworkError: it returns probabilities whose logits cannot be had, a softmax of a single
            output, or something else than `kind`.
    """
    if kind not in (None, "softmax", "sigmoid"):
        raise NetworkError(f"unknown output kind {kind!r}; known are softmax and sigmoid")
    with _LastStep() as seen:
        returned = module(images)
    if not returned.is_floating_point():
        raise NetworkError(f"it returns {returned.dtype}; {_ITS_LOGITS}")
    last_step = None
    if seen.name is not None and _same(seen.output, returned):
        last_step = seen.name
        found = _LAST_STEPS[last_step]
        if kind not in (None, found):
            raise NetworkError(f"it ends in {last_step}, so its output is not of kind {kind}")
        kind = found
    elif made := _probabilities(returned, known=kind is not None):
        raise NetworkError(f"it returns {made}, whose logits cannot be had; {_ITS_LOGITS}")
    if kind == "softmax" and returned.shape[1] == 1:
        raise NetworkError(f"the softmax of its single output is always 1; {_ITS_LOGITS}")
    if kind is None:
        kind = "sigmoid" if returned.shape[1] == 1 else "softmax"
    output = Output(kind, last_step)
    if last_step is None:
        return output, returned
    logits = seen.input.reshape(returned.shape)
    made = returned.float().exp() if last_step.startswith("log") else returned.float()
    if not torch.allclose(output.probabilities(logits), made, atol=1e-2, equal_nan=True):
        raise NetworkError(f"its {last_step} is not one over all its classes; {_ITS_LOGITS}")
    return output, logits


def _same(one: Tensor, other: Tensor) -> bool:
    """The same values in the same order, whatever the shape."""
    return one.numel() == other.numel() and torch.allclose(
        one.flatten(), other.flatten(), rtol=0, atol=0, equal_nan=True
    )


def _probabilities(returned: Tensor, known: bool) -> str | None:
    """What a module returns that are no logits, in words; by numbers only if nobody knows."""
    node = returned.grad_fn
    while node is not None and operation(node) in SHAPING:
        node = node.next_functions[0][0]
    last = None if node is None else operation(node)
    if last in ("Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid"):
        return f"the result of a {last} that works in place or is compiled"
    if known or returned.shape[1] == 1:
        return None
    tolerance = max(1e-4, torch.finfo(returned.dtype).eps)
    values = returned.detach().float()
    if (values >= 0).all() and ((values.sum(1) - 1).abs() < tolerance).all():
        return "probabilities (on random images they sum to 1)"
    if ((values.exp().sum(1) - 1).abs() < tolerance).all():
        return "log-probabilities (on random images their exponentials sum to 1)"
    return None


def operation(node: torch.autograd.graph.Node) -> str:
    """What a node of the autograd graph does, without the suffix `Backward0`."""
    return node.name().split("Backward")[0].rstrip("0123456789")
