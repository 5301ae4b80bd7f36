"""Every class activation map, one function each: a weighting of the same features.

All functions share one signature, `(features, gradients, class_weights) -> maps`:

* features `A`: `[B, C, h, w]`, the output of the target layer.
* gradients `G`: `[B, K, C, h, w]`, of the K explained classes' logits with respect to `A`; or
  `[B, K, C, 1, 1]` where they are the same at every position, as under global average pooling; or
  `scacam.gradients.MaskedGradients`.
* class weights `w`: `[B, K, C]`, of the linear classifier on pooled features, or None. Where
  a head divides what it pools by a number of each image's own (a LayerNorm, the length of an
  embedding), they are those of the linear map that it is with that number.
* maps: `[B, K, h, w]`, raw and signed. ReLU, upsampling and normalisation come later, by name.

But for `extent_cam`, which takes the maps of another method and the features of a finer layer, and
for the methods of `linear_head`, which ask more of the head, and of `attention`.

To add a method: write its function here, give it a row in `METHODS`, and test it.

References (equations are those of the SCA-CAM paper unless said otherwise):
    Si et al. 2021, Spatial-Channel Attention-Based Class Activation Mapping.
    Zhou et al. 2016, Learning Deep Features for Discriminative Localization.
    Selvaraju et al. 2017, Grad-CAM.
    Chattopadhay et al. 2018, Grad-CAM++.
    Draelos and Carin 2020, Use HiResCAM instead of Grad-CAM.
    Fu et al. 2020, Axiom-based Grad-CAM.
    Muhammad and Yeasin 2020, Eigen-CAM.
    Jiang et al. 2021, LayerCAM.
    Gildenblat 2021, the library pytorch-grad-cam, for the two that have no paper.
    Bae et al. 2020, Rethinking Class Activation Mapping for Weakly Supervised Object Localization.
    Chen et al. 2022, Self-supervised Image-specific Prototype Exploration (SIPE).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scacam.methods.attention import attention_rollout, legrad
from scacam.methods.eigen import first_component
from scacam.methods.gradients import (
    Gradients,
    MaskedGradients,
    Product,
    averaged,
    elementwise,
    pooled_product,
    product,
    weigh,
    weigh_product,
)
from scacam.methods.linear_head import ablation_cam, finer_cam, recipro_cam

__all__ = [
    "DEFAULT_METHODS",
    "METHODS",
    "Method",
    "ablation_cam",
    "attention_rollout",
    "eigen_cam",
    "eigen_grad_cam",
    "extent_cam",
    "feature_map",
    "finer_cam",
    "gap_cam",
    "grad_cam",
    "grad_cam_elementwise",
    "grad_cam_pp",
    "hires_cam",
    "layer_cam",
    "legrad",
    "nwc_cam",
    "recipro_cam",
    "sca_cam",
    "sca_cam_signed",
    "xgrad_cam",
]

_NOTHING = 1e-6
"""As much as rounding makes of nothing, where numbers are about 1."""


def feature_map(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """Sum over channels, `Σ_k A_k`: the same for every class (Equation 1 with weight 1)."""
    return _for_every_class(features.sum(1, keepdim=True), gradients)


def gap_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k w_k A_k` (Zhou et al. 2016; Equation 1).

    Raises:
        ValueError: the network has no class weights on pooled features.
    """
    if class_weights is None:
        raise ValueError("gap_cam needs class weights: a linear classifier on pooled features")
    return weigh(class_weights, features)


def nwc_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k relu(w_k) A_k`: no channel that speaks against the class counts (Bae et al. 2020).

    Raises:
        ValueError: the network has no class weights on pooled features.
    """
    if class_weights is None:
        raise ValueError("nwc_cam needs class weights: a linear classifier on pooled features")
    return weigh(class_weights.relu(), features)


def grad_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k α_k A_k`, `α_k = mean(G_k)`, before the ReLU (Selvaraju et al. 2017; Equation 5)."""
    return weigh(averaged(gradients), features)


def sca_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k α_k · (G_k ⊙ A_k)`: spatial times channel attention (Si et al. 2021; Equation 22)."""
    return weigh_product(gradients, features, averaged(gradients))


