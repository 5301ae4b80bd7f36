"""A batch of images to logits and heatmaps: one forward pass, all methods, all top-k classes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from scacam.errors import ScacamError
from scacam.methods import DEFAULT_METHODS, METHODS, gap_cam, grad_cam
from scacam.methods.attention import Attention
from scacam.methods.channels import Channels, top_channels
from scacam.methods.gradients import Gradients
from scacam.methods.linear_head import GeneralHead, LinearHead
from scacam.networks import Network
from scacam.networks.anatomy.backward import differentiable, differentiate, through_block
from scacam.networks.anatomy.block import Attended, LastBlock, attending, pruned
from scacam.networks.anatomy.head import Head
from scacam.networks.anatomy.layer import Capture, TargetLayer, capture
from scacam.networks.anatomy.tokens import kept

__all__ = ["Explainer", "Explanation", "Observation", "observe"]


class Observation(NamedTuple):
    """What one forward pass shows of B images and K classes of each: all that methods weigh.

    It is that of one layer, the target layer, with those of the network's other layers beside it.

    Attributes:
        logits: `[B, classes]`.
        class_ids: int64 `[B, K]`, the top classes in falling order, then the label if given.
        features: `[B, C, h, w]`, in single precision at least.
        gradients: of the logits of `class_ids` with respect to the features.
        class_weights: `[B, K, C]`, or None where the network has none; of a head that is linear but
            for the scale of each image, those at that scale.
        of_head: what methods may ask of the head, if that was wanted.
        finer_features: `[B, C, H, W]` of the finer layer, if they were wanted.
        attention: of the tokens of a transformer, if it was wanted.
        earlier: by name, what the layers show that run before the target layer.
    """

    logits: Tensor
    class_ids: Tensor
    features: Tensor
    gradients: Gradients
    class_weights: Tensor | None
    of_head: LinearHead | GeneralHead | None
    finer_features: Tensor | None
    attention: Attention | None
    earlier: "dict[str, Observation]"


def observe(
    network: Network,
    images: Tensor,
    top_k: int,
    labels: Tensor | None = None,
    *,
    finer: bool = False,
    of_head: bool = False,
    attention: Literal["none", "last", "all"] = "none",
) -> Observation:
    """Run a network once and take what its layers show.

    Args:
        network: the network.
        images: float `[B, channels, H, W]`, preprocessed as the network wants.
        top_k: how many of the most probable classes to look at.
        labels: int64 `[B]`, one more class of each image; left out, none.
        finer: whether to take the finer layer's features as well.
        of_head: whether to take what methods may ask of the head.
        attention: of which blocks of a transformer that classifies a token to take it.

    Raises:
        ScacamError: the module is in training mode, where batch statistics would mix images; there
            is not one label per image; or there are no classes to look at.
    """
    if any(layer.training for layer in network.module.modules()):
        raise ScacamError(f"{network.name} is in training mode; call network.module.eval()")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ScacamError(f"{len(images)} images need one label each, not {list(labels.shape)}")
    if labels is None and top_k < 1:
        raise ScacamError("no class is to be explained: top_k is 0, and there are no labels")
    finer_layer = network.finer_layer if finer else None
    general = [layer for layer, head, *_ in network.layers if head.kind == "general"]
    block = network.head.block
    if block is not None and len(general) > 1:
        block = block._replace(layer=None)  # a backward pass goes further down all the same
    is_linear = block is not None and block.layer is not None
    wanted = {layer for layer, *_ in network.layers}
    if finer_layer is not None:
        wanted.add(finer_layer)
    scores = None
    if of_head and network.head.kind == "scores" and network.head.classifier:
        scores = TargetLayer(network.head.classifier)
        wanted.add(scores)
    with torch.inference_mode(False), torch.no_grad():
        with (
            differentiable(network.module) if general else nullcontext(),
            attending(attention == "all") as blocks,
            pruned(network.module, block) as attended,
            capture(
                network.module, images.shape[2:], wanted, [] if is_linear else general
            ) as captured,
        ):
            logits = network.logits(images)
        with _full_precision(images):
            class_ids = logits.detach().topk(top_k).indices
            if labels is not None:
                class_ids = torch.cat([class_ids, labels[:, None]], dim=1)
            by_autograd, to_attention = _differentiated(
                network, block, captured, attended, logits, class_ids
            )
            finer_features = None
            if finer_layer is not None:
                finer_features = _widened(captured.of(finer_layer).detach())
            earlier: dict[str, Observation] = {}
            for layer, head, *_ in network.layers:
                features = _widened(captured.of(layer).detach())
                weights = _class_weights(network, head, images, features, class_ids)
                slopes: Gradients
                if layer in by_autograd:
                    slopes = by_autograd[layer]
                    slopes = _widened(slopes[..., :1, :1] if head.is_even else slopes)
                else:
                    slopes = head.gradients(network.module, features, class_ids)
                seen = Observation(
                    logits.detach(), class_ids, features, slopes, weights, None, None, None, {}
                )
                if of_head:
                    asked = _of_head(network, head, seen, images, attended)
                    if scores is not None and isinstance(asked, LinearHead):
                        asked = asked._replace(scores=_widened(captured.of(scores).detach()))
                    seen = seen._replace(of_head=asked)
                if layer != network.target_layer:
                    earlier[layer.name] = seen
            shown = None
            if attention != "none" and to_attention is not None:
                blocks.append(attended[0].weights.detach().mean(1))
                shown = Attention(
                    [_widened(weights) for weights in blocks],
                    _widened(to_attention),
                    _image_tokens(network, to_attention),
                    (seen.features.shape[2], seen.features.shape[3]),
                )
    return seen._replace(finer_features=finer_features, attention=shown, earlier=earlier)


def _differentiated(
    network: Network,
    block: LastBlock | None,
    captured: Capture,
    attended: Sequence[Attended],
    logits: Tensor,
    class_ids: Tensor,
) -> tuple[dict[TargetLayer, Tensor], Tensor | None]:
    """Gradients with respect to the layers whose heads have none in closed form, by layer.

    And those with respect to the last block's attention, if there is one.
    """
    general = [layer for layer, head, *_ in network.layers if head.kind == "general"]
    if not general:
        return {}, None
    if block is not None and block.layer is not None:
        to_tokens, to_attention = through_block(
            network.module, block, attended[0], logits, class_ids
        )
        of_image = to_tokens.index_select(3, _image_tokens(network, to_tokens))
        shape = captured.of(network.target_layer).shape[2:]
        return {network.target_layer: of_image.unflatten(3, shape)}, to_attention
    leaves = [captured.of(layer) for layer in general]
    weights = [seen.weights for seen in attended]
    found = differentiate(logits, [*leaves, *weights], class_ids)
    return dict(zip(general, found, strict=False)), found[-1] if weights else None


def _class_weights(
    network: Network, head: Head, images: Tensor, features: Tensor, class_ids: Tensor
) -> Tensor | None:
    """Class weights `[B, K, C]` on the pooled features of a layer, if its head has any."""
    if head.is_scaled and head.alone is not None:
        return head.alone.weights_at_own_scale(
            network.module, network.logits, images, features.mean((2, 3)), class_ids
        )
    weights = head.class_weights(network.module)
    return None if weights is None else weights[class_ids].to(features.dtype)


def _of_head(
    network: Network, head: Head, seen: Observation, images: Tensor, attended: Sequence[Attended]
) -> LinearHead | GeneralHead | None:
    """What methods may ask of a layer's head."""
    module, is_softmax = network.module, network.output.kind == "softmax"
    if head.alone is not None and head.alone.is_cheap:
        run = partial(head.alone.of_cells, module, network.logits, images, seen.features, attended)
        return GeneralHead(run, seen.class_ids, is_softmax)
    weights, dtype = head.class_weights(module), seen.features.dtype
    if weights is None or head.kind == "general":
        return None
    return LinearHead(
        head.kind,
        weights.to(dtype),
        head.biases(module).to(dtype),
        seen.logits.to(dtype),
        seen.class_ids,
        partial(head.gradients, module, seen.features),
        is_softmax,
        None,
    )


