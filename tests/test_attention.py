"""LeGrad and attention rollout, against the attention that the libraries themselves give out."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from scacam import Explainer, Network, Preprocessing

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

SIDE = 32
Attended = Callable[[nn.Module, Tensor], tuple[Tensor, list[Tensor]]]


def _of_timm(name: str) -> nn.Module:
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    module = timm.create_model(name, num_classes=5, **sizes)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):  # larger than timm's, or all tokens look alike
            nn.init.normal_(layer.weight, std=0.3)
    return module


def _attended_by_timm(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    for block in module.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _layer, _given, made: seen.append(made))
    return module(images), seen


def _of_torchvision() -> nn.Module:
    module = VisionTransformer(SIDE, 8, 3, 2, 24, 48, num_classes=5)
    nn.init.normal_(module.heads.head.weight)  # torchvision's are zeros
    return module


def _attended_by_torchvision(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []

    def forward(attention: nn.Module, tokens: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """By hand, since what torch gives out is a copy of what it uses."""
        made = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = made.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        return attention.out_proj((seen[-1] @ value).transpose(1, 2).flatten(2)), None

    for layer in module.encoder.layers:
        layer.self_attention.forward = MethodType(forward, layer.self_attention)
    return module(images), seen


class _Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = transformers.ViTConfig(
            **sizes, intermediate_size=48, image_size=SIDE, patch_size=8, num_labels=5
        )
        self.network = transformers.ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def _attended_by_transformers(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    module.network.set_attn_implementation("eager")
    output = module.network(images, output_attentions=True)
    return output.logits, list(output.attentions)


# By network: how to make it, what its library says of its attention, how many of its first tokens
# are no part of the image, how many are classified.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Attended, int, int]] = {
    "timm": (lambda: _of_timm("vit_tiny_patch16_224"), _attended_by_timm, 1, 1),
    "distilled": (
        lambda: _of_timm("deit_tiny_distilled_patch16_224"),
        _attended_by_timm,
        2,
        2,
    ),
    "torchvision": (_of_torchvision, _attended_by_torchvision, 1, 1),
    "transformers": (_Logits, _attended_by_transformers, 1, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_as_the_library_has_it(name: str) -> None:
    make, attended, others, read = NETWORKS[name]
    torch.manual_seed(0)
    module = make().eval()
    network = Network(module, preprocessing=Preprocessing(crop_size=(SIDE, SIDE)))
    images = torch.randn(2, 3, SIDE, SIDE)
    explanation = Explainer(network, ("legrad", "attention_rollout"), top_k=2)(images)
    logits, weights = attended(module, images)
    torch.testing.assert_close(explanation.logits, logits.detach(), rtol=1e-4, atol=1e-5)
    assert len(weights) == 3
    for rank, ids in enumerate(explanation.class_ids.T):
        score = logits.gather(1, ids[:, None]).sum()
        (slopes,) = torch.autograd.grad(score, weights[-1], retain_graph=True)
        expected = slopes.clamp(min=0).mean(1).sum(1) / others
        _assert_near(explanation.heatmaps["legrad"][:, rank], expected[:, others:])
    flow = torch.eye(weights[0].shape[-1])
    for each in weights:
        flow = (each.detach().mean(1) + torch.eye(len(flow[-1]))) / 2 @ flow
    expected = flow[:, :read, others:].mean(1)
    maps = explanation.heatmaps["attention_rollout"]
    _assert_near(maps[:, 0], expected)
    assert torch.equal(maps[:, 0], maps[:, 1])


def _assert_near(maps: Tensor, expected: Tensor) -> None:
    assert (maps.flatten(1) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std(1).min() > 1e-3 * expected.abs().max()


def test_where_there_is_no_such_attention() -> None:
    """Class attention over what other layers mixed can be differentiated, but not rolled out."""
    torch.manual_seed(0)
    module = timm.create_model("cait_xxs24_224", depth=2, img_size=SIDE, num_classes=5)
    network = Network(module.eval(), preprocessing=Preprocessing(crop_size=(SIDE, SIDE)))
    assert network.supports("legrad")
    assert not network.supports("attention_rollout")
    pooled = timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=SIDE, num_classes=5, global_pool="avg"
    )
    network = Network(pooled.eval(), preprocessing=Preprocessing(crop_size=(SIDE, SIDE)))
    assert not network.supports("legrad")
