"""extent_cam, the finer layer and several layers: by hand, by a second way, on every family."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams

from scacam import Explainer, Network, NetworkError, Preprocessing, load_network
from scacam.explainer import observe
from scacam.methods import extent_cam, gap_cam, grad_cam
from scacam.networks.anatomy import search
from scacam.networks.anatomy.layer import TargetLayer
from scacam.networks.anatomy.search import Reach, find_layers

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

# --- The formula

EAST, NORTH = (2.0, 0.0), (0.0, 5.0)
"""Two orthogonal directions: lengths do not matter."""


def _features(rows: list[str]) -> Tensor:
    """Finer features with one of the two directions at each position."""
    cells = [[EAST if cell == "E" else NORTH for cell in row] for row in rows]
    return torch.tensor(cells).permute(2, 0, 1)[None]


QUADRANT = _features(["EENN", "EENN", "NNNN", "NNNN"])
CAM = torch.tensor([[[[4.0, 0], [0, 0]]]])


def _by_hand(rounds: int) -> Tensor:
    """The map of a class that fires in the first of 2 × 2 cells, over the quadrant of EAST.

    Enlarged to 4 × 4, bilinearly with half pixels, [4, 0] is [4, 3, 1, 0]; so that c is the outer
    product of (1, ¾, ¼, 0) with itself, whose sum is 4 and whose sum over the quadrant is (7/4)².
    With e and n the shares of EAST and NORTH, a round's p = (e_in - e_out, n_in - n_out): z · p is
    its first component in the quadrant, which is positive, and its second elsewhere, which is
    negative, since shares sum to 1. So top(z · p) is 1 in the quadrant and 0 elsewhere, whatever
    the weights were, and m = √c there after each round.
    """
    assert rounds >= 1
    profile = torch.tensor([1, 0.75, 0, 0]).sqrt()
    return torch.outer(profile, profile)


@pytest.mark.parametrize("rounds", [1, 3])
def test_by_hand(rounds: int) -> None:
    maps = extent_cam(CAM, QUADRANT, rounds)
    torch.testing.assert_close(maps[0, 0], _by_hand(rounds))


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_by_hand(rounds: int) -> None:
    """A third direction between the two, of which a round decides how much of it is inside.

    In one row: EAST, (0.8, 0.6), NORTH, NORTH, and a class map (1, ½, 0, -3) of the same size. With
    m = (1, a, 0, 0): Σ m = 1 + a, Σ m z = (1 + 0.8 a, 0.6 a), Σ (1 - m) = 3 - a and
    Σ (1 - m) z = (0.8 (1 - a), 0.6 (1 - a) + 2). NORTH is outside; the next a is √(½ t) with
    t = (0.8 p₁ + 0.6 p₂) / p₁. For a = ½ it is p = (58, -54) / 75, so that t = 7/29.
    """
    features = torch.tensor([[1.0, 8, 0, 0], [0, 6, 1, 1]])[None, :, None]
    a, ratios = 0.5, []
    for _ in range(rounds):
        p = (
            (1 + 0.8 * a) / (1 + a) - 0.8 * (1 - a) / (3 - a),
            0.6 * a / (1 + a) - (0.6 * (1 - a) + 2) / (3 - a),
        )
        ratios.append((0.8 * p[0] + 0.6 * p[1]) / p[0])
        a = math.sqrt(ratios[-1] / 2)
    assert ratios[0] == pytest.approx(7 / 29)
    maps = extent_cam(torch.tensor([[[[1.0, 0.5, 0, -3]]]]), features, rounds)
    torch.testing.assert_close(maps[0, 0, 0], torch.tensor([1, a, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_tell_apart_gives_zeros(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 7, 6, 6, generator=generator, dtype=dtype)
    cams = torch.randn(1, 1, 3, 3, generator=generator, dtype=dtype)
    alike = features[:, :, :1, :1].expand_as(features)
    for case in (
        extent_cam(cams, alike),
        extent_cam(cams, torch.zeros_like(features)),
        extent_cam(torch.zeros_like(cams), features),
        extent_cam(-cams.abs(), features),
    ):
        torch.testing.assert_close(case, torch.zeros(1, 1, 6, 6, dtype=dtype), rtol=0, atol=0)
    # A class that fires everywhere alike has no outside: what is like the mean of all is left.
    everywhere = extent_cam(torch.ones_like(cams), features)
    assert everywhere.isfinite().all()
    assert everywhere.max() > 0


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_images_and_classes_do_not_mix() -> None:
    cams, features = _random(3, 4, 3, 5, seed=0), _random(3, 8, 6, 9, seed=1)
    together = extent_cam(cams, features)
    assert together.shape == (3, 4, 6, 9)
    for image in range(3):
        for rank in range(4):
            alone = extent_cam(cams[image : image + 1, rank : rank + 1], features[image][None])
            torch.testing.assert_close(together[image, rank], alone[0, 0])
    torch.testing.assert_close(extent_cam(cams.flip(1), features), together.flip(1))


@pytest.mark.parametrize("size", [1e-15, 1e12])
def test_neither_the_size_of_the_class_map_nor_that_of_the_features_matters(size: float) -> None:
    cams, features = _random(1, 2, 3, 3, seed=0), _random(1, 8, 6, 6, seed=1)
    expected = extent_cam(cams, features)
    maps = extent_cam((size * cams).float(), (size * features).float())
    assert (maps - expected).abs().max() < 1e-4


def test_an_image_that_is_not_finite_harms_no_other() -> None:
    cams, features = _random(3, 2, 3, 3, seed=0), _random(3, 8, 6, 6, seed=1)
    expected = extent_cam(cams, features)
    features[1, 0, 0, 0] = math.nan
    cams[2, 0, 0, 0] = math.nan
    maps = extent_cam(cams, features)
    torch.testing.assert_close(maps[0], expected[0])
    torch.testing.assert_close(maps[2, 1], expected[2, 1])
    assert maps[1].isnan().all()
    assert maps[2, 0].isnan().all()


def _slowly(cam: np.ndarray, features: np.ndarray, rounds: int = 3) -> np.ndarray:
    """The formula for one image and class, in loops over positions."""
    channels, height, width = features.shape
    c = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            row = min(max((y + 0.5) * cam.shape[0] / height - 0.5, 0), cam.shape[0] - 1)
            column = min(max((x + 0.5) * cam.shape[1] / width - 0.5, 0), cam.shape[1] - 1)
            top, left = int(row), int(column)
            below, right = min(top + 1, cam.shape[0] - 1), min(left + 1, cam.shape[1] - 1)
            v, u = row - top, column - left
            upper = (1 - u) * cam[top, left] + u * cam[top, right]
            lower = (1 - u) * cam[below, left] + u * cam[below, right]
            c[y, x] = max((1 - v) * upper + v * lower, 0)
    c /= c.max()
    m = c.copy()
    for _ in range(rounds):
        inside, outside = np.zeros(channels), np.zeros(channels)
        for y in range(height):
            for x in range(width):
                z = features[:, y, x] / math.sqrt((features[:, y, x] ** 2).sum())
                inside += m[y, x] * z / m.sum()
                outside += (1 - m[y, x]) * z / (1 - m).sum()
        s = np.zeros((height, width))
        for y in range(height):
            for x in range(width):
                z = features[:, y, x] / math.sqrt((features[:, y, x] ** 2).sum())
                s[y, x] = max(float(z @ (inside - outside)), 0)
        m = np.sqrt(s / s.max() * c)
    return m


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_equals_the_formula_in_loops_on_a_real_network() -> None:
    network = load_network("efficientnet_lite0")
    assert network.finer_layer == TargetLayer("_blocks.10")
    assert network.finer_shape == (112, 14, 14)
    images = F.interpolate(_images(2, 3, 7, 7), (224, 224), mode="bicubic")
    held: list[Tensor] = []
    layer = network.module.get_submodule("_blocks.10")
    with layer.register_forward_hook(lambda *given: held.append(given[2].detach().clone())):
        explanation = Explainer(network, ["gap_cam", "extent_cam"], top_k=2)(images)
    maps = explanation.heatmaps["extent_cam"]
    assert maps.shape == (2, 2, 14, 14)
    for image in range(2):
        for rank in range(2):
            cam = explanation.heatmaps["gap_cam"][image, rank].double().numpy()
            expected = _slowly(cam, held[0][image].double().numpy())
            assert np.abs(maps[image, rank].numpy() - expected).max() < 1e-5


# --- In the explainer

SMALL = Preprocessing(crop_size=(64, 64))


def test_seeded_by_class_weights_or_else_gradients() -> None:
    for hidden, seed in ((None, gap_cam), (5, grad_cam)):
        network = Network(Odd(hidden), preprocessing=SMALL)
        seen = observe(network, _images(2, 3, 64, 64), 3, finer=True)
        assert seen.finer_features is not None
        expected = extent_cam(
            seed(seen.features, seen.gradients, seen.class_weights), seen.finer_features
        )
        explanation = Explainer(network, ["extent_cam"], top_k=3)(_images(2, 3, 64, 64))
        torch.testing.assert_close(explanation.heatmaps["extent_cam"], expected)
        assert list(explanation.layers) == ["fine"]


class Odd(nn.Module):
    """31 positions become 15 behind a layer whose output is changed in place."""

    def __init__(self, hidden: int | None = None) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 4, stride=2)
        self.coarse = nn.Conv2d(8, 6, 3, stride=2)
        layers = [] if hidden is None else [nn.Linear(6, hidden), nn.Tanh()]
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden or 6, 4))

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        return self.classifier(self.coarse(fine.relu_()).mean((2, 3)))


def test_finer_features_are_safe_from_what_runs_next_and_carry_no_graph() -> None:
    module = Odd(hidden=5)
    network = Network(module, preprocessing=SMALL)
    assert (network.finer_layer, network.finer_shape) == (TargetLayer("fine"), (8, 31, 31))
    assert network.feature_shape == (6, 15, 15)
    images = _images(2, 3, 64, 64)
    seen = observe(network, images, 1, finer=True)
    torch.testing.assert_close(seen.finer_features, module.fine(images).detach())
    assert not seen.finer_features.requires_grad
    assert not seen.features.requires_grad
    torch.testing.assert_close(seen.logits, module(images).detach())


def test_the_finer_layer_is_looked_at_only_where_a_method_needs_it() -> None:
    network = Network(Odd(), preprocessing=SMALL)
    looked = 0

    def count(*_: object) -> None:
        nonlocal looked
        looked += len(network.module.fine._forward_hooks) > 1

    with network.module.fine.register_forward_hook(count):
        assert "extent_cam" not in Explainer(network, ["grad_cam"])(_images(1, 3, 64, 64)).heatmaps
        assert not looked
        Explainer(network, ["grad_cam", "extent_cam"])(_images(1, 3, 64, 64))
        assert looked
    assert not network.module.fine._forward_hooks


# --- Several layers


class Sharing(nn.Module):
    """One ReLU at three resolutions, and poolings that are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.middle, self.last = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(self.relu(self.stem(images)), 2)
        features = F.max_pool2d(self.relu(self.middle(features)), 2)
        return self.classifier(self.last(self.relu(features)).mean((2, 3)))


