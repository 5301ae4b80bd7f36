"""Networks: target layer and head found by structure, weights of every form, clear refusals."""

import argparse
import gc
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foolbox
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from servers import BUCKET, ObjectStore
from torch import Tensor, nn

from scacam import Explainer, Network, NetworkError, Preprocessing, ScacamError, load_network
from scacam.images import see
from scacam.jobs.options import add_network_options, load_networks
from scacam.methods import DEFAULT_METHODS, METHODS
from scacam.networks.anatomy.layer import TargetLayer
from scacam.runs.describe import describe_network
from scacam.runs.record import differences
from scacam.storage.s3 import open_bucket

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

IMAGES = Preprocessing(crop_size=(32, 32))


# --- What is found

FAMILIES = {
    "squeezenet1_1": ("features", "scores", "classifier.1", (512, 13, 13)),
    "resnet18": ("layer4", "pooled", "fc", (512, 7, 7)),
    "resnet50": ("layer4", "pooled", "fc", (2048, 7, 7)),
    "densenet161": ("features", "rectified", "classifier", (2208, 7, 7)),
    "vgg16": ("features", "general", None, (512, 7, 7)),
    "vgg16_gap": ("features", "pooled", "classifier", (1024, 14, 14)),
    "efficientnet_lite0": ("_swish", "pooled", "_fc", (1280, 7, 7)),
    "efficientnet_lite1": ("_swish", "pooled", "_fc", (1280, 8, 8)),
    "efficientnet_lite2": ("_swish", "pooled", "_fc", (1280, 9, 9)),
    "convnext_tiny": ("features", "general", None, (768, 7, 7)),  # LayerNorm before the classifier
    "efficientnet_b0": ("features", "pooled", "classifier.1", (1280, 7, 7)),
    "googlenet": ("inception5b", "pooled", "fc", (1024, 7, 7)),
    "mobilenet_v2": ("features", "pooled", "classifier.1", (1280, 7, 7)),
    "mobilenet_v3_small": ("features", "general", None, (576, 7, 7)),  # an MLP behind the pooling
    "regnet_x_400mf": ("trunk_output", "pooled", "fc", (400, 7, 7)),
    "shufflenet_v2_x0_5": ("conv5", "pooled", "fc", (1024, 7, 7)),
    "swin_t": ("permute", "pooled", "head", (768, 7, 7)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_target_layer_and_head_are_found(name: str) -> None:
    layer, kind, classifier, shape = FAMILIES[name]
    network = load_network(name, "random")
    assert network.target_layer.name == layer
    assert (network.head.kind, network.head.classifier) == (kind, classifier)
    assert network.feature_shape == shape
    assert network.num_classes == len(network.categories or ()) == 1000
    assert network.supports("gap_cam") == (classifier is not None or name == "convnext_tiny")
    assert not any(parameter.requires_grad for parameter in network.module.parameters())


def test_timm_networks_by_structure() -> None:
    swin = load_network("timm.swin_tiny_patch4_window7_224", "random")
    assert swin.target_layer == TargetLayer("norm", channels_last=True)
    assert (swin.head.kind, swin.feature_shape) == ("pooled", (768, 7, 7))
    tagged = load_network("timm.resnet18.a1_in1k", "random")
    assert (tagged.target_layer.name, tagged.head.kind) == ("layer4", "pooled")
    # timm's own published preprocessing: 95 % of the shorter side, bicubic
    assert tagged.preprocessing == Preprocessing((224, 224), 235, "bicubic")
    for name, message in {
        "timm.resnet19": "timm has no network 'resnet19'",
        "timm.resnet18.nobody": "nobody",
    }.items():
        with pytest.raises(NetworkError, match=message):
            load_network(name, "random")


class Branching(nn.Module):
    """Calls one layer twice, and classifies into as many classes as it has channels."""

    def __init__(self, channels_last: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 4, stride=4)
        self.block = nn.Conv2d(5, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5) if channels_last else nn.Identity()
        self.unused = nn.Linear(1, 1)
        self.classifier = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.block(self.block(self.stem(images)).relu())
        if isinstance(self.norm, nn.LayerNorm):
            features = self.norm(features.permute(0, 2, 3, 1))
            return self.classifier(features.mean((1, 2)))
        return self.classifier(features.mean((2, 3)))


def test_a_layer_that_runs_twice_is_explained_at_its_last_call() -> None:
    network = Network(Branching(), preprocessing=IMAGES)
    assert network.target_layer == TargetLayer("block", call=1)
    assert network.head.kind == "pooled"


def test_a_second_classifier_of_the_same_shape_is_not_mistaken_for_the_first() -> None:
    module = Branching()
    module.auxiliary = nn.Linear(5, 5)
    assert Network(module, preprocessing=IMAGES).head.classifier == "classifier"


@pytest.mark.parametrize("crop", [(32, 32), (32, 64), (64, 32)])
def test_a_layer_that_gives_channels_last(crop: tuple[int, int]) -> None:
    module = Branching(channels_last=True)
    network = Network(module, preprocessing=Preprocessing(crop_size=crop))
    assert network.target_layer == TargetLayer("norm", channels_last=True)
    assert network.head.kind == "pooled"
    assert network.feature_shape == (5, crop[0] // 4, crop[1] // 4)
    images = torch.randn(2, 3, *crop)
    explanation = Explainer(network, ("gap_cam",), top_k=1)(images)
    features = module.norm(module.block(module.block(module.stem(images)).relu()).movedim(1, 3))
    weights = module.classifier.weight[explanation.class_ids[:, 0]]
    expected = torch.einsum("bhwc,bc->bhw", features, weights)
    torch.testing.assert_close(explanation.heatmaps["gap_cam"][:, 0], expected.detach())


def test_a_named_target_layer() -> None:
    network = load_network("resnet18", "random", target_layer="layer3")
    assert network.target_layer == TargetLayer("layer3")
    assert (network.head.kind, network.feature_shape) == ("general", (256, 14, 14))
    maps = Explainer(network, top_k=1)(torch.randn(1, 3, 224, 224)).heatmaps
    assert set(maps) == {
        name
        for name, needs in METHODS.items()
        if not (needs.needs_class_weights or needs.needs_head) and needs.needs_attention == "none"
    }
    assert maps["grad_cam"].shape == (1, 1, 14, 14)
    assert maps["extent_cam"].shape == (1, 1, 28, 28)


def test_larger_and_non_square_inputs_and_gray_ones() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    network = Network(module)
    assert network.preprocessing.channels == 1
    assert network.feature_shape == (4, 56, 56)
    wide = Network(module, preprocessing=Preprocessing((48, 96), 48, mean=(0.5,), std=(0.5,)))
    assert wide.feature_shape == (4, 12, 24)
    pixels = torch.arange(48 * 96, dtype=torch.int64).reshape(1, 48, 96, 1).to(torch.uint8)
    images = wide.normalize(pixels)
    assert images.shape == (1, 1, 48, 96)
    torch.testing.assert_close(images[0, 0], pixels[0, :, :, 0] / 127.5 - 1)
    assert Explainer(wide)(images).heatmaps["sca_cam"].shape == (1, 3, 12, 24)


def test_images_stay_channels_last_in_memory() -> None:
    network = load_network("squeezenet1_1", "random")
    images = network.normalize(torch.zeros(2, 32, 48, 3, dtype=torch.uint8))
    assert images.shape == (2, 3, 32, 48)
    assert images.is_contiguous(memory_format=torch.channels_last)


def _modules_that_cannot_be_explained() -> dict[str, tuple[Callable[[], Network], str]]:
    def conv() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def network(module: nn.Module, **options: Any) -> Network:
        return Network(module, preprocessing=IMAGES, **options)

    def linear() -> nn.Module:
        return nn.Sequential(*conv(), nn.Linear(4, 5))

    return {
        "no map": (
            lambda: network(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))),
            "no layer with a spatial output",
        ),
        "no logits": (lambda: network(nn.Conv2d(3, 4, 4)), "not logits"),
        "no such layer": (lambda: network(linear(), target_layer="layer4"), "no layer 'layer4'"),
        "not a map": (lambda: network(linear(), target_layer="3"), "not a spatial map"),
        "not run": (lambda: network(Branching(), target_layer="unused"), "did not run"),
        "categories": (
            lambda: network(linear(), categories=["cat", "dog"]),
            "2 category names for 5 classes",
        ),
        "channels": (
            lambda: network(nn.Sequential(nn.Conv2d(4, 4, 4), *linear()[1:])),
            r"does not run on images of shape \[2, 3, 32, 32\]",
        ),
    }


@pytest.mark.parametrize("case", _modules_that_cannot_be_explained())
def test_what_cannot_be_explained_is_refused(case: str) -> None:
    make, message = _modules_that_cannot_be_explained()[case]
    with pytest.raises(NetworkError, match=message):
        make()


class Beside(nn.Module):
    """Classifies by its features, and by the brightness of the image as well."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 4, stride=4)
        self.classifier = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.features(images).mean((2, 3))
        return self.classifier(torch.cat([pooled, images.mean((1, 2, 3))[:, None]], 1))


def test_a_map_beside_which_the_logits_know_more_of_the_image_is_refused() -> None:
    with pytest.raises(NetworkError, match="Beside: no spatial map leads straight"):
        Network(Beside(), preprocessing=IMAGES)
    named = Network(Beside(), preprocessing=IMAGES, target_layer="features")
    assert named.head.kind == "general"


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet17", "DEFAULT", "unknown network 'resnet17'"),
        ("deeplabv3_resnet50", "random", "unknown network"),
        ("resnet18", "IMAGENET1K_V9", "no weights 'IMAGENET1K_V9', only IMAGENET1K_V1, DEFAULT"),
        ("efficientnet_lite0", "V2", "no weights 'V2'"),
        ("vgg16_gap", "DEFAULT", "no published weights"),
        ("resnet18", "no/such/file.pth", "cannot read checkpoint no/such/file.pth"),
        ("no_such_package:make", "DEFAULT", "cannot import network"),
        ("torch:no_such_function", "DEFAULT", "cannot import network"),
        ("builtins:dict", "DEFAULT", "returned a dict, not a module"),
        ("builtins:dict", "random", "a factory makes its own weights"),
    ],
)
def test_names_and_weights_that_do_not_exist(name: str, weights: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        load_network(name, weights)


# --- What a network returns


class Last(nn.Module):
    """A small classifier, and something done to its logits."""

    def __init__(self, step: Callable[[Tensor], Tensor], classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = _classifier(classes)
        self.step = step

    def forward(self, images: Tensor) -> Tensor:
        return self.step(self.inner(images))


def _classifier(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], str, str | None]] = {
    "logits": (lambda z: z, "softmax", None),
    "module": (nn.Softmax(1), "softmax", "softmax"),
    "function": (lambda z: nn.functional.softmax(z, dim=1), "softmax", "softmax"),
    "method, then a shape": (lambda z: z[..., None].softmax(1).flatten(1), "softmax", "softmax"),
    "logarithm": (lambda z: nn.functional.log_softmax(z, 1), "softmax", "log_softmax"),
    "labels": (nn.Sigmoid(), "sigmoid", "sigmoid"),
    "labels' logarithm": (nn.LogSigmoid(), "sigmoid", "log_sigmoid"),
    "compiled": (torch.compile(nn.Softmax(1), backend="eager"), "softmax", "softmax"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_network_that_ends_in_probabilities_is_explained_by_its_logits(end: str) -> None:
    step, kind, last_step = ENDS[end]
    module = Last(step)
    network = Network(module, preprocessing=IMAGES)
    assert (network.output.kind, network.output.last_step) == (kind, last_step)
    assert (network.target_layer.name, network.head.kind) == ("inner.1", "pooled")
    images = torch.randn(2, 3, 32, 32)
    inner = Network(module.inner, preprocessing=IMAGES, output_kind=kind)
    plain = Explainer(inner, top_k=3)(images)
    explanation = Explainer(network, top_k=3)(images)
    torch.testing.assert_close(explanation.logits, plain.logits)
    torch.testing.assert_close(explanation.heatmaps, plain.heatmaps)
    expected = plain.logits.softmax(1) if kind == "softmax" else plain.logits.sigmoid()
    torch.testing.assert_close(network.probabilities(explanation.logits), expected)
    with torch.no_grad():
        returned = module(images)
    if last_step is not None:
        made = returned.exp() if last_step.startswith("log") else returned
        torch.testing.assert_close(network.probabilities(explanation.logits), made)


@pytest.mark.parametrize("step", [lambda z: z, torch.sigmoid])
def test_a_single_logit_stands_for_two_classes(step: Callable[[Tensor], Tensor]) -> None:
    module = Last(step, classes=1)
    network = Network(module, preprocessing=IMAGES, categories=["healthy", "ill"])
    assert (network.num_classes, network.output.kind) == (2, "sigmoid")
    images = torch.randn(4, 3, 32, 32)
    explanation = Explainer(network, top_k=2)(images)
    logit = module.inner(images).detach()[:, 0]
    torch.testing.assert_close(explanation.logits, torch.stack([-logit, logit], 1))
    probabilities = network.probabilities(explanation.logits)
    torch.testing.assert_close(probabilities[:, 1], logit.sigmoid())
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    # Gap-CAM by hand: the classifier's weights on the features, and against them.
    features = module.inner[:2](images)
    by_hand = torch.einsum("bchw,c->bhw", features, module.inner[4].weight[0]).detach()
    of_class_1 = torch.where(explanation.class_ids == 1, 1.0, -1.0)
    torch.testing.assert_close(
        explanation.heatmaps["gap_cam"], of_class_1[..., None, None] * by_hand[:, None]
    )
    with pytest.raises(NetworkError, match="1 category names for 2 classes"):
        Network(module, preprocessing=IMAGES, categories=["ill"])


def test_a_single_score_map_is_differentiated() -> None:
    """One ReLU serves both classes, so the closed form does not hold."""
    torch.manual_seed(0)
    squeezenet = torchvision.models.squeezenet1_1(num_classes=1)
    network = Network(squeezenet, preprocessing=Preprocessing((64, 64)))
    assert (network.head.kind, network.num_classes) == ("general", 2)
    maps = Explainer(network, ("grad_cam",), top_k=2)(torch.randn(2, 3, 64, 64)).heatmaps
    torch.testing.assert_close(maps["grad_cam"][:, 0], -maps["grad_cam"][:, 1])


def test_independent_labels_are_said() -> None:
    module = _classifier()
    assert Network(module, preprocessing=IMAGES).output.kind == "softmax"
    network = Network(module, preprocessing=IMAGES, output_kind="sigmoid")
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    torch.testing.assert_close(network.probabilities(logits), logits.sigmoid())


def _normed(values: Tensor) -> Tensor:
    return nn.functional.batch_norm(values, None, None, training=True)


def _unfit() -> dict[str, tuple[Callable[[], nn.Module], str]]:
    def traced() -> nn.Module:
        return torch.jit.trace(_classifier().eval(), torch.zeros(1, 3, 32, 32), check_trace=False)

    def unnormed() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 4, stride=4),
            nn.BatchNorm2d(6, track_running_stats=False),
            *_classifier()[2:],
        )

    return {
        "softmax by hand": (
            lambda: Last(lambda z: z.exp() / z.exp().sum(1, keepdim=True)),
            "returns probabilities .* let it return its logits",
        ),
        "its logarithm": (
            lambda: Last(lambda z: z - z.logsumexp(1, keepdim=True)),
            "returns log-probabilities",
        ),
        "sigmoid in place": (lambda: Last(lambda z: z.sigmoid_()), "result of a Sigmoid"),
        "softmax over the batch": (lambda: Last(lambda z: z.softmax(0)), "not one over all"),
        "softmax by parts": (
            lambda: Last(lambda z: z.reshape(-1, 2, 2).softmax(2).flatten(1), 4),
            "not one over all its classes",
        ),
        "softmax of one": (lambda: Last(nn.Softmax(1), 1), "softmax of its single output"),
        "integers": (lambda: Last(lambda z: z.long()), "returns torch.int64"),
        "unknown to its batch": (unnormed, "layer '1' has no running statistics"),
        "statistics of the batch": (lambda: Last(_normed), "another answer .* in another batch"),
        "dropout": (lambda: Last(nn.functional.dropout), "another answer at another time"),
        "meta device": (lambda: _classifier().to("meta"), "0.weight is on the meta device"),
        "traced": (traced, "holds TorchScript"),
        "scripted": (lambda: torch.jit.script(_classifier()), "holds TorchScript"),
        "traced inside": (lambda: nn.Sequential(traced()), "holds TorchScript"),
        "inference mode": (
            lambda: Last(torch.inference_mode()(lambda z: z.detach() * 2)),
            "do not depend on layer",
        ),
        "no parameters": (
            lambda: nn.Sequential(nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "no layer with a spatial output",
        ),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", _unfit())
def test_what_would_be_explained_wrongly_is_refused(case: str) -> None:
    make, message = _unfit()[case]
    with pytest.raises(NetworkError, match=message):
        Network(make(), preprocessing=IMAGES)


def test_a_kind_that_the_last_step_contradicts_is_refused() -> None:
    with pytest.raises(NetworkError, match="ends in softmax, so its output is not of kind sigmoid"):
        Network(Last(nn.Softmax(1)), preprocessing=IMAGES, output_kind="sigmoid")


class Frozen(nn.Module):
    """Runs its backbone without gradients, as one fine-tunes a classifier."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone = _classifier()[:2]
        self.neck = nn.Sequential(nn.Linear(6, 6), nn.Tanh()) if hidden else nn.Identity()
        self.classifier = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(images)
        return self.classifier(self.neck(features.mean((2, 3))))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_backbone_without_gradients(hidden: bool) -> None:
    module = Frozen(hidden)
    layer = "backbone.1" if hidden else None
    network = Network(module, preprocessing=IMAGES, target_layer=layer)
    assert network.head.kind == ("general" if hidden else "pooled")
    images = torch.randn(1, 3, 32, 32)
    explanation = Explainer(network, ("grad_cam",), top_k=1)(images)
    features = module.backbone(images).detach().requires_grad_()
    logits = module.classifier(module.neck(features.mean((2, 3))))
    (gradients,) = torch.autograd.grad(logits[0, explanation.class_ids[0, 0]], features)
    expected = (gradients.mean((2, 3), keepdim=True) * features).sum(1)
    torch.testing.assert_close(explanation.heatmaps["grad_cam"][:, 0], expected.detach())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_weights_that_are_buffers() -> None:
    module = _classifier()
    for layer in (module[0], module[4]):
        for key, value in list(layer.named_parameters()):
            delattr(layer, key)
            layer.register_buffer(key, value.detach())
    network = Network(module.double(), preprocessing=IMAGES)
    images = network.normalize(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert images.dtype == torch.float64
    assert Explainer(network)(images).heatmaps["gap_cam"].shape == (1, 3, 8, 8)


def test_classes_are_named_once() -> None:
    module = _classifier()
    assert Network(module, preprocessing=IMAGES).class_name(2) == "class 2"
    named = Network(module, preprocessing=IMAGES, categories=["ant", "bee", "cat"])
    assert named.class_name(2) == "cat"


def test_the_kind_is_part_of_a_run_and_older_runs_go_on() -> None:
    def record(network: Network) -> dict[str, Any]:
        return {"versions": {"scacam": "1"}, "networks": [describe_network(network, METHODS)]}

    plain = record(Network(_classifier(), name="mine", preprocessing=IMAGES))
    assert plain["networks"][0]["output_kind"] == "softmax"
    older = {**plain, "networks": [{**plain["networks"][0]}]}
    del older["networks"][0]["output_kind"], older["networks"][0]["last_step"]
    assert differences(older, plain) == []
    kind = record(Network(_classifier(), name="mine", preprocessing=IMAGES, output_kind="sigmoid"))
    kind["networks"][0]["sha256"] = plain["networks"][0]["sha256"]
    for before in (older, plain):
        assert differences(before, kind) == ["networks.mine.output_kind: softmax → sigmoid"]


# --- Weights


def test_random_weights_are_the_same_every_time_and_leave_chance_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_network("shufflenet_v2_x0_5", "random")
    torch.testing.assert_close(torch.rand(3), expected)
    second = load_network("shufflenet_v2_x0_5", "random")
    assert first.weights == "random"
    assert first.digest() == second.digest()
    with torch.no_grad():
        second.module.fc.bias[0] += 1
    assert first.digest() != second.digest()


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_published_weights_recognise_photos(variant: int) -> None:
    """16 of the 20 ImageNet photos of foolbox, seen as the network was published to see them."""
    network = load_network(f"efficientnet_lite{variant}")
    files = sorted(Path(foolbox.__file__).parent.glob("data/imagenet_*.jpg"))
    right = 0
    for file in files:
        _, [(_, seen)] = see(file.read_bytes(), [network.preprocessing], "center_crop")
        samples = torch.from_numpy(seen.copy())[None]
        logits = Explainer(network, ("gap_cam",), top_k=1)(network.normalize(samples)).logits
        right += int(logits.argmax()) == int(file.stem.split("_")[2])
    assert len(files) == 20
    assert right >= 16


SOURCE = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Somebody's weights, for seven classes."""
    torch.manual_seed(7)
    return torchvision.models.get_model(SOURCE, num_classes=7).state_dict()


def _prefixed(state: dict[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


CHECKPOINTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "model, as torchvision saves it": lambda state: {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, model="resnet50"),
    },
    "prefixed": _prefixed,
    "wrapped and prefixed": lambda state: {"state_dict": _prefixed(state)},
    "compiled": lambda state: _prefixed(state, "_orig_mod."),
    "compiled and parallel": lambda state: _prefixed(state, "module._orig_mod."),
    "Lightning": lambda state: {
        "state_dict": _prefixed(state, "model.") | {"criterion.weight": torch.ones(7)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": {"lr": 0.1},
    },
    "any other prefix": lambda state: {"state_dict": _prefixed(state, "student.encoder.")},
    "averaged": lambda state: {"model_ema": _averaged(state)},
    "averaged beside the weights": lambda state: {
        "state_dict_ema": {key: value + 1 for key, value in state.items()},
        "state_dict": state,
    },
    "of PyTorch 0.4.0": lambda state: {
        key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
    },
    "counted by thop": lambda state: state | {"conv1.total_ops": torch.zeros(1)},
    "with an auxiliary head": lambda state: state | {"aux1.conv.weight": torch.zeros(7, 7)},
    "half": lambda state: {key: value.half() for key, value in state.items()},
}


def _averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    module = torchvision.models.get_model(SOURCE, num_classes=7)
    module.load_state_dict(state)
    return torch.optim.swa_utils.AveragedModel(module).state_dict()


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_checkpoints_of_every_form(form: str, trained: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(CHECKPOINTS[form](trained), path)
    kept = {key: value.half().to(value.dtype) for key, value in trained.items()}
    _assert_holds(load_network(SOURCE, str(path)), kept if form == "half" else trained, str(path))


def test_what_was_done_to_a_checkpoint_is_said(
    trained: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pth"
    caplog.set_level("INFO", logger="scacam")
    for form, told in {
        "plain": [],
        "Lightning": ["without the prefix model.; left out criterion.weight"],
        "averaged": ["taken from model_ema; without the prefix module.; left out n_averaged"],
        "averaged beside the weights": ["not from state_dict_ema"],
        "of PyTorch 0.4.0": [
            "filled in conv1.1.num_batches_tracked, stage2.0.branch1.1.num_batches_tracked, "
            "stage2.0.branch1.3.num_batches_tracked, stage2.0.branch2.1.num_batches_tracked "
            "and 52 more"
        ],
        "with an auxiliary head": ["left out aux1.conv.weight"],
    }.items():
        torch.save(CHECKPOINTS[form](trained), path)
        caplog.clear()
        load_network(SOURCE, str(path))
        assert caplog.messages == [f"checkpoint {path}: {line}" for line in told]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda state: _prefixed(state, "query.") | _prefixed(state, "key."),
            "more than once, under 'query.' and 'key.'",
        ),
        (
            lambda state: {"teacher": state, "student": _prefixed(state)},
            "more than once, under 'teacher' and 'student'",
        ),
        (lambda state: state | _prefixed(state, "ema."), "under '' and 'ema.'"),
        (lambda state: state | {"fc.weight.0": torch.zeros(7)}, "unexpected: fc.weight.0"),
        (
            lambda state: _prefixed(state, "1.") | {"0.mean": torch.zeros(3)},
            "unexpected: 0.mean",  # a network that normalises by itself is another
        ),
        (
            lambda state: {key: v for key, v in _prefixed(state).items() if "fc.bias" not in key},
            "missing: fc.bias$",
        ),
        (lambda state: {"optimizer": {"state": {}}, "epoch": 3}, "it has optimizer, epoch$"),
    ],
)
def test_a_checkpoint_that_may_be_meant_otherwise_is_refused(
    form: Callable[[dict[str, Tensor]], Any],
    message: str,
    trained: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    torch.save(form(trained), tmp_path / "weights.pth")
    with pytest.raises(NetworkError, match=message):
        load_network(SOURCE, str(tmp_path / "weights.pth"))


def test_an_auxiliary_head_without_weights_is_taken_off(tmp_path: Path) -> None:
    """As in everybody's GoogLeNet that was made from the published one."""
    torch.manual_seed(0)
    module = torchvision.models.googlenet(num_classes=7, aux_logits=False, init_weights=False)
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    network = load_network("googlenet", str(tmp_path / "weights.pth"))
    torch.testing.assert_close(dict(network.module.state_dict()), dict(module.state_dict()))
    images = torch.randn(1, 3, 224, 224)
    logits = Explainer(network, ("grad_cam",), top_k=1)(images).logits
    torch.testing.assert_close(logits, module.eval()(images).detach())


@pytest.mark.parametrize("name", ["model_best.pth.tar", "best"])
def test_a_bare_file_name_is_a_checkpoint(
    name: str, trained: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained, name)
    _assert_holds(load_network(SOURCE, name), trained, name)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 5592704\n"
    )
    with pytest.raises(NetworkError, match="is a pointer of Git LFS; run git lfs pull"):
        load_network(SOURCE, str(tmp_path / "weights.pth"))


def test_a_safetensors_checkpoint(trained: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(trained, path)
    _assert_holds(load_network(SOURCE, str(path)), trained, str(path))


@pytest.mark.long
def test_a_checkpoint_on_object_storage(
    trained: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(tmp_path)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    open_bucket.cache_clear()  # other tests' stores had the same name
    try:
        (tmp_path / "weights").mkdir()
        torch.save({"model": trained}, tmp_path / "weights" / "best.pth")
        store.upload(tmp_path / "weights", "models")
        uri = f"s3://{BUCKET}/models/best.pth"
        _assert_holds(load_network(SOURCE, uri), trained, uri)
        with pytest.raises(NetworkError, match="cannot read checkpoint s3://"):
            load_network(SOURCE, f"s3://{BUCKET}/models/none.pth")
    finally:
        open_bucket.cache_clear()
        store.stop()


def _assert_holds(network: Network, state: dict[str, Tensor], path: str) -> None:
    torch.testing.assert_close(dict(network.module.state_dict()), dict(state), rtol=0, atol=0)
    assert network.weights == path
    assert network.num_classes == 7  # sized by the checkpoint
    assert network.categories is None  # ImageNet's thousand are not these seven


@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg16_gap", "efficientnet_lite0"])
def test_a_checkpoint_sizes_the_classifier_and_categories_name_it(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    from scacam.networks.zoo import find_recipe

    path = str(tmp_path / "weights.pt")
    torch.save(find_recipe(name, "random").build(3).state_dict(), path)
    network = load_network(name, path, categories=["cat", "dog", "owl"])
    assert network.num_classes == 3
    assert network.categories == ("cat", "dog", "owl")
    with pytest.raises(NetworkError, match="2 category names for 3 classes"):
        load_network(name, path, categories=["cat", "dog"])


def test_densenet_files_with_the_keys_of_2017(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.\w+)([12])\.", r"\1.\2.", key): v for key, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121-a639ec97.pth")
    network = load_network("densenet121", str(tmp_path / "densenet121-a639ec97.pth"))
    torch.testing.assert_close(dict(network.module.state_dict()), dict(state), rtol=0, atol=0)


def test_a_checkpoint_that_does_not_fit_names_the_keys(
    trained: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    state = dict(trained)
    del state["conv1.0.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(7, 3)
    torch.save(state, path)
    with pytest.raises(NetworkError) as caught:
        load_network(SOURCE, str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "missing: conv1.0.weight" in message
    assert "unexpected: extra.weight" in message
    assert "fc.weight [7, 3] instead of" in message


class RunsCode:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "code ran")


@pytest.mark.parametrize("form", ["torch", "pickle", "beside the weights"])
def test_a_checkpoint_never_runs_code(
    form: str, trained: dict[str, Tensor], tmp_path: Path
) -> None:
    path, proof = tmp_path / "weights.pth", tmp_path / "proof"
    if form == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(proof), protocol=2))
    else:
        held = {"state_dict": trained, "extra": RunsCode(proof)}
        torch.save(RunsCode(proof) if form == "torch" else held, path)
    with pytest.raises(NetworkError, match="without running code"):
        load_network(SOURCE, str(path))
    assert not proof.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"no weights at all", b"PK\x03\x04 half a zip"])
def test_a_broken_checkpoint_is_refused(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    with pytest.raises(NetworkError, match=f"checkpoint {re.escape(str(path))}"):
        load_network(SOURCE, str(path))


@pytest.mark.parametrize("held", [[1, 2], {"a": 1}, torch.zeros(3), {}])
def test_a_file_without_a_state_dict_is_refused(held: object, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "weights.pth")
    with pytest.raises(NetworkError, match=r"weights\.pth"):
        load_network(SOURCE, str(tmp_path / "weights.pth"))


def test_a_whole_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "weights.pth")
    with pytest.raises(NetworkError, match=r"holds a torch\.nn\.modules\.linear\.Linear\); save"):
        load_network(SOURCE, str(tmp_path / "weights.pth"))


FACTORIES = """
import torch
from torch import nn
from scacam import Network, Preprocessing

def module():
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )

def network():
    return Network(module(), preprocessing=Preprocessing((64, 32)), categories=["cat", "dog"])
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    made = load_network("my_factories:module")
    assert (made.name, made.weights) == ("my_factories:module", "as made by the factory")
    assert made.digest() == load_network("my_factories:module").digest()
    network = load_network("my_factories:network")
    assert network.preprocessing.crop_size == (64, 32)
    assert network.categories == ("cat", "dog")
    state = {key: torch.ones_like(value) for key, value in made.module.state_dict().items()}
    torch.save(state, tmp_path / "ones.pth")
    filled = load_network("my_factories:network", str(tmp_path / "ones.pth"))
    assert all((value == 1).all() for value in filled.module.state_dict().values())
    assert filled.categories == ("cat", "dog")


# --- The options of the jobs


def _load(*arguments: str) -> list[Network]:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_network_options(parser)
    return load_networks(**vars(parser.parse_args(arguments)))


def test_target_layers_and_categories_for_every_network_or_one(tmp_path: Path) -> None:
    (tmp_path / "three.txt").write_text("cat\ndog\nküsten seeschwalbe\n", encoding="utf-8")
    (tmp_path / "thousand.txt").write_text("\n".join(map(str, range(1000))))
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), tmp_path / "w.pth")
    resnet, squeezenet = _load(
        "--networks", "resnet18=random", f"squeezenet1_1={tmp_path}/w.pth",
        "--target-layer", "layer3", "squeezenet1_1=features.10",
        "--categories", f"{tmp_path}/thousand.txt", f"squeezenet1_1={tmp_path}/three.txt",
    )  # fmt: skip
    assert resnet.target_layer.name == "layer3"
    assert (resnet.categories or ())[999] == "999"
    assert squeezenet.target_layer.name == "features.10"
    assert squeezenet.categories == ("cat", "dog", "küsten seeschwalbe")
    (alone,) = _load("--networks", "resnet18=random", "--target-layer", "layer2")
    assert alone.target_layer.name == "layer2"
    assert len(alone.categories or ()) == 1000


def test_several_target_layers_of_every_network_or_one() -> None:
    resnet, squeezenet = _load(
        "--networks", "resnet18=random", "squeezenet1_1=random",
        "--target-layer", "layer4", "layer2", "squeezenet1_1=features", "squeezenet1_1=features.7",
    )  # fmt: skip
    assert [layer.name for layer, *_ in resnet.layers] == ["layer2", "layer4"]
    assert [layer.name for layer, *_ in squeezenet.layers] == ["features.7", "features"]
    finer = load_networks(["resnet18=random"], finer_layer=["layer1"])[0].finer_layer
    assert finer == TargetLayer("layer1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18", "resnet18=random"), "'resnet18' is there twice"),
        (("resnet18=random", "--target-layer", "layer9"), "no layer 'layer9'"),
        (("resnet18=random", "--categories", "a", "b"), "has a and b for resnet18"),
        (("resnet18=random", "--output-kind", "soft"), "unknown output kind 'soft'"),
        (("resnet18=random", "--categories", "no.txt"), "cannot read the class names in no.txt"),
        (("resnet18=random", "--categories", __file__), "category names for 1000 classes"),
    ],
)
def test_options_that_cannot_be_met(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScacamError, match=message):
        _load("--networks", *arguments)


# --- Every network of torchvision

SIZES = {"inception_v3": 160, "maxvit_t": 224, "vit": 224}
"""Of the inputs, where 96 × 96 is too small or the network takes one size alone."""

HUGE = ("vit_h_14", "vit_l_16")
"""Left out: they take minutes, and run as the other vision transformers do."""


def _build(name: str) -> Network:
    module = torchvision.models.get_model(name).eval()
    size = next((size for start, size in SIZES.items() if name.startswith(start)), 96)
    return Network(module, name=name, preprocessing=Preprocessing(crop_size=(size, size)))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [name for name in torchvision.models.list_models(torchvision.models) if name not in HUGE],
)
def test_every_network_with_every_method(name: str) -> None:
    """All of `torchvision.models` that classify, at random weights."""
    gc.collect()
    network = _build(name)
    before = {key: value.clone() for key, value in network.module.state_dict().items()}
    images = torch.randn(2, 3, *network.preprocessing.crop_size)
    explanation = Explainer(network, top_k=2)(images)
    expected = {method for method in DEFAULT_METHODS if network.supports(method)}
    weightings = {
        method
        for method, needs in METHODS.items()
        if not (needs.needs_class_weights or needs.needs_finer_layer or needs.needs_head)
        if needs.needs_attention == "none"
    }
    assert set(explanation.heatmaps) == expected >= weightings
    for method, maps in explanation.heatmaps.items():
        finer = METHODS[method].needs_finer_layer
        shape = network.finer_shape if finer else network.feature_shape
        assert shape is not None
        assert maps.shape == (2, 2, *shape[1:]), method
        assert maps.isfinite().all(), method
    assert not any(layer._forward_hooks for layer in network.module.modules())
    assert all(parameter.grad is None for parameter in network.module.parameters())
    torch.testing.assert_close(dict(network.module.state_dict()), before, rtol=0, atol=0)


# --- What loading loads


def test_names_of_imagenet_are_those_of_torchvision() -> None:
    published = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert load_network("efficientnet_lite0").categories == tuple(published)


def test_what_a_network_does_not_need_is_not_loaded() -> None:
    """It takes two seconds of every process that holds a network."""
    program = "import sys, scacam; scacam.load_network('efficientnet_lite0'); print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert "torch" in loaded
    assert not {"torchvision", "torch._dynamo", "timm", "transformers"} & set(loaded)
