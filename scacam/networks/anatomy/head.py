"""What lies between the features and the logits: the head, and its gradients in closed form."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from scacam.methods import METHODS
from scacam.methods.gradients import Gradients, MaskedGradients, weigh
from scacam.networks.anatomy.alone import Alone
from scacam.networks.anatomy.block import LastBlock
from scacam.networks.anatomy.layer import TargetLayer
from scacam.networks.anatomy.output import both_classes

__all__ = ["ExplainedLayer", "Head", "Kind"]

Kind = Literal["pooled", "rectified", "scores", "general"]


@dataclass(frozen=True)
class Head:
    """How the logits come from the features.

    Attributes:
        kind: `pooled` (global average pooling, then linear), `rectified` (a ReLU before that
            pooling, as in DenseNet), `scores` (a 1 × 1 convolution to one score map per class,
            ReLU, pooling, as in SqueezeNet), or `general`.
        classifier: name of the layer whose weights are class weights on pooled features; None for
            a general head.
        block: of a head that begins inside the last block of a transformer, that block, if it may
            be run for the tokens alone that are read; see `block`.
        is_even: whether a general head pools the features first, so that its gradients are the
            same at every position.
        is_scaled: whether a general head is pooling and linear layers, but for normalisations
            that divide what is pooled by a number of each image's own, such as a LayerNorm or that
            of an embedding; see `path.at_own_scale`.
        alone: how to run a general head by itself, if it can be.
    """

    kind: Kind
    classifier: str | None
    is_even: bool = False
    is_scaled: bool = False
    alone: Alone | None = None
    block: LastBlock | None = None

    def class_weights(self, module: nn.Module) -> Tensor | None:
        """Weights `[classes, C]` from pooled channels to logits, or None."""
        if self.classifier is None:
            return None
        weight = module.get_submodule(self.classifier).weight
        assert isinstance(weight, Tensor)
        return both_classes(weight.detach().flatten(1).T).T

    def biases(self, module: nn.Module) -> Tensor:
        """`[classes]` of the classifier; zeros if it has none."""
        assert self.classifier is not None
        bias = module.get_submodule(self.classifier).bias
        if isinstance(bias, Tensor):
            return both_classes(bias.detach()[None])[0]
        weights = self.class_weights(module)
        assert weights is not None
        return weights.new_zeros(len(weights))

    def gradients(self, module: nn.Module, features: Tensor, class_ids: Tensor) -> Gradients:
        """Gradients of the logits of some classes with respect to the features (Equation 4).

        In closed form, which a general head does not have: see `differentiate`.

        Args:
            module: the network.
            features: `[B, C, h, w]`.
            class_ids: `[B, K]`.

        Returns:
            What `scacam.methods` take, in the most compact form.
        """
        class_weights = self.class_weights(module)
        assert class_weights is not None
        weights = class_weights[class_ids].to(features.dtype)
        per_cell = (weights / (features.shape[2] * features.shape[3]))[..., None, None]
        if self.kind == "rectified":
            return MaskedGradients(per_cell, (features > 0).to(features.dtype)[:, None])
        if self.kind == "scores":
            biases = self.biases(module)[class_ids].to(features.dtype)
            scores = weigh(weights, features) + biases[..., None, None]
            return MaskedGradients(per_cell, (scores > 0).to(features.dtype)[:, :, None])
        return per_cell


class ExplainedLayer(NamedTuple):
    """A layer whose features are weighed.

    Attributes:
        layer: the layer, as name and call.
        head: what lies between its output and the logits.
        straight: whether it is what the classifier pools: a single path of pooling, linear and
            pointwise operations leads from there to the logits, or all that they know of the image
            passes through it, or it gives the tokens that are read last.
        feature_shape: channels, height and width of its output.
    """

    layer: TargetLayer
    head: Head
    straight: bool
    feature_shape: tuple[int, int, int]

    def supports(self, method: str) -> bool:
        """Whether a method has maps of this layer's features and resolution."""
        needs, block = METHODS[method], self.head.block
        if needs.needs_attention == "all":
            return block is not None and block.follows is not None
        if needs.needs_attention == "last":
            return block is not None
        if needs.needs_finer_layer:
            return False
        if self.head.kind != "general":
            return True
        if needs.needs_head:
            alone = self.head.alone
            return not needs.needs_class_weights and alone is not None and alone.is_cheap
        return not needs.needs_class_weights or self.head.is_scaled
