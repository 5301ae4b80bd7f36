"""From a name to a network: a module with its target layer, class weights and preprocessing."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.images import Preprocessing
from scacam.methods import METHODS
from scacam.networks.head import examine
from scacam.networks.weights import is_checkpoint, load_into, num_classes_in, read_state_dict
from scacam.networks.zoo import find_recipe

__all__ = ["Network", "load_network"]

_SEED = 0
_CLASSES = 1000
"""Of a network with random weights, and of a checkpoint until its weights say otherwise."""


class Network:
    """A classifier that can be explained.

    Attributes:
        name: what it is called in tables and reports.
        module: the plain `nn.Module`, in eval mode; it returns logits `[B, classes]`.
        weights: where its weights come from, in words.
        preprocessing: how it wants its images.
        categories: the names of its classes, or None.
        target_layer: the layer whose output the classifier pools, as name and call.
        head: what lies between that output and the logits.
        feature_shape: channels, height and width of the features of a preprocessed image.
        num_classes: how many logits there are.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        target_layer: str | None = None,
        preprocessing: Preprocessing | None = None,
        categories: Sequence[str] | None = None,
        weights: str = "as given",
    ) -> None:
        """Find the target layer and the class weights by running the module on random images.

        Args:
            module: a classifier that returns logits `[B, classes]`; it is put into eval mode.
            name: what to call it; left out, the name of its class.
            target_layer: name of the layer to explain; left out, it is found.
            preprocessing: left out, ImageNet's, for gray images where the module wants one channel.
            categories: names of the classes, one per logit.
            weights: where the weights come from.

        Raises:
            NetworkError: there is no spatial map that the classifier pools, the target layer does
                not exist, or the categories are not one per logit.
        """
        self.module = module.eval()
        self.name = name or type(module).__name__
        self.weights = weights
        self.preprocessing = preprocessing or _default_preprocessing(module)
        try:
            anatomy = examine(module, self._random_images(2), target_layer)
        except NetworkError as error:
            raise NetworkError(f"{self.name}: {error}") from error
        self.target_layer = anatomy.target_layer
        self.head = anatomy.head
        self.feature_shape = anatomy.feature_shape
        self.num_classes = anatomy.num_classes
        if target_layer is None and not anatomy.straight:
            raise NetworkError(
                f"{self.name}: no spatial map leads straight to its classifier (the last one is "
                f"the output of {self.target_layer.name!r}); name a target layer to explain it "
                "all the same"
            )
        if categories is not None and len(categories) != self.num_classes:
            raise NetworkError(
                f"{self.name}: {len(categories)} category names for {self.num_classes} classes"
            )
        self.categories = None if categories is None else tuple(categories)

    @property
    def class_weights(self) -> Tensor | None:
        """`[classes, C]`, from pooled channels to logits; None if the classifier is not linear."""
        return self.head.class_weights(self.module)

    def supports(self, method: str) -> bool:
        """Whether a method of `scacam.methods.METHODS` has maps for this network."""
        return self.head.kind != "general" or not METHODS[method].needs_class_weights

    def normalize(self, pixels: Tensor) -> Tensor:
        """From uint8 pixels `[B, H, W, channels]` to what the module wants, on the same device.

        The images stay channels-last in memory, in which convolutions are a quarter faster.
        """
        dtype = next(self.module.parameters()).dtype
        images = pixels.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32)) / 255
        mean = torch.tensor(self.preprocessing.mean).to(images)[:, None, None]
        std = torch.tensor(self.preprocessing.std).to(images)[:, None, None]
        return ((images - mean) / std).to(dtype)

    def digest(self) -> str:
        """SHA-256 of the state dict: names, types, shapes and values."""
        digest = hashlib.sha256()
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _random_images(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED)
        shape = (count, self.preprocessing.channels, *self.preprocessing.crop_size)
        return torch.randn(shape, generator=generator).to(next(self.module.parameters()))


def _default_preprocessing(module: nn.Module) -> Preprocessing:
    convolutions = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    first = next(convolutions, None)
    if first is not None and first.in_channels == 1:
        return Preprocessing(mean=(0.449,), std=(0.226,))
    return Preprocessing()


def load_network(
    name: str,
    weights: str = "DEFAULT",
    *,
    target_layer: str | None = None,
    categories: Sequence[str] | None = None,
) -> Network:
    """Load a network by name, its parameters frozen.

    Args:
        name: a network that `scacam.zoo` knows (torchvision's, `timm.NAME`, scacam's own), or
            `package.module:factory`, a callable that returns an `nn.Module` or a `Network`.
        weights: the name of published weights (`DEFAULT`, `IMAGENET1K_V1`, …), the path or `s3://`
            uri of a state-dict checkpoint, or `random` (from a fixed seed). A factory's `DEFAULT`
            is what it returns.
        target_layer: the layer to explain; left out, it is found.
        categories: names of the classes; left out, those published with the network, if it has as
            many classes.

    Raises:
        NetworkError: no such network or weights, the weights do not fit, or the network cannot be
            explained (see `Network`).
    """
    if ":" in name:
        network = _from_factory(name, weights, target_layer, categories)
    else:
        network = _from_recipe(name, weights, target_layer, categories)
    network.module.requires_grad_(False)
    return network


def _from_recipe(
    name: str, weights: str, target_layer: str | None, categories: Sequence[str] | None
) -> Network:
    recipe = find_recipe(name, weights)
    if weights == "random":
        module = _seeded(partial(recipe.build, _CLASSES))
    elif is_checkpoint(weights):
        module = _restored(recipe.build, weights)
    else:
        module, weights = recipe.publish(), recipe.weights
    network = Network(
        module,
        name=name,
        target_layer=target_layer,
        preprocessing=recipe.preprocessing,
        categories=categories,
        weights=weights,
    )
    if categories is None and network.num_classes == len(recipe.categories):
        network.categories = tuple(recipe.categories)
    return network


def _restored(build: Callable[[int], nn.Module], path: str) -> nn.Module:
    """A module with a checkpoint's weights, sized to its number of classes."""
    state = read_state_dict(path)
    module = _seeded(partial(build, _CLASSES))
    num_classes = num_classes_in(state, module)
    if num_classes is not None:
        module = _seeded(partial(build, num_classes))
    load_into(module, state, path)
    return module


def _from_factory(
    name: str, weights: str, target_layer: str | None, categories: Sequence[str] | None
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
        target_layer = target_layer or made.target_layer.name
    elif isinstance(made, nn.Module):
        module, preprocessing = made, None
    else:
        raise NetworkError(f"{name} returned a {type(made).__name__}, not a module or a Network")
    if is_checkpoint(weights):
        load_into(module, read_state_dict(weights), weights)
    elif weights != "DEFAULT":
        raise NetworkError(f"{name} has no weights {weights!r}; give the path of a checkpoint")
    return Network(
        module,
        name=name,
        target_layer=target_layer,
        preprocessing=preprocessing,
        categories=categories,
        weights=weights if is_checkpoint(weights) else "as made by the factory",
    )


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build()
