"""Every class activation map, one function each: a weighting of the same features.

All functions share one signature, `(features, gradients, class_weights) -> maps`:

* features `A`: `[B, C, h, w]`, the output of the target layer.
* gradients `G`: `[B, K, C, h, w]`, of the K explained classes' logits with respect to `A`; or
  `[B, K, C, 1, 1]` where they are the same at every position, as under global average pooling.
* class weights `w`: `[B, K, C]`, of the linear classifier on pooled features, or None.
* maps: `[B, K, h, w]`, raw and signed. ReLU, upsampling and normalisation come later, by name.

To add a method: write its function here, give it a row in `METHODS`, and test it.

References (equations are those of the SCA-CAM paper unless said otherwise):
    Si et al. 2021, Spatial-Channel Attention-Based Class Activation Mapping.
    Zhou et al. 2016, Learning Deep Features for Discriminative Localization.
    Selvaraju et al. 2017, Grad-CAM.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["METHODS", "Method", "feature_map", "gap_cam", "grad_cam", "sca_cam"]


def feature_map(features: Tensor, gradients: Tensor, class_weights: Tensor | None) -> Tensor:
    """Sum over channels, `Σ_k A_k`: the same for every class (Equation 1 with weight 1)."""
    return features.sum(1, keepdim=True).expand(-1, gradients.shape[1], -1, -1)


def gap_cam(features: Tensor, gradients: Tensor, class_weights: Tensor | None) -> Tensor:
    """`Σ_k w_k A_k` (Zhou et al. 2016; Equation 1).

    Raises:
        ValueError: the network has no class weights on pooled features.
    """
    if class_weights is None:
        raise ValueError("gap_cam needs class weights: a linear classifier on pooled features")
    return _weigh(class_weights[..., None, None], features)


def grad_cam(features: Tensor, gradients: Tensor, class_weights: Tensor | None) -> Tensor:
    """`Σ_k α_k A_k`, `α_k = mean(G_k)`, before the ReLU (Selvaraju et al. 2017; Equation 5)."""
    return _weigh(_averaged(gradients), features)


def sca_cam(features: Tensor, gradients: Tensor, class_weights: Tensor | None) -> Tensor:
    """`Σ_k α_k · (G_k ⊙ A_k)`: spatial times channel attention (Si et al. 2021; Equation 22)."""
    return _weigh(_averaged(gradients) * gradients, features)


def _averaged(gradients: Tensor) -> Tensor:
    """The averaged gradient `α`, `[B, K, C, 1, 1]` (Equation 5)."""
    return gradients.mean((3, 4), keepdim=True)


def _weigh(weights: Tensor, features: Tensor) -> Tensor:
    """`Σ_k weights_k ⊙ A_k` (Equation 1): the framework that all methods share."""
    if weights.shape[3:] == (1, 1):
        return torch.einsum("bkc,bchw->bkhw", weights[..., 0, 0], features)
    return (weights * features[:, None]).sum(2)


class Method(NamedTuple):
    """What the rest needs to know of a method.

    Attributes:
        function: from features, gradients and class weights to raw maps.
        relu: whether a ReLU on the map belongs to the method. Raw maps are before it.
        needs_class_weights: whether a network without class weights has no such map.
        paper: where the method comes from.
    """

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    relu: bool
    needs_class_weights: bool
    paper: str


METHODS: dict[str, Method] = {
    method.function.__name__: method
    for method in (
        Method(feature_map, relu=False, needs_class_weights=False, paper="Si et al. 2021"),
        Method(gap_cam, relu=False, needs_class_weights=True, paper="Zhou et al. 2016"),
        Method(grad_cam, relu=True, needs_class_weights=False, paper="Selvaraju et al. 2017"),
        Method(sca_cam, relu=False, needs_class_weights=False, paper="Si et al. 2021"),
    )
}
