"""A batch of images to logits and heatmaps: one forward pass, all methods, all top-k classes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scacam.errors import ScacamError
from scacam.methods import METHODS
from scacam.methods.gradients import Gradients
from scacam.networks import Network
from scacam.networks.head import differentiable
from scacam.networks.target import capture

__all__ = ["Explainer", "Explanation", "Observation", "observe"]


class Observation(NamedTuple):
    """What one forward pass shows of B images and K classes of each: all that methods weigh.

    Attributes:
        logits: `[B, classes]`.
        class_ids: int64 `[B, K]`, the top classes in falling order, then the label if given.
        features: `[B, C, h, w]`, in single precision at least.
        gradients: of the logits of `class_ids` with respect to the features.
        class_weights: `[B, K, C]`, or None where the network has none.
    """

    logits: Tensor
    class_ids: Tensor
    features: Tensor
    gradients: Gradients
    class_weights: Tensor | None


def observe(
    network: Network, images: Tensor, top_k: int, labels: Tensor | None = None
) -> Observation:
    """Run a network once and take what its target layer shows.

    Args:
        network: the network.
        images: float `[B, channels, H, W]`, preprocessed as the network wants.
        top_k: how many of the most probable classes to look at.
        labels: int64 `[B]`, one more class of each image; left out, none.

    Raises:
        ScacamError: the module is in training mode, where batch statistics would mix images; or
            there is not one label per image.
    """
    if any(layer.training for layer in network.module.modules()):
        raise ScacamError(f"{network.name} is in training mode; call network.module.eval()")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ScacamError(f"{len(images)} images need one label each, not {list(labels.shape)}")
    general = network.head.kind == "general"
    with torch.inference_mode(False), torch.no_grad():
        with (
            differentiable(network.module) if general else nullcontext(),
            capture(network.module, network.target_layer, differentiable=general) as captured,
        ):
            logits = network.logits(images)
        with _full_precision(images):
            leaf = captured.of(network.target_layer)
            features = _widened(leaf.detach())
            class_ids = logits.detach().topk(top_k).indices
            if labels is not None:
                class_ids = torch.cat([class_ids, labels[:, None]], dim=1)
            gradients = network.head.gradients(
                network.module, leaf if general else features, logits, class_ids
            )
            if isinstance(gradients, Tensor):
                gradients = _widened(gradients)
            weights = network.class_weights
            chosen = None if weights is None else weights[class_ids].to(features.dtype)
    return Observation(logits.detach(), class_ids, features, gradients, chosen)


def _full_precision(images: Tensor) -> torch.autocast:
    """Whatever the precision of the forward pass: what methods multiply is too small for less."""
    return torch.autocast(images.device.type, enabled=False)


def _widened(values: Tensor) -> Tensor:
    """In single precision, if it was half: sums over positions and channels need it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Explanation:
    """What a network said of a batch of B images, and where it looked for K classes.

    Attributes:
        logits: `[B, classes]`.
        class_ids: int64 `[B, K]`, the top classes in falling order, then the label if given.
        heatmaps: by method, `[B, K, h, w]`: raw, signed, before any ReLU. A method that the network
            does not support has no key.
    """

    logits: Tensor
    class_ids: Tensor
    heatmaps: dict[str, Tensor]


class Explainer:
    """Explains what a network says of images. Raises ScacamError for a method it does not know."""

    def __init__(
        self, network: Network, methods: Sequence[str] | None = None, top_k: int = 5
    ) -> None:
        """Choose the methods (by default all that the network supports) and the classes.

        Args:
            network: the network to explain.
            methods: names from `scacam.methods.METHODS`.
            top_k: how many of the most probable classes to explain, at most all.
        """
        unknown = [name for name in methods or () if name not in METHODS]
        if unknown:
            raise ScacamError(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
        if top_k < 1:
            raise ScacamError(f"top_k is the number of classes to explain, not {top_k}")
        self.network = network
        self.methods = tuple(name for name in methods or METHODS if network.supports(name))
        self.top_k = min(top_k, network.num_classes)

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Explanation:
        """Explain a batch.

        Args:
            images: float `[B, channels, H, W]`, preprocessed as the network wants.
            labels: int64 `[B]`, one more class of each image to explain; left out, none.

        Returns:
            The explanation, on the device of the images. It carries no autograd graph.

        Raises:
            ScacamError: as `observe`.
        """
        seen = observe(self.network, images, self.top_k, labels)
        with torch.no_grad(), _full_precision(images):
            heatmaps = {
                name: METHODS[name].function(seen.features, seen.gradients, seen.class_weights)
                for name in self.methods
            }
        return Explanation(seen.logits, seen.class_ids, heatmaps)
