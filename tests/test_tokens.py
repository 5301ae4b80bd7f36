"""Token grids: found by what tokens are, explained as autograd and other libraries explain them."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from pytorch_grad_cam import GradCAM, HiResCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from scacam import Explainer, Network, NetworkError, Preprocessing, load_network
from scacam.explainer import observe
from scacam.networks.anatomy.tokens import grid_of, replaced, shape_of_grid

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

SQUARE, WIDE = Preprocessing(crop_size=(64, 64)), Preprocessing(crop_size=(48, 80))


@pytest.mark.parametrize(
    ("count", "size", "shape"),
    [
        (196, (224, 224), (14, 14)),
        (140, (224, 160), (14, 10)),
        (15, (48, 80), (3, 5)),
        (15, (47, 82), (3, 5)),  # cut off, or padded
        (6, (32, 56), (2, 3)),
        (8, (224, 224), None),
        (13, (224, 224), None),
        (1, (224, 224), None),
        (0, (224, 224), None),
    ],
)
def test_the_shape_of_a_grid(
    count: int, size: tuple[int, int], shape: tuple[int, int] | None
) -> None:
    assert shape_of_grid(count, size) == shape


def test_a_grid_is_taken_out_row_by_row_and_put_back() -> None:
    tokens = torch.arange(8.0)[None, :, None]  # 3 and 5 are no part of the image
    grid = grid_of(tokens, (3, 5), (20, 30))
    assert grid.tolist() == [[[[0, 1, 2], [4, 6, 7]]]]
    assert replaced(tokens, (3, 5), -grid)[0, :, 0].tolist() == [0, -1, -2, 3, -4, 5, -6, -7]
    with pytest.raises(NetworkError, match="7 tokens make no grid"):
        grid_of(tokens, (0,), (64, 64))


class Middle(nn.Module):
    """A transformer of one block whose class token stands in the middle of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 16, stride=16)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.enter = nn.Dropout(0.1)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).mT
        middle = patches.shape[1] // 2
        token = self.token.expand(len(images), -1, -1)
        tokens = self.enter(torch.cat([patches[:, :middle], token, patches[:, middle:]], 1))
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head(self.norm2(tokens)[:, middle])


def _timm(name: str, **options: Any) -> Callable[[tuple[int, int]], nn.Module]:
    return lambda size: timm.create_model(
        name,
        img_size=size,
        num_classes=7,
        **{"depth": 2, "embed_dim": 48, "num_heads": 3} | options,
    )


def _torchvision(size: tuple[int, int]) -> nn.Module:
    module = torchvision.models.VisionTransformer(size[0], 16, 2, 3, 48, 96, num_classes=7)
    nn.init.normal_(module.heads.head.weight)
    return module


# By name: how it is made, the target layer, the tokens beside the image's, whether pooled first.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], str, tuple[int, ...], bool]] = {
    "class token": (_timm("vit_tiny_patch16_224"), "blocks.1.norm1", (0,), False),
    "two heads": (_timm("deit_tiny_distilled_patch16_224"), "blocks.1.norm1", (0, 1), False),
    "registers": (
        _timm("vit_small_patch14_reg4_dinov2", patch_size=16),
        "blocks.1.norm1",
        (0, 1, 2, 3, 4),
        False,
    ),
    "in the middle": (lambda _: Middle(), "norm1", (8,), False),
    "torchvision": (_torchvision, "encoder.layers.encoder_layer_1.ln_1", (0,), False),
    "biased by position": (
        _timm("beit_base_patch16_224", global_pool="token"),
        "blocks.1.norm1",
        (0,),
        False,
    ),
    "rotary": (
        _timm("eva02_tiny_patch14_224", patch_size=16, global_pool="token"),
        "blocks.1.norm1",
        (0,),
        False,
    ),
    "averaged": (_timm("vit_tiny_patch16_224", global_pool="avg"), "blocks", (0,), True),
    "averaged without others": (
        _timm("vit_tiny_patch16_224", global_pool="avg", class_token=False, fc_norm=False),
        "norm",
        (),
        True,
    ),
    "attention pooling": (_timm("vit_base_patch16_siglip_224"), "norm", (), False),
}
PRUNED = {"class token", "two heads", "registers", "torchvision", "biased by position", "rotary"}
LINEAR = PRUNED - {"rotary"}
"""Those whose keys are the same function of every token, wherever it stands."""


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[str, Network]:
    make, layer, others, even = NETWORKS[request.param]
    torch.manual_seed(0)
    module = make((64, 64))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "gamma" in name or "head" in name or "cls" in name:  # not as small as they begin
                nn.init.normal_(parameter)
    network = Network(module, preprocessing=SQUARE)
    assert (network.target_layer.name, network.target_layer.others) == (layer, others)
    assert (network.head.is_even or network.head.kind == "pooled") == even
    block = network.head.block
    assert (block is not None) == (request.param in PRUNED)
    assert (block is not None and block.layer == layer) == (request.param in LINEAR)
    assert network.feature_shape[1:] == (4, 4)
    return request.param, network


