"""A batch of images to logits and heatmaps: one forward pass, all methods, all top-k classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scacam.errors import ScacamError
from scacam.heads import capture
from scacam.methods import METHODS
from scacam.networks import Network

__all__ = ["Explainer", "Explanation"]


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
            ScacamError: the module is in training mode, where batch statistics would mix images.
        """
        network = self.network
        if network.module.training:
            raise ScacamError(f"{network.name} is in training mode; call network.module.eval()")
        differentiable = network.head.kind == "general"
        with torch.no_grad():
            with capture(
                network.module, network.target_layer, differentiable=differentiable
            ) as captured:
                logits = network.module(images)
            features = captured.of(network.target_layer)
            class_ids = logits.detach().topk(self.top_k).indices
            if labels is not None:
                class_ids = torch.cat([class_ids, labels[:, None]], dim=1)
            with torch.set_grad_enabled(differentiable):
                gradients = network.head.gradients(network.module, features, logits, class_ids)
            features = features.detach()
            weights = network.class_weights
            chosen = None if weights is None else weights[class_ids]
            heatmaps = {
                name: METHODS[name].function(features, gradients, chosen) for name in self.methods
            }
        return Explanation(logits.detach(), class_ids, heatmaps)
