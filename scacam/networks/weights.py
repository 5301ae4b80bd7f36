"""Weights from a file, local or on object storage, never running code that lies in it."""

import argparse
import io
import re

import safetensors.torch
import torch
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.storage import read_bytes

__all__ = ["is_checkpoint", "load_into", "num_classes_in", "read_state_dict"]

_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# Files published for torchvision's DenseNets still have the keys of 2017.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def is_checkpoint(weights: str) -> bool:
    """Whether this names a file rather than published weights."""
    return weights.endswith(_SUFFIXES) or "/" in weights


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Read a state dict, unwrapped from `state_dict` or `model`, its keys without `module.`.

    Args:
        path: a local path or an `s3://` uri of a `.safetensors` file or of one that `torch.save`
            wrote. It is read with `weights_only=True`.

    Raises:
        NetworkError: the file cannot be read, or holds anything but tensors by name.
    """
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise NetworkError(f"cannot read checkpoint {path}: {error}") from error
    try:
        state = _parse(path, data)
    except Exception as error:  # torch and safetensors raise many kinds for a broken file
        raise NetworkError(
            f"checkpoint {path} is no state dict that can be loaded without running code "
            f"({_reason(error)}); save the state dict alone"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise NetworkError(f"checkpoint {path} holds no state dict: a dict of tensors by name")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}


def _parse(path: str, data: bytes) -> object:
    if path.endswith(".safetensors"):
        return safetensors.torch.load(data)
    # The training scripts of torchvision and timm save their arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """What is wrong, out of a message that goes on about what else one could do."""
    found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if found:
        return f"it holds a {found[1]}"
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def num_classes_in(state: dict[str, Tensor], module: nn.Module) -> int | None:
    """The number of classes of a checkpoint, if it differs from the module's in nothing else.

    Returns:
        The one size in which the first dimension of some tensors differs, or None.
    """
    sizes = {
        state[key].shape[0]
        for key, value in module.state_dict().items()
        if key in state
        and state[key].shape != value.shape
        and state[key].shape[1:] == value.shape[1:]
    }
    return sizes.pop() if len(sizes) == 1 else None


def load_into(module: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load a state dict whose keys and shapes must be the module's.

    Raises:
        NetworkError: names the keys that differ.
    """
    own = module.state_dict()
    differences = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    told = [
        f"{what}: {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for what, keys in differences.items()
        if keys
    ]
    if told:
        raise NetworkError(
            f"checkpoint {path} does not fit {type(module).__name__}; {'; '.join(told)}"
        )
    module.load_state_dict(state)
