"""Networks of Hugging Face and open_clip: small random ones, saved by the libraries themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from torch import Tensor, nn

from scacam import Explainer, Network, NetworkError, Preprocessing, load_network
from scacam.explainer import observe
from scacam.jobs.options import load_networks

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

NAMES = {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
    "num_labels": 4,
}
SQUASHED = {"size": {"height": 64, "width": 64}, "resample": 3}


def _vit(**options: Any) -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **options))


def _dinov2() -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)
    return transformers.Dinov2WithRegistersForImageClassification(config)


def _swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=64, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=4
    )
    return transformers.SwinForImageClassification(config)


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64, num_labels=4
    )
    return transformers.ConvNextForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


# By family: its module, the positions of other tokens, the map's size, the kind of its head.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None, int, str]] = {
    "ViT": (_vit, (0,), 4, "general"),
    "DINOv2": (_dinov2, (0, 1, 2, 3), 4, "general"),
    "Swin": (_swin, (), 8, "pooled"),
    "ConvNeXt": (_convnext, None, 2, "general"),
    "ResNet": (_resnet, None, 8, "pooled"),
}


def _saved(module: nn.Module, folder: Path, **processing: Any) -> str:
    module.save_pretrained(folder)
    transformers.ViTImageProcessor(**processing).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_from_its_folder(family: str, tmp_path: Path) -> None:
    make, others, side, kind = FAMILIES[family]
    torch.manual_seed(0)
    module = make().eval()
    network = load_network(f"hf.{family}", _saved(module, tmp_path, **SQUASHED))
    assert (network.name, network.target_layer.others) == (f"hf.{family}", others)
    assert network.feature_shape[1:] == (side, side)
    assert network.head.kind == kind
    images = torch.randn(2, 3, 64, 64)
    explanation = Explainer(network, ("hires_cam",), top_k=2)(images)
    torch.testing.assert_close(explanation.logits, module(images).logits, rtol=1e-4, atol=1e-6)
    expected = _hires_cam(network, images, explanation.class_ids)
    difference = (explanation.heatmaps["hires_cam"] - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()
    assert network.rebuild is not None
    assert network.rebuild().digest() == network.digest()


def _hires_cam(network: Network, images: Tensor, class_ids: Tensor) -> Tensor:
    """By autograd on all that the target layer gives."""
    held: list[Tensor] = []

    def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1].clone()

    with network.module.get_submodule(network.target_layer.name).register_forward_hook(hook):
        logits = network.module(images)
    maps = []
    for ids in class_ids.T:
        chosen = logits.gather(1, ids[:, None]).sum()
        (slopes,) = torch.autograd.grad(chosen, held[0], retain_graph=True)
        product = slopes * held[0].detach()
        if network.target_layer.others is None:
            maps.append(product.sum(1))
        else:
            tokens = product.sum(2)[:, len(network.target_layer.others) :]
            maps.append(tokens.unflatten(1, network.feature_shape[1:]))
    return torch.stack(maps, 1)


def test_what_the_folder_says_is_done(tmp_path: Path) -> None:
    labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    options = {**labels, "problem_type": "multi_label_classification"}
    config = {key: value for key, value in SMALL.items() if key != "num_labels"}
    module = transformers.ViTForImageClassification(transformers.ViTConfig(**config, **options))
    squashed = _saved(module, tmp_path / "squashed", **SQUASHED)
    network = load_network("hf.somebody/vit", squashed)
    assert network.name == "hf.somebody--vit"  # the name of a folder
    assert network.categories == tuple(NAMES.values())
    assert network.output.kind == "sigmoid"
    half = (0.5, 0.5, 0.5)
    assert network.preprocessing == Preprocessing((64, 64), 64, "bicubic", half, half)
    nameless = _vit()
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    nameless.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    plain = load_network("hf.vit", str(tmp_path / "plain"))
    assert (plain.categories, plain.output.kind) == (None, "softmax")
    assert plain.preprocessing.resize_size == 73


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "cannot"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot"),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps({"model_type": "bert", "hidden_size": 8})
            ),
            "no image classifier bert",
        ),
    ],
)
def test_a_folder_that_lacks_something_is_refused(
    spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    _saved(_vit(), tmp_path, **SQUASHED)
    spoil(tmp_path)
    with pytest.raises(NetworkError, match=message):
        load_network("hf.vit", str(tmp_path))


TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path)
    return "tiny-clip"


def test_a_zero_shot_classifier(tiny_clip: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = open_clip.create_model(tiny_clip).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "classes.txt").write_text("a tabby cat\ngarden hose\nsnow\n")
    name = f"open_clip.{tiny_clip}"
    (network,) = load_networks(
        [f"{name}={tmp_path / 'clip.pt'}"], prompts=[str(tmp_path / "classes.txt")]
    )
    assert (network.name, network.categories) == (name, ("a tabby cat", "garden hose", "snow"))
    assert network.target_layer.name == "visual.transformer.resblocks.1.ln_1"
    assert (network.target_layer.others, network.head.block is not None) == ((0,), True)
    assert network.preprocessing.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    # The library's own way: text embeddings averaged over templates, cosine times the scale.
    tokenizer = open_clip.get_tokenizer(tiny_clip)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        texts = []
        for category in network.categories or ():
            lines = [template(category) for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
            embedded = clip.encode_text(tokenizer(lines), normalize=True).mean(0)
            texts.append(embedded / embedded.norm())
        expected = (
            clip.logit_scale.exp()
            * clip.encode_image(images, normalize=True)
            @ (torch.stack(texts).T)
        )
    explanation = Explainer(network, ("hires_cam",), top_k=3)(images)
    torch.testing.assert_close(explanation.logits, expected, rtol=1e-4, atol=1e-4)
    maps = _hires_cam(network, images, explanation.class_ids)
    difference = (explanation.heatmaps["hires_cam"] - maps).abs().max()
    assert difference <= 1e-3 * maps.abs().max()


def test_other_classes_are_another_network(tiny_clip: str) -> None:
    name = f"open_clip.{tiny_clip}"
    one, same, other = (
        load_network(name, "random", prompts=prompts)
        for prompts in (["cat", "dog"], ["cat", "dog"], ["cat", "dogs"])
    )
    assert one.digest() == same.digest() != other.digest()
    with pytest.raises(NetworkError, match="needs classes: --prompts FILE"):
        load_network(name, "random")
    with pytest.raises(NetworkError, match="has no weights 'openai'"):
        load_network(name, "openai", prompts=["cat"])
    with pytest.raises(NetworkError, match="open_clip has no model 'none'"):
        load_network("open_clip.none", "random", prompts=["cat"])


def test_attention_pooling_of_a_convolutional_clip(tiny_clip: str) -> None:
    """CLIP's ResNet reads its last map by attention, which no linear head does."""
    torch.manual_seed(0)
    visual = open_clip.modified_resnet.ModifiedResNet(
        layers=[1, 1, 1, 1], output_dim=16, heads=4, image_size=64, width=8
    )
    network = Network(
        nn.Sequential(visual, nn.Linear(16, 3)), preprocessing=Preprocessing(crop_size=(64, 64))
    )
    assert (network.target_layer.name, network.head.kind) == ("0.layer4", "general")
    images = torch.randn(2, 3, 64, 64)
    seen = observe(network, images, top_k=2)
    maps = Explainer(network, ("hires_cam",), top_k=2)(images).heatmaps["hires_cam"]
    expected = _hires_cam(network, images, seen.class_ids)
    assert (maps - expected).abs().max() <= 1e-4 * expected.abs().max()