def test_several_layers_give_what_each_gives_alone() -> None:
    names = ["layer4", "layer2", "layer3"]
    torch.manual_seed(0)
    module = torchvision.models.resnet18()
    network = Network(module, target_layer=names, preprocessing=SMALL)
    assert [layer.name for layer, *_ in network.layers] == sorted(names)
    assert network.target_layer == TargetLayer("layer4")
    assert [head.kind for _, head, *_ in network.layers] == ["general", "general", "pooled"]
    chosen = ["gap_cam", "sca_cam", "eigen_cam", "extent_cam"]
    images = _images(2, 3, 64, 64)
    graphs = {}
    for layer in ("layer1", "layer3"):
        module.get_submodule(layer).register_forward_hook(
            lambda *given, layer=layer: graphs.update({layer: given[2].requires_grad})
        )
    explanation = Explainer(network, chosen, top_k=2)(images)
    assert graphs == {"layer1": False, "layer3": True}  # a gradient down to layer2 and no more
    assert set(explanation.layers) == set(names)
    assert list(explanation.layers["layer3"]) == ["sca_cam", "eigen_cam", "extent_cam"]
    assert list(explanation.layers["layer2"]) == ["sca_cam", "eigen_cam"]
    assert list(explanation.heatmaps) == chosen
    for name in chosen[:3]:
        assert explanation.heatmaps[name] is explanation.layers["layer4"][name]
    assert explanation.heatmaps["extent_cam"] is explanation.layers["layer3"]["extent_cam"]
    for layer in names:
        alone = Network(module, target_layer=layer, preprocessing=SMALL)
        expected = Explainer(alone, chosen[:3], top_k=2)(images).heatmaps
        for name, maps in expected.items():
            actual = explanation.layers[layer][name]
            assert (actual - maps).abs().max() <= 1e-4 * maps.abs().max(), (layer, name)
            assert not actual.requires_grad


