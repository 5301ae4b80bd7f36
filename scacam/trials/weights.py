"""A network's weights drawn anew, for a while: what its maps owe to what it learned."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from scacam.networks import Network

__all__ = ["drawn_anew", "redrawn"]

_SEED = 0


@lru_cache(maxsize=2)
def redrawn(network: Network, only_head: bool) -> dict[str, Tensor]:
    """Random weights for a network, or for its classifier alone, from a fixed seed.

    Matrices and kernels are normal, scaled as He et al. 2015 do, so that signals keep their size
    through any depth; the weights and variances of normalisations are 1, all biases and means 0.
    What is none of these, such as the scale of a layer, stays as it is.

    Args:
        network: the network.
        only_head: whether to draw only the classifier's weights: the first step of a cascading
            randomisation (Adebayo et al. 2018, Sanity Checks for Saliency Maps).

    Returns:
        New tensors by the names of parameters and buffers, on their devices.
    """
    prefix = f"{_classifier(network)}." if only_head else ""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = {}
    for name, tensor in _tensors(network.module).items():
        if not name.startswith(prefix) or not tensor.is_floating_point():
            continue
        last = name.rpartition(".")[2]
        if tensor.ndim > 1:
            scale = math.sqrt(2 * len(tensor) / tensor.numel())
            drawn[name] = scale * torch.randn(tensor.shape, generator=generator)
        elif last in ("weight", "running_var"):
            drawn[name] = torch.ones(tensor.shape)
        elif last in ("bias", "running_mean"):
            drawn[name] = torch.zeros(tensor.shape)
    return {name: new.to(_tensors(network.module)[name]) for name, new in drawn.items()}


@contextmanager
def drawn_anew(network: Network, drawn: dict[str, Tensor]) -> Iterator[None]:
    """Inside this context the network has those weights; afterwards its own, whatever happens."""
    tensors = _tensors(network.module)
    own = {name: tensors[name].data for name in drawn}
    try:
        for name, new in drawn.items():
            tensors[name].data = new
        yield
    finally:
        for name, old in own.items():
            tensors[name].data = old


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _classifier(network: Network) -> str:
    """The name of the layer whose weights are the classifier's."""
    if network.head.classifier is not None:
        return network.head.classifier
    layers = [
        name
        for name, layer in network.module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    return layers[-1]