def _by_autograd(
    network: Network, images: Tensor, class_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the target layer, the gradients of classes with respect to them, and the logits."""
    held: list[Tensor] = []

    def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1].clone()

    with network.module.get_submodule(network.target_layer.name).register_forward_hook(hook):
        logits = network.module(images)
    gradients = [
        torch.autograd.grad(logits.gather(1, ids[:, None]).sum(), held[0], retain_graph=True)[0]
        for ids in class_ids.T
    ]
    return held[0].detach(), torch.stack(gradients, 1), logits.detach()


def _grid(tokens: Tensor, network: Network) -> Tensor:
    """`[…, N, C]` as `[…, C, h, w]`, by the positions and shape that the test knows."""
    kept = [i for i in range(tokens.shape[-2]) if i not in (network.target_layer.others or ())]
    return tokens[..., kept, :].mT.unflatten(-1, network.feature_shape[1:])


def _assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.abs().max() > 0


def test_every_head_equals_autograd_on_its_tokens(case: tuple[str, Network]) -> None:
    _, network = case
    images = torch.randn(3, 3, 64, 64)
    seen = observe(network, images, top_k=4)
    tokens, slopes, logits = _by_autograd(network, images, seen.class_ids)
    features, gradients = _grid(tokens, network), _grid(slopes, network)
    _assert_near(seen.logits, logits)
    _assert_near(seen.features, features)
    _assert_near(seen.gradients.expand_as(gradients), gradients)
    averages = gradients.mean((3, 4))
    products = gradients * features[:, None]
    maps = Explainer(network, ("grad_cam", "hires_cam", "sca_cam"), top_k=4)(images).heatmaps
    _assert_near(maps["grad_cam"], torch.einsum("bkc,bchw->bkhw", averages, features))
    _assert_near(maps["hires_cam"], products.sum(2))
    _assert_near(maps["sca_cam"], torch.einsum("bkc,bkchw->bkhw", averages, products))


def test_equals_pytorch_grad_cam_with_its_reshaping(case: tuple[str, Network]) -> None:
    """Whose hand-written transform takes the first token off, and whose maps are scaled to 1."""
    name, network = case
    if name == "in the middle":
        return  # it has no transform for that
    first = len(network.target_layer.others or ())

    def reshape(tokens: Tensor) -> Tensor:
        return tokens[:, first:].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)

    images = torch.randn(2, 3, 64, 64)
    module = network.module.requires_grad_()
    layer = module.get_submodule(network.target_layer.name)
    explanation = Explainer(network, ("grad_cam", "hires_cam"), top_k=1)(images)
    targets = [ClassifierOutputTarget(int(ids[0])) for ids in explanation.class_ids]
    for method, theirs in (("grad_cam", GradCAM), ("hires_cam", HiResCAM)):
        with theirs(model=module, target_layers=[layer], reshape_transform=reshape) as cam:
            expected = torch.from_numpy(cam(images, targets))
        maps = explanation.heatmaps[method][:, :1].relu()
        maps = maps - maps.amin((2, 3), keepdim=True)
        maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)
        maps = nn.functional.interpolate(maps, (64, 64), mode="bilinear", align_corners=False)
        maps = maps - maps.amin((2, 3), keepdim=True)
        maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)
        torch.testing.assert_close(maps[:, 0], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["class token", "registers", "averaged"])
def test_images_that_are_not_square(name: str) -> None:
    make, layer, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = Network(make((48, 80)), preprocessing=WIDE)
    assert network.target_layer.name == layer
    assert network.feature_shape[1:] == (3, 5)
    images = torch.randn(2, 3, 48, 80)
    seen = observe(network, images, top_k=2)
    tokens, slopes, _ = _by_autograd(network, images, seen.class_ids)
    _assert_near(seen.features, _grid(tokens, network))
    gradients = _grid(slopes, network)
    _assert_near(seen.gradients.expand_as(gradients), gradients)


def test_images_of_another_size_than_the_network_was_looked_at_with() -> None:
    torch.manual_seed(0)
    module = _timm("vit_tiny_patch16_224", dynamic_img_size=True)((64, 64))
    maps = Explainer(Network(module, preprocessing=SQUARE), top_k=1)(torch.randn(1, 3, 48, 80))
    assert maps.heatmaps["grad_cam"].shape == (1, 1, 3, 5)


def test_layers_of_a_transformer_by_name() -> None:
    torch.manual_seed(0)
    module = _timm("vit_tiny_patch16_224", depth=3)((64, 64))
    network = Network(module, preprocessing=SQUARE, target_layer=["blocks.1", "blocks.2.norm1"])
    images = torch.randn(2, 3, 64, 64)
    explanation = Explainer(network, ("grad_cam",), top_k=2)(images)
    for layer, maps in explanation.layers.items():
        alone = Network(module, preprocessing=SQUARE, target_layer=layer)
        expected = Explainer(alone, ("grad_cam",), top_k=2)(images).heatmaps["grad_cam"]
        _assert_near(maps["grad_cam"], expected)
    with pytest.raises(NetworkError, match=r"'blocks\.2': .* reads the class token alone"):
        Network(module, preprocessing=SQUARE, target_layer="blocks.2")


def test_the_module_is_as_it_was(case: tuple[str, Network]) -> None:
    _, network = case
    attention = nn.functional.scaled_dot_product_attention
    Explainer(network)(torch.randn(1, 3, 64, 64))
    assert nn.functional.scaled_dot_product_attention is attention
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any("forward" in vars(layer) for layer in network.module.modules())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("timm.vit_tiny_patch16_224", (0,)),
        ("timm.deit_tiny_distilled_patch16_224", (0, 1)),
        ("vit_b_16", (0,)),
    ],
)
def test_networks_by_their_names(name: str, others: tuple[int, ...]) -> None:
    network = load_network(name, "random")
    assert network.target_layer.others == others
    assert network.head.block is not None
    for head in network.module.modules():
        if isinstance(head, nn.Linear) and head.out_features == 1000:
            nn.init.normal_(head.weight)  # torchvision's are zero
    images = torch.randn(1, 3, 224, 224)
    seen = observe(network, images, top_k=2)
    tokens, slopes, _ = _by_autograd(network, images, seen.class_ids)
    _assert_near(seen.features, _grid(tokens, network))
    _assert_near(seen.gradients, _grid(slopes, network))


@pytest.mark.long
def test_a_class_token_that_was_mixed_before_the_grid_was_halved() -> None:
    """It differs from image to image when its sequence is first seen, and stands where it did."""
    network = load_network("timm.pit_ti_224", "random")
    assert network.target_layer.others == (0,)
    assert network.feature_shape[1:] == (7, 7)
    images = torch.randn(1, 3, 224, 224)
    seen = observe(network, images, top_k=2)
    tokens, slopes, _ = _by_autograd(network, images, seen.class_ids)
    _assert_near(seen.features, _grid(tokens, network))
    _assert_near(seen.gradients, _grid(slopes, network))