def test_one_backward_pass_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(Odd(hidden=5), target_layer=["fine", "coarse"], preprocessing=SMALL)
    asked: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(len(inputs))
        return grad(outputs, inputs, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    explanation = Explainer(network, top_k=3)(_images(2, 3, 64, 64))
    assert asked == [2]
    assert explanation.layers["fine"]["grad_cam"].shape == (2, 3, 31, 31)
    assert explanation.layers["coarse"]["grad_cam"].shape == (2, 3, 15, 15)


def single() -> Network:
    """Two layers, named, of a module that returns the sigmoid of one logit."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=2),
        nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.Tanh()),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 1),
        nn.Sigmoid(),
    )
    return Network(module, target_layer=["2", "1"], finer_layer="0", preprocessing=SMALL)


def test_several_layers_of_a_single_logit_behind_a_sigmoid() -> None:
    network = single()
    assert (network.output.kind, network.num_classes) == ("sigmoid", 2)
    assert [head.kind for _, head, *_ in network.layers] == ["general", "pooled"]
    images = _images(2, 3, 64, 64)
    explanation = Explainer(network, ["grad_cam", "hires_cam", "extent_cam"])(images)
    assert {layer: list(maps) for layer, maps in explanation.layers.items()} == {
        "1": ["grad_cam", "hires_cam"],
        "2": ["grad_cam", "hires_cam"],
        "0": ["extent_cam"],
    }
    with torch.no_grad():
        logit = network.module[:6](images)
    torch.testing.assert_close(explanation.logits, torch.cat([-logit, logit], 1))
    features = network.module[:2](images).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(network.module[2:6](features).sum(), features)
    expected = (gradients * features.detach()).sum(1)
    signs = 2 * explanation.class_ids - 1  # class 0 has the opposite map
    actual = explanation.layers["1"]["hires_cam"] * signs[..., None, None]
    for maps in actual.unbind(1):
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-7)


def test_a_network_that_a_factory_makes_keeps_its_layers_and_can_be_rebuilt() -> None:
    made, loaded = single(), load_network("tests.test_extent:single")
    other = load_network("tests.test_extent:single", target_layer="2", finer_layer="1.0")
    assert other.finer_layer == TargetLayer("1.0")
    for one, same in ((loaded, made), (loaded.rebuild(), made), (other.rebuild(), other)):
        for attribute in ("layers", "finer_layer", "output"):
            assert getattr(one, attribute) == getattr(same, attribute)


# --- Finding the finer layer

TORCHVISION = {
    "alexnet": "features.11",
    "vgg": {"vgg11": 19, "vgg13": 23, "vgg16": 29, "vgg19": 35}
    | {"vgg11_bn": 27, "vgg13_bn": 33, "vgg16_bn": 42, "vgg19_bn": 51},
    "convnext": "features.5",
    "densenet": "features.denseblock3",
    "efficientnet": "features.5",
    "googlenet": "inception4e",
    "inception": "Mixed_6e",
    "maxvit": "blocks.2",
    "mnasnet": "layers.11",
    "mobilenet_v2": "features.13",
    "mobilenet_v3_large": "features.12",
    "mobilenet_v3_small": "features.8",
    "regnet": "trunk_output.block3",
    "resn": "layer3",
    "wide_resnet": "layer3",
    "shufflenet": "stage3",
    "squeezenet1_0": "features.10",
    "squeezenet1_1": "features.7",
    "swin": "features.5",
    "vit": None,
}
ODD_SIZES = {"alexnet": (13, 13), "inception_v3": (17, 17), "squeezenet1_0": (27, 27)}
ODD_SIZES["squeezenet1_1"] = (27, 27)


def _found(module: nn.Module, size: int) -> tuple[str | None, tuple[int, int, int] | None]:
    device = next(module.parameters()).device
    images = torch.empty(2, 3, size, size, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "unlike_images", _class_token)  # without values all tokens are alike
        found = find_layers(module.eval(), images, [], None, reach=lambda *_: Reach(False, False))
    return found.finer and found.finer.name, found.finer_shape


def _class_token(tokens: Tensor) -> tuple[int, ...]:
    return () if math.isqrt(tokens.shape[1]) ** 2 == tokens.shape[1] else (0,)


ALWAYS = {
    *("alexnet", "convnext_tiny", "densenet121", "googlenet", "mobilenet_v3_small", "resnet18"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "vgg11"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.long)
        for name in torchvision.models.list_models(module=torchvision.models)
    ],
)
def test_on_every_network_of_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where nothing is computed."""
    expected = next(value for start, value in TORCHVISION.items() if name.startswith(start))
    if isinstance(expected, dict):
        expected = f"features.{expected[name]}"
    plan = BlockParams.from_init_params

    def planned(*arguments: Any, **options: Any) -> BlockParams:
        with torch.device("cpu"):  # RegNet computes its widths by tensors
            return plan(*arguments, **options)

    monkeypatch.setattr(BlockParams, "from_init_params", planned)
    with torch.device("meta"):
        module = torchvision.models.get_model(name)
    layer, shape = _found(module, 299 if name == "inception_v3" else 224)
    assert layer == expected
    if layer is not None:
        assert (shape or ())[1:] == ODD_SIZES.get(name, (14, 14))


TIMM = {
    "convnextv2_atto": "stages.2",
    "cspresnet50": "stages.2",
    "davit_tiny": "stages.2",
    "densenet121": "features.denseblock3",
    "dla34": "level4",
    "efficientnet_lite0": "blocks.4",
    "focalnet_tiny_srf": "layers.2",
    "ghostnet_050": "blocks.6",
    "inception_v4": "features.17",
    "mobilenetv3_small_050": "blocks.3",
    "mobilenetv4_conv_small": "blocks.2",
    "nfnet_l0": "stages.2",
    "poolformer_s12": "stages.2",
    "pvt_v2_b0": "stages.2",
    "regnety_002": "s3",
    "repvgg_a0": "stages.2",
    "res2net50_26w_4s": "layer3",
    "resnet18d": "layer3",
    "resnetv2_50": "stages.2",
    "rexnet_100": "features.10",
    "swin_tiny_patch4_window7_224": "layers.2",
    "swinv2_cr_tiny_224": "stages.2",
    "tresnet_m": "body.layer3",
    "vgg11": "features.19",
    "vovnet39a": "stages.2",
    "xception41": "blocks.10",
    "convmixer_768_32": None,
    "vit_tiny_patch16_224": None,
}


@pytest.mark.long
@pytest.mark.parametrize("name", TIMM)
def test_on_families_of_timm(name: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name)
    layer, _ = _found(module, module.pretrained_cfg["input_size"][-1])
    assert layer == TIMM[name]


def test_a_finer_layer_that_gives_channels_last() -> None:
    module = torchvision.models.SwinTransformer(
        [4, 4], 8, depths=[1] * 4, num_heads=[1] * 4, window_size=[2, 2], num_classes=4
    )
    network = Network(module, preprocessing=SMALL)
    assert network.finer_layer == TargetLayer("features.5", channels_last=True)
    assert network.finer_shape == (32, 4, 4)
    images = _images(2, 3, 64, 64)
    seen = observe(network, images, 1, finer=True)
    with torch.no_grad():
        expected = module.features[:6](images).permute(0, 3, 1, 2)
    torch.testing.assert_close(seen.finer_features, expected)


def test_a_layer_that_runs_several_times() -> None:
    network = Network(Sharing(), preprocessing=SMALL)
    assert (network.finer_layer, network.finer_shape) == (TargetLayer("relu", 1), (6, 8, 8))
    images = _images(2, 3, 64, 64)
    seen = observe(network, images, 1, finer=True)
    module = network.module
    with torch.no_grad():
        expected = module.middle(F.max_pool2d(module.stem(images).relu(), 2)).relu()
    torch.testing.assert_close(seen.finer_features, expected)
    # Maps are kept by the layer's name, which cannot stand for two calls.
    rectified = Network(Sharing(), target_layer="relu", preprocessing=SMALL)
    assert rectified.target_layer == TargetLayer("relu", 2)
    assert rectified.finer_layer == TargetLayer("middle")


def test_a_named_finer_layer_and_none() -> None:
    network = load_network("resnet18", "random", finer_layer="layer2")
    assert (network.finer_layer, network.finer_shape) == (TargetLayer("layer2"), (128, 28, 28))
    explanation = Explainer(network, ["extent_cam"], top_k=1)(_images(1, 3, 224, 224))
    assert explanation.heatmaps["extent_cam"].shape == (1, 1, 28, 28)
    for name, message in {"layer9": "no layer 'layer9'", "fc": "'fc' is not a spatial map"}.items():
        with pytest.raises(NetworkError, match=message):
            Network(network.module, finer_layer=name)
    flat = nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    alone = Network(flat, preprocessing=SMALL)
    assert (alone.finer_layer, alone.finer_shape) == (None, None)
    assert not alone.supports("extent_cam")
    explanation = Explainer(alone, ["grad_cam", "extent_cam"])(_images(1, 3, 64, 64))
    assert list(explanation.heatmaps) == ["grad_cam"]


# --- Families with a ReLU at the finer layer, trained on made-up images

SIDE = 64


def _stripes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Striped discs and rectangles on a blotchy background: images, classes and masks.

    The class is the direction of the stripes, which fill the object.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    classes = torch.randint(4, (count,), generator=generator)
    rows, columns = (
        axis[None] for axis in torch.meshgrid(*[torch.arange(SIDE)] * 2, indexing="ij")
    )
    half = uniform(10, 20, 2, 1, 1)
    y, x = (uniform(20, SIDE - 20, 1, 1) for _ in range(2))
    v, u = (rows - y) / half[:, 0], (columns - x) / half[:, 1]
    round_ones = uniform(0, 1, 1, 1) < 0.5
    masks = torch.where(round_ones, v**2 + u**2, torch.maximum(v.abs(), u.abs())) < 1
    angles = (classes * math.pi / 4)[:, None, None]
    phases = (rows * angles.sin() + columns * angles.cos()) * 1.2 + uniform(0, 6, 1, 1)
    background = F.interpolate(uniform(-1, 1, 3, 8, 8), (SIDE, SIDE), mode="bicubic")
    objects = uniform(-0.5, 0.5, 3, 1, 1) + phases.sin()[:, None]
    images = torch.where(masks[:, None], objects, background)
    images += 0.2 * torch.randn(images.shape, generator=generator)
    return images, classes, masks


def _block(channels: int, wider: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()
    )


def _vgg() -> nn.Module:
    stages = [
        nn.Sequential(_block(channels, wider), _block(wider, wider), nn.MaxPool2d(2))
        for channels, wider in ((3, 16), (16, 24), (24, 32), (32, 48))
    ]
    return nn.Sequential(
        nn.Sequential(*(layer for stage in stages for layer in stage)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 4),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels, wider, 1, stride, bias=False)
        self.body = nn.Sequential(
            _block(channels, wider, stride), nn.Conv2d(wider, wider, 3, padding=1), nn.ReLU()
        )

    def forward(self, features: Tensor) -> Tensor:
        return (self.skip(features) + self.body(features)).relu()


def _resnet() -> nn.Module:
    stages = [
        _Residual(channels, wider, stride)
        for channels, wider, stride in ((16, 16, 1), (16, 24, 2), (24, 32, 2), (32, 48, 2))
    ]
    return nn.Sequential(
        nn.Sequential(_block(3, 16, 2), *stages),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 4),
    )


