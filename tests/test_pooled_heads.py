"""Heads that do more than one linear layer: run for each cell, and linear at their own scale."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from scacam import Explainer, Network, Preprocessing, load_network
from scacam.explainer import observe

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

SMALL = Preprocessing(crop_size=(64, 64))
TOWER = {"image_size": 64, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16}
CLIP = {
    "embed_dim": 32,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# By name, the image halves of zero-shot networks that pool.
TOWERS: dict[str, dict[str, Any]] = {
    "averaged tokens": {**TOWER, "pool_type": "avg"},
    "normalised behind the average": {**TOWER, "pool_type": "avg", "final_ln_after_pool": True},
    "convolutional": {
        "image_size": 64,
        "timm_model_name": "test_convnext",
        "timm_pool": "",
        "timm_proj": "linear",
    },
}


def _convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=6)


def _vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7},
        global_pool="avg",
    )


MADE: dict[str, Callable[[], nn.Module]] = {"ConvNeXt": _convnext, "ViT": _vit}


@pytest.fixture(scope="module", params=[*TOWERS, *MADE])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    torch.manual_seed(0)
    if request.param in MADE:
        made = MADE[request.param]()
        network = Network(made, preprocessing=SMALL)
    else:
        folder = tmp_path_factory.mktemp("clip")
        (folder / "pooling-clip.json").write_text(
            json.dumps({**CLIP, "vision_cfg": TOWERS[request.param]})
        )
        open_clip.add_model_config(folder)
        prompts = ["a tabby cat", "garden hose", "snow", "a boat"]
        network = load_network("open_clip.pooling-clip", "random", prompts=prompts)
    for name, parameter in network.module.named_parameters():
        if parameter.ndim == 1:  # biases and scales are not all 0 or 1, as they begin
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return network


def _images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _at_own_scale(network: Network, pooled: Tensor, others: Tensor) -> Tensor:
    """What the head says of vectors if it divides them by what it divides some others by.

    By hand, in double precision.
    """
    layers = {name: layer.double() for name, layer in network.module.double().named_modules()}
    norm = next(
        (
            layer
            for name, layer in layers.items()
            if name in ("visual.trunk.head.norm", "classifier.0", "fc_norm")
            or (name == "visual.ln_post" and layers["visual"].final_ln_after_pool)
        ),
        None,
    )
    if norm is not None:
        scale = (others.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        pooled, others = (
            (each - each.mean(1, keepdim=True)) / scale * norm.weight + norm.bias
            for each in (pooled, others)
        )
    if "visual" not in layers:
        classifier = layers["classifier.2"] if "classifier.2" in layers else layers["head"]
        return classifier(pooled)
    projection = (
        layers["visual.head.proj"].weight.T if "visual.head" in layers else layers["visual"].proj
    )
    pooled, others = pooled @ projection, others @ projection
    return layers["classifier"](pooled / others.norm(dim=1, keepdim=True))


@torch.no_grad()
def test_gap_cam_is_linear_at_the_scale_of_each_image(network: Network) -> None:
    explanation = Explainer(network, ("gap_cam", "nwc_cam"), top_k=3)(_images())
    features = observe(network, _images(), top_k=1).features.double()
    maps = explanation.heatmaps["gap_cam"]
    pooled, class_ids = features.mean((2, 3)), explanation.class_ids
    try:
        of_nothing = _at_own_scale(network, torch.zeros_like(pooled), pooled).gather(1, class_ids)
        expected = [
            _at_own_scale(network, cells, pooled).gather(1, class_ids) - of_nothing
            for cells in features.flatten(2).unbind(2)
        ]
    finally:
        network.module.float()
    expected = torch.stack(expected, 2).unflatten(2, features.shape[2:])
    assert (maps - expected).abs().max() <= 1e-5 * expected.abs().max()
    # As at any linear head: what the mean of the map lacks of the logit is the bias.
    logits = explanation.logits.gather(1, class_ids)
    torch.testing.assert_close(
        maps.mean((2, 3)), (logits - of_nothing).float(), rtol=1e-4, atol=1e-4
    )
    assert (explanation.heatmaps["nwc_cam"] - maps).abs().max() > 1e-3 * maps.abs().max()


@torch.no_grad()
def _assert_each_cell_alone(network: Network) -> None:
    """The module run for real, with all cells but one set to 0."""
    explanation = Explainer(network, ("recipro_cam",), top_k=3)(_images())
    features = observe(network, _images(), top_k=1).features
    target = network.target_layer
    rows = []
    for cell in torch.eye(features[0, 0].numel()).unflatten(1, features.shape[2:]):

        def keep(_layer: nn.Module, _inputs: object, output: Tensor, cell: Tensor = cell) -> Tensor:
            return target.output(features * cell, output)

        with network.module.get_submodule(target.name).register_forward_hook(keep):
            rows.append(network.logits(_images()).softmax(1).gather(1, explanation.class_ids))
    expected = torch.stack(rows, 2).unflatten(2, features.shape[2:])
    maps = explanation.heatmaps["recipro_cam"]
    assert (maps - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected.std((2, 3)) > 100 * (maps - expected).abs().amax((2, 3))).all()
    assert not any("forward" in vars(layer) for layer in network.module.modules())


def _assert_alike_in_half_precision(network: Network) -> None:
    explainer = Explainer(network, ("gap_cam", "recipro_cam"))
    expected = explainer(_images(), torch.tensor([1, 2])).heatmaps
    with torch.autocast("cpu", torch.bfloat16):
        half = explainer(_images(), torch.tensor([1, 2])).heatmaps
    for method, maps in expected.items():
        difference = (half[method] - maps)[:, -1].abs().max()
        assert difference <= 0.05 * maps.abs().max(), method


def test_recipro_cam_runs_the_head_for_every_cell(network: Network) -> None:
    _assert_each_cell_alone(network)
    _assert_alike_in_half_precision(network)


def _torchvision(**options: int) -> nn.Module:
    return torchvision.models.VisionTransformer(
        64, 16, options["depth"], options["num_heads"], options["embed_dim"], 192, num_classes=7
    )


TOKENS: dict[str, Callable[..., nn.Module]] = {
    "torchvision": _torchvision,
    "class token": partial(timm.create_model, "vit_tiny_patch16_224"),
    "two heads": partial(timm.create_model, "deit_tiny_distilled_patch16_224"),
    "biased by position": partial(
        timm.create_model, "beit_base_patch16_224", global_pool="token", use_abs_pos_emb=True
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_recipro_cam_runs_the_last_block_for_the_class_token(name: str) -> None:
    torch.manual_seed(0)
    options = {"depth": 24, "embed_dim": 48, "num_heads": 3}
    if name != "torchvision":
        options |= {"img_size": 64, "num_classes": 7}
    made = TOKENS[name](**options)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            if "gamma" in parameter_name or "head" in parameter_name or "23" in parameter_name:
                nn.init.normal_(parameter, std=0.5)  # not as small as they begin
    network = Network(made, preprocessing=SMALL)
    _assert_each_cell_alone(network)
    _assert_alike_in_half_precision(network)


def test_gradients_go_through_the_normalisation(network: Network) -> None:
    """They are those of autograd, and not those at a fixed scale."""
    seen = observe(network, _images(), top_k=3)
    target, held = network.target_layer, []

    def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[0].clone()

    with network.module.get_submodule(target.name).register_forward_hook(hook):
        logits = network.logits(_images())
    for rank, ids in enumerate(seen.class_ids.T):
        chosen = logits.gather(1, ids[:, None]).sum()
        (slopes,) = torch.autograd.grad(chosen, held[0], retain_graph=True)
        expected = target.features(slopes, (64, 64))
        actual = seen.gradients[:, rank].expand_as(expected)
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
        fixed = seen.class_weights[:, rank, :, None, None] / expected[0, 0].numel()
        is_normalised = "LayerNorm" in str(network.module) or "visual" in dict(
            network.module.named_children()
        )
        assert is_normalised == bool((fixed - expected).abs().max() > 1e-3 * expected.abs().max())


class Wide(nn.Module):
    """A head that costs more than its network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 8, stride=8)
        self.head = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


def test_a_dear_head_is_not_run_for_every_cell() -> None:
    network = Network(Wide(), preprocessing=SMALL)
    assert network.head.is_even
    assert not network.supports("recipro_cam")
    assert not {"gap_cam", "recipro_cam"} & set(Explainer(network)(_images()).heatmaps)
