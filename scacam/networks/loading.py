"""From a name and its weights to a network."""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scacam.errors import NetworkError
from scacam.networks.hub import from_hugging_face, from_open_clip
from scacam.networks.network import Network
from scacam.networks.weights import is_checkpoint, load_into, num_classes_in, read_state_dict
from scacam.networks.zoo import Recipe, find_recipe
from scacam.storage import absolute

__all__ = ["load_network"]

_SEED = 0
_CLASSES = 1000
"""Of a network with random weights, and of a checkpoint until its weights say otherwise."""


def load_network(
    name: str,
    weights: str = "DEFAULT",
    *,
    target_layer: str | Sequence[str] | None = None,
    finer_layer: str | None = None,
    categories: Sequence[str] | None = None,
    output_kind: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Network:
    """Load a network by name, its parameters frozen.

    Args:
        name: a network that `scacam.zoo` knows (torchvision's, `timm.NAME`, scacam's own), an image
            classifier of Hugging Face `hf.NAME`, a zero-shot classifier `open_clip.NAME`, or
            `package.module:factory`, a callable that returns an `nn.Module` or a `Network`. A
            network whose name has a slash is called by it with two hyphens there.
        weights: the name of published weights (`DEFAULT`, `IMAGENET1K_V1`, …), the path or `s3://`
            uri of a state-dict checkpoint, or `random` (from a fixed seed). A factory's `DEFAULT`
            is what it returns. Hugging Face's may be a folder that `save_pretrained` wrote.
        target_layer: the layer to explain, or several; left out, it is found.
        finer_layer: the finer layer; left out, it is found.
        categories: names of the classes; left out, those published with the network, if it has as
            many classes.
        output_kind: as `Network` takes it.
        prompts: the classes of a zero-shot classifier in words.

    Raises:
        NetworkError: no such network or weights, the weights do not fit, or the network cannot be
            explained (see `Network`).
    """
    rest = target_layer, finer_layer, categories, output_kind
    if ":" in name:
        network = _from_factory(name, weights, *rest)
    else:
        network = _from_recipe(name, weights, _recipe(name, weights, prompts), *rest)
    network.module.requires_grad_(False)
    network.rebuild = partial(
        load_network,
        name,
        absolute(weights) if is_checkpoint(weights) else weights,
        target_layer=target_layer,
        finer_layer=finer_layer,
        categories=categories,
        output_kind=output_kind,
        prompts=prompts,
    )
    return network


def _recipe(name: str, weights: str, prompts: Sequence[str] | None) -> Recipe:
    library, _, model = name.partition(".")
    if library == "hf":
        return from_hugging_face(model, weights)
    if library == "open_clip":
        return from_open_clip(model, weights, prompts)
    return find_recipe(name, weights)


def _from_recipe(
    name: str,
    weights: str,
    recipe: Recipe,
    target_layer: str | Sequence[str] | None,
    finer_layer: str | None,
    categories: Sequence[str] | None,
    output_kind: str | None,
) -> Network:
    if weights == "random":
        module = _seeded(partial(recipe.build, _CLASSES))
    elif is_checkpoint(weights) and not recipe.reads_files:
        module = _restored(recipe.build, weights)
    else:
        module, weights = recipe.publish(), recipe.weights
    network = Network(
        module,
        name=name.replace("/", "--"),  # it is the name of a folder
        target_layer=target_layer,
        finer_layer=finer_layer,
        preprocessing=recipe.preprocessing,
        categories=categories,
        weights=weights,
        output_kind=output_kind or recipe.output_kind,
    )
    if categories is None and network.num_classes == len(recipe.categories):
        network.categories = tuple(recipe.categories)
    return network


def _restored(build: Callable[[int], nn.Module], path: str) -> nn.Module:
    """A module with a checkpoint's weights, sized to its number of classes."""
    module = _seeded(partial(build, _CLASSES))
    state = read_state_dict(path, module)
    num_classes = num_classes_in(state, module)
    if num_classes is not None:
        module = _seeded(partial(build, num_classes))
    load_into(module, state, path)
    return module


def _from_factory(
    name: str,
    weights: str,
    target_layer: str | Sequence[str] | None,
    finer_layer: str | None,
    categories: Sequence[str] | None,
    output_kind: str | None,
) -> Network:
    package, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError) as error:
        raise NetworkError(f"cannot import network {name!r}: {error}") from error
    if weights == "random":
        raise NetworkError(f"{name}: a factory makes its own weights; leave out =random")
    made = _seeded(factory)
    if isinstance(made, Network):
        module, preprocessing = made.module, made.preprocessing
        categories = categories or made.categories
        output_kind = output_kind or made.output.kind
        if target_layer is None:
            target_layer = [explained.layer.name for explained in made.layers]
            if finer_layer is None and made.finer_layer is not None:
                finer_layer = made.finer_layer.name
    elif isinstance(made, nn.Module):
        module, preprocessing = made, None
    else:
        raise NetworkError(f"{name} returned a {type(made).__name__}, not a module or a Network")
    if is_checkpoint(weights):
        load_into(module, read_state_dict(weights, module), weights)
    elif weights != "DEFAULT":
        raise NetworkError(f"{name} has no weights {weights!r}; give the path of a checkpoint")
    return Network(
        module,
        name=name,
        target_layer=target_layer,
        finer_layer=finer_layer,
        preprocessing=preprocessing,
        categories=categories,
        weights=weights if is_checkpoint(weights) else "as made by the factory",
        output_kind=output_kind,
    )


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build()