def _densenet() -> nn.Module:
    module = torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=4)
    module.features.pool0 = nn.Identity()
    return module


TRAINED = {"vgg": (_vgg, "0.10"), "resnet": (_resnet, "0.3")}
TRAINED["densenet"] = (_densenet, "features.denseblock3")


@pytest.mark.long
@pytest.mark.parametrize("family", TRAINED)
def test_the_whole_object_on_small_networks_trained_on_made_up_images(family: str) -> None:
    build, finer = TRAINED[family]
    torch.manual_seed(0)
    module = build()
    images, classes, _ = _stripes(1024, seed=0)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(4):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(module(images[batch]), classes[batch]).backward()
            optimizer.step()
    network = Network(module, preprocessing=Preprocessing(crop_size=(SIDE, SIDE)))
    assert network.finer_layer == TargetLayer(finer)
    images, classes, masks = _stripes(128, seed=1)
    explanation = Explainer(network, ["grad_cam", "extent_cam"], top_k=1)(images, classes)
    right = (explanation.class_ids[:, 0] == classes).float().mean()
    best = {}
    for name, maps in explanation.heatmaps.items():
        assert maps.isfinite().all()
        shown = F.interpolate(maps[:, 1:].relu(), (SIDE, SIDE), mode="bilinear")[:, 0]
        shown = shown / shown.amax((1, 2), keepdim=True).clamp(min=1e-9)
        overlaps = []
        for level in torch.arange(0.05, 0.95, 0.05):  # each method at its best threshold
            claimed = shown > level
            union = (claimed | masks).sum((1, 2))
            overlaps.append(((claimed & masks).sum((1, 2)) / union).mean().item())
        best[name] = max(overlaps)
    assert right > 0.9
    assert best["extent_cam"] > best["grad_cam"] + 0.02