def sca_cam_signed(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k |α_k| · (G_k ⊙ A_k)`: SCA-CAM that keeps the sign which `α_k · G_k` squares away.

    Behind global average pooling SCA-CAM is `Σ_k w_k² A_k / Z²`, where channels that speak against
    the class add to its map; here it is `Σ_k |w_k| w_k A_k / Z²`.
    """
    return weigh_product(gradients, features, averaged(gradients).abs())


def hires_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k G_k ⊙ A_k`, before the ReLU (Draelos and Carin 2020)."""
    return weigh_product(gradients, features)


def grad_cam_elementwise(
    features: Tensor, gradients: Gradients, class_weights: Tensor | None
) -> Tensor:
    """`Σ_k relu(G_k ⊙ A_k)` (Gildenblat 2021)."""
    # relu(G A) = relu(G) relu(A) + relu(-G) relu(-A)
    speaking_for = elementwise(torch.relu, gradients)
    if not (features.amin((1, 2, 3)) < 0).any():
        return weigh_product(speaking_for, features)
    against = elementwise(lambda values: (-values).relu(), gradients)
    return weigh_product(speaking_for, features.relu()) + weigh_product(against, (-features).relu())


def grad_cam_pp(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k (Σ_ij a_k relu(G_k)) A_k`, before the ReLU (Chattopadhay et al. 2018, Equation 19).

    `a_k = G_k² / (2 G_k² + (Σ_ij A_k) G_k³)`, reduced by `G_k²`, which would underflow; no ε is
    added. It is 0 where `G_k` is, and where the denominator is.
    """
    sums = features.sum((2, 3))[:, None, :, None, None]

    def weighted(values: Tensor) -> Tensor:
        positive = values.relu()
        denominators = 2 + sums * positive
        return torch.where(denominators == 0, 0, positive / denominators)

    cells = features.shape[2] * features.shape[3]
    return weigh(averaged(elementwise(weighted, gradients)) * cells, features)


def xgrad_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k (Σ_ij G_k ⊙ A_k / Σ_ij A_k) A_k`, before the ReLU (Fu et al. 2020).

    Where a channel cancels, that is `|Σ_ij A_k|` is within the rounding error of that sum, there is
    no such average over the channel and the plain one, `α_k`, takes its place.
    """
    sums = features.sum((2, 3))[:, None]
    magnitudes = features.abs().sum((2, 3))[:, None]
    cells = features.shape[2] * features.shape[3]
    cancelled = sums.abs() <= cells * torch.finfo(features.dtype).eps * magnitudes
    averages = pooled_product(gradients, features) / torch.where(cancelled, 1, sums)
    return weigh(torch.where(cancelled, averaged(gradients), averages), features)


def layer_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """`Σ_k relu(G_k) ⊙ A_k`, before the ReLU (Jiang et al. 2021)."""
    return weigh_product(elementwise(torch.relu, gradients), features)


def eigen_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """The features' first principal component (Muhammad and Yeasin 2020).

    The same for every class. Its sign is the one that correlates positively with `Σ_k A_k`.
    """
    weights = features.new_ones(len(features), 1, features.shape[1])
    maps = first_component(Product(features, weights, None))
    return _for_every_class(_aligned(maps, features.sum(1, keepdim=True)), gradients)


def eigen_grad_cam(features: Tensor, gradients: Gradients, class_weights: Tensor | None) -> Tensor:
    """The first principal component of `G ⊙ A`, before the ReLU (Gildenblat 2021).

    Its sign is the one that correlates positively with `Σ_k G_k ⊙ A_k`.
    """
    sums = weigh_product(gradients, features)
    return _aligned(first_component(product(gradients, features)).reshape(sums.shape), sums)


def extent_cam(cams: Tensor, finer_features: Tensor, rounds: int = 3) -> Tensor:
    """Where an image looks like the inside of a class map, and the map is positive.

    With `z = F / ‖F‖` at each position of the finer features and `c = top(cam)`, enlarged to them:

        m = c, then in each round
        p = Σ m z / Σ m - Σ (1 - m) z / Σ (1 - m)
        m = √(top(z · p) · c)

    where `top(x) = relu(x) / max relu(x)`, 0 where nothing is positive: a nearest-mean classifier
    of inside and outside, fitted to this one image. The idea of prototypes of one image is that of
    Chen et al. 2022. It shows the extent of the object rather than evidence for the class.

    Args:
        cams: class maps `[B, K, h, w]`, of `gap_cam` or any other method, before the ReLU.
        finer_features: `F`, `[B, C, H, W]`, of a layer with about twice their resolution.
        rounds: how often inside and outside are told apart anew.

    Returns:
        Maps `[B, K, H, W]` between 0 and 1; zeros where the class map is nowhere positive.
    """
    size = finer_features.shape[2:]
    features = finer_features.flatten(2)
    # Not vector_norm, which is ten times slower over an axis that is not the last in memory.
    lengths = features.square().sum(1, keepdim=True).sqrt()
    lengths = lengths.clamp(min=torch.finfo(features.dtype).tiny)
    tiny = torch.finfo(cams.dtype).tiny
    cams = F.interpolate(cams, size, mode="bilinear", align_corners=False)
    classes = _top(cams.flatten(2), tiny)
    cells = features.shape[2]
    maps = classes
    for _ in range(rounds):
        inside = maps.sum(2, keepdim=True)
        outside = cells - inside
        # p is a multiple of Σ (m - mean(m)) z: one product in place of two, and nothing cancels.
        mean = torch.where(outside > _NOTHING, inside / cells, 0)
        multiple = 1 / inside.clamp(min=_NOTHING)
        multiple = torch.where(outside > _NOTHING, multiple * cells / outside, multiple)
        prototype = multiple * (((maps - mean) / lengths) @ features.mT)
        likeness = prototype @ features / lengths
        maps = (_top(likeness, _NOTHING) * classes).sqrt()
    return maps.unflatten(2, size)


def _top(values: Tensor, nothing: float) -> Tensor:
    """`relu(x) / max relu(x)` over the last axis, 0 where that maximum is `nothing` or less."""
    positive = values.relu()
    largest = positive.amax(2, keepdim=True)
    return torch.where(largest <= nothing, 0, positive / largest)


def _for_every_class(maps: Tensor, gradients: Gradients) -> Tensor:
    values = gradients.values if isinstance(gradients, MaskedGradients) else gradients
    return maps.expand(-1, values.shape[1], -1, -1)


def _aligned(maps: Tensor, sums: Tensor) -> Tensor:
    """The maps, whose mean is 0, or their opposites: whichever correlates positively with sums."""
    covariance = (maps * sums).sum((2, 3), keepdim=True)
    return torch.where(covariance < 0, -maps, maps)


class Method(NamedTuple):
    """What the rest needs to know of a method.

    Attributes:
        function: from features, gradients and class weights to raw maps; if it needs the finer
            layer, from class maps and the finer layer's features; if it needs the head, from
            features and a `LinearHead`, or a `GeneralHead` where it needs no class weights; if it
            needs attention, from an `Attention`.
        relu: whether a ReLU on the map belongs to the method. Raw maps are before it.
        needs_class_weights: whether a network without class weights has no such map.
        paper: where the method comes from.
        needs_finer_layer: whether it has maps of a network that has a finer layer, and of its
            resolution.
        needs_head: whether it asks the head for more than the weights of the explained classes.
        needs_attention: of which blocks of a transformer it takes the attention.
        by_name: whether it costs so much that it has to be asked for.
    """

    function: Callable[..., Tensor]
    relu: bool
    needs_class_weights: bool
    paper: str
    needs_finer_layer: bool = False
    needs_head: bool = False
    needs_attention: Literal["none", "last", "all"] = "none"
    by_name: bool = False


_of_head = partial(Method, needs_head=True)

METHODS: dict[str, Method] = {
    method.function.__name__: method
    for method in (
        Method(feature_map, relu=False, needs_class_weights=False, paper="Si et al. 2021"),
        Method(gap_cam, relu=False, needs_class_weights=True, paper="Zhou et al. 2016"),
        Method(grad_cam, relu=True, needs_class_weights=False, paper="Selvaraju et al. 2017"),
        Method(sca_cam, relu=False, needs_class_weights=False, paper="Si et al. 2021"),
        Method(sca_cam_signed, relu=False, needs_class_weights=False, paper="after Si et al. 2021"),
        Method(hires_cam, relu=True, needs_class_weights=False, paper="Draelos and Carin 2020"),
        Method(grad_cam_elementwise, relu=True, needs_class_weights=False, paper="Gildenblat 2021"),
        Method(grad_cam_pp, relu=True, needs_class_weights=False, paper="Chattopadhay et al. 2018"),
        Method(xgrad_cam, relu=True, needs_class_weights=False, paper="Fu et al. 2020"),
        Method(layer_cam, relu=True, needs_class_weights=False, paper="Jiang et al. 2021"),
        Method(eigen_cam, relu=False, needs_class_weights=False, paper="Muhammad and Yeasin 2020"),
        Method(eigen_grad_cam, relu=True, needs_class_weights=False, paper="Gildenblat 2021"),
        Method(nwc_cam, relu=False, needs_class_weights=True, paper="Bae et al. 2020"),
        _of_head(recipro_cam, relu=False, needs_class_weights=False, paper="Byun and Lee 2024"),
        _of_head(
            ablation_cam, relu=True, needs_class_weights=True, paper="Desai and Ramaswamy 2020"
        ),
        _of_head(finer_cam, relu=True, needs_class_weights=True, paper="Zhang et al. 2025"),
        Method(
            legrad,
            relu=False,
            needs_class_weights=False,
            paper="Bousselham et al. 2025",
            needs_attention="last",
        ),
        Method(
            attention_rollout,
            relu=False,
            needs_class_weights=False,
            paper="Abnar and Zuidema 2020",
            needs_attention="all",
            by_name=True,
        ),
        Method(
            extent_cam,
            relu=False,
            needs_class_weights=False,
            paper="after Chen et al. 2022",
            needs_finer_layer=True,
        ),
    )
}
"""All methods by name, in the order in which results list them."""

DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if not method.by_name)
"""Those that are taken where nobody names any."""
