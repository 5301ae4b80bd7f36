"""Weights from a file, local or on object storage, never running code that lies in it.

Training scripts save them in many wrappings: under a name beside the optimizer, their keys behind a
prefix (`module.`, `_orig_mod.`, `model.`), beside a loss or auxiliary heads. What is meant is found
by comparing keys with those of the module, all of which must be there, once.
"""

import argparse
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.storage import read_bytes

__all__ = ["is_checkpoint", "load_into", "num_classes_in", "read_state_dict"]

logger = logging.getLogger("scacam")

_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar")
# Where the weights themselves are, by preference; elsewhere may be their averages, say.
_WRAPPERS = ("", "state_dict", "model_state_dict", "model")
_UNPREFERRED = len(_WRAPPERS)
_LFS_POINTER = b"version https://git-lfs.github.com/"
# Files published for torchvision's DenseNets still have the keys of 2017.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
# Missing in files from before PyTorch 0.4.1; PyTorch fills it in, and only training reads it.
_COUNTER = re.compile(r"(.*\.)?num_batches_tracked$")
# The heads that torchvision's Inception and GoogLeNet have while they are trained.
_AUXILIARY = re.compile(r"aux[^.]*\.", re.IGNORECASE)
# What AveragedModel, thop and the loss of a LightningModule leave beside the weights.
_BESIDE = re.compile(
    r"(.*\.)?(n_averaged|total_ops|total_params)$|(\w+_)?(criterion|loss|loss_fn)\."
)


def is_checkpoint(weights: str) -> bool:
    """Whether this names a file, or a folder, rather than published weights."""
    if weights.endswith(_SUFFIXES) or "/" in weights:
        return True
    return weights not in ("DEFAULT", "random") and Path(weights).exists()


def read_state_dict(path: str, module: nn.Module) -> dict[str, Tensor]:
    """Read from a file the state dict of a module, for `load_into`.

    What was taken off its keys or left out is logged.

    Args:
        path: a local path or an `s3://` uri of a `.safetensors` file or of one that `torch.save`
            wrote. It is read with `weights_only=True`.
        module: whose keys are looked for; shapes are not compared.

    Raises:
        NetworkError: the file cannot be read, holds anything but tensors by name, or has the
            module's keys more than once.
    """
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise NetworkError(f"cannot read checkpoint {path}: {error}") from error
    if data.startswith(_LFS_POINTER):
        raise NetworkError(f"checkpoint {path} is a pointer of Git LFS; run git lfs pull")
    try:
        held = _parse(path, data)
    except Exception as error:  # torch and safetensors raise many kinds for a broken file
        raise NetworkError(
            f"checkpoint {path} is no state dict that can be loaded without running code "
            f"({_reason(error)}); save the state dict alone"
        ) from error
    own = module.state_dict()
    found = [_match(where, state, own) for where, state in _state_dicts(held)]
    if not found:
        entries = f"; it has {_listed([*held])}" if isinstance(held, dict) and held else ""
        raise NetworkError(
            f"checkpoint {path} holds no state dict: a dict of tensors by name{entries}"
        )
    found.sort(key=lambda match: _preference(match.where))
    fitting = [match for match in found if match.fits]
    best = fitting[0] if fitting else max(found, key=lambda match: match.known)
    doubles = [] if fitting else best.prefixes
    if fitting and _preference(best.where) == _UNPREFERRED:
        doubles = [match.where for match in fitting]
    if len(doubles) > 1:
        raise NetworkError(
            f"checkpoint {path} has weights for {type(module).__name__} more than once, under "
            f"{' and '.join(map(repr, doubles))}; save those alone that are meant"
        )
    if fitting:
        _tell(path, best, [match.where for match in fitting[1:]], own)
    return best.state


class _Match(NamedTuple):
    """How a state dict compares with the keys of a module.

    Attributes:
        where: the names that lead to it in the file.
        prefix: what was taken off its keys.
        prefixes: what could have been.
        known: how many keys the module has as well.
        left_out: keys of things that are known not to matter.
        state: the tensors by their other keys.
        fits: whether these are the module's, counters and auxiliary heads aside.
    """

    where: str
    prefix: str
    prefixes: list[str]
    known: int
    left_out: list[str]
    state: dict[str, Tensor]
    fits: bool


def _match(where: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> _Match:
    needed = {key for key in own if not _COUNTER.match(key) and not _AUXILIARY.match(key)}
    counts = Counter(
        key[:start]
        for key in state
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key)))
        if key[start:] in needed
    )
    prefix = max(counts, key=lambda prefix: counts[prefix], default="")
    kept: dict[str, Tensor] = {}
    unexpected: dict[str, Tensor] = {}
    left_out = []
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name in own:
            kept[name] = value
        elif _BESIDE.match(key) or (key.startswith(prefix) and _AUXILIARY.match(name)):
            left_out.append(key)
        else:
            unexpected[key] = value
    return _Match(
        where,
        prefix,
        [other for other in counts if counts[other] == len(needed) or other in ("", prefix)],
        known=len(kept),
        left_out=left_out,
        state=unexpected | kept,
        fits=not unexpected and needed <= kept.keys(),
    )


def _preference(where: str) -> int:
    names = where.split("/")
    return _WRAPPERS.index(names[0]) if set(names) <= set(_WRAPPERS) else _UNPREFERRED


def _state_dicts(held: object, where: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All dicts of tensors by name, after the names that lead to them."""
    if not isinstance(held, dict) or not held:
        return
    if all(isinstance(key, str) and isinstance(held[key], Tensor) for key in held):
        yield where, {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in held.items()}
        return
    for name, inner in held.items():
        yield from _state_dicts(inner, f"{where}/{name}" if where else str(name))


def _tell(path: str, match: _Match, others: list[str], own: dict[str, Tensor]) -> None:
    missing = [key for key in own if key not in match.state]
    told = {
        "taken from": [match.where] if _preference(match.where) == _UNPREFERRED else [],
        "not from": others,
        "without the prefix": [match.prefix] if match.prefix else [],
        "left out": match.left_out,
        "filled in": [key for key in missing if _COUNTER.match(key)],
        "taken off the network": [key for key in missing if not _COUNTER.match(key)],
    }
    parts = [f"{what} {_listed(names)}" for what, names in told.items() if names]
    if parts:
        logger.info("checkpoint %s: %s", path, "; ".join(parts))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(str, names[:4])) + more


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

    `num_batches_tracked` may be missing, as in PyTorch, and so may auxiliary heads, which the
    module then loses, as torchvision takes them off.

    Raises:
        NetworkError: names the keys that differ.
    """
    heads = {
        key.partition(".")[0]
        for key in module.state_dict()
        if _AUXILIARY.match(key) and not _COUNTER.match(key) and key not in state
    }
    for head in heads:
        setattr(module, head, None)
    own = module.state_dict()
    differences = {
        "missing": [key for key in own if key not in state and not _COUNTER.match(key)],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    told = [f"{what}: {_listed(keys)}" for what, keys in differences.items() if keys]
    if told:
        raise NetworkError(
            f"checkpoint {path} does not fit {type(module).__name__}; {'; '.join(told)}"
        )
    module.load_state_dict(own | state)