def _image_tokens(network: Network, of_tokens: Tensor) -> Tensor:
    """Positions of the image's tokens in the last axis of what has one value for each."""
    others = network.target_layer.others or ()
    return kept(of_tokens.shape[-1], others).to(of_tokens.device)


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
        heatmaps: by method, `[B, K, h, w]`: raw, signed, before any ReLU; of the target layer, or
            of the finer layer's resolution where the method needs that. A method that the network
            does not support has no key.
        layers: the same and those of the network's earlier layers, by the name of the layer and
            method. Maps that have the finer layer's resolution stand under its name.
        channels: those of the target layer that add most to the logits, if they were wanted.
        pooled: `[B, C]`, the target layer's features averaged over its cells, after its ReLU
            where the head has one before it pools.
    """

    logits: Tensor
    class_ids: Tensor
    heatmaps: dict[str, Tensor]
    layers: dict[str, dict[str, Tensor]]
    channels: Channels | None
    pooled: Tensor


class Explainer:
    """Explains what a network says of images. Raises ScacamError for a method it does not know."""

    def __init__(
        self,
        network: Network,
        methods: Sequence[str] | None = None,
        top_k: int = 5,
        channels: int = 0,
    ) -> None:
        """Choose the methods (by default all that the network supports, but those that cost
        much) and the classes.

        Args:
            network: the network to explain.
            methods: names from `scacam.methods.METHODS`; left out, `DEFAULT_METHODS`.
            top_k: how many of the most probable classes to explain, at most all; 0 for labels
                alone.
            channels: how many of the channels that add most to a class to name, at most all.
        """
        unknown = [name for name in methods or () if name not in METHODS]
        if unknown:
            raise ScacamError(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
        if top_k < 0:
            raise ScacamError(f"top_k is the number of classes to explain, not {top_k}")
        self.network = network
        self.methods = tuple(name for name in methods or DEFAULT_METHODS if network.supports(name))
        self.layers = network.methods_by_layer(methods or DEFAULT_METHODS)
        self.top_k = min(top_k, network.num_classes)
        self.channels = channels

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
        seen = observe(
            self.network,
            images,
            self.top_k,
            labels,
            finer=any(map(_is_finer, self.methods)),
            of_head=any(METHODS[name].needs_head for name in self.methods),
            attention=max(
                (METHODS[name].needs_attention for name in self.methods),
                key=("none", "last", "all").index,
                default="none",
            ),
        )
        with torch.no_grad(), _full_precision(images):
            heatmaps = {name: _maps(name, seen) for name in self.methods}
            layers = {
                layer: {
                    name: _maps(name, seen.earlier[layer])
                    if layer in seen.earlier and not _is_finer(name)
                    else heatmaps[name]
                    for name in names
                }
                for layer, names in self.layers.items()
            }
            channels = None
            if self.channels:
                channels = top_channels(seen.features, seen.gradients, self.channels)
            features = seen.features
            if self.network.head.kind == "rectified":
                features = features.clip(min=0)
            pooled = features.mean((2, 3))
        return Explanation(seen.logits, seen.class_ids, heatmaps, layers, channels, pooled)


def _is_finer(method: str) -> bool:
    """Whether a method's maps have the finer layer's resolution."""
    return METHODS[method].needs_finer_layer


def _maps(method: str, seen: Observation) -> Tensor:
    """The maps of a method of what one layer shows."""
    function = METHODS[method].function
    if METHODS[method].needs_head:
        return function(seen.features, seen.of_head)
    if METHODS[method].needs_attention != "none":
        return function(seen.attention)
    shown = seen.features, seen.gradients, seen.class_weights
    if not _is_finer(method):
        return function(*shown)
    seed = grad_cam if seen.class_weights is None else gap_cam
    return function(seed(*shown), seen.finer_features)
