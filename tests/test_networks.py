"""Networks: target layer and head found by structure, weights of every form, clear refusals."""

import argparse
import gc
import pickle
import re
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
from scacam.methods import METHODS
from scacam.networks.target import TargetLayer
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
    assert network.supports("gap_cam") == (classifier is not None)
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
        "timm.vit_tiny_patch16_224": "no spatial map leads straight to its classifier",
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
    assert set(maps) == {name for name in METHODS if name != "gap_cam"}
    assert maps["grad_cam"].shape == (1, 1, 14, 14)


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


def test_a_transformer_without_a_map_is_refused() -> None:
    with pytest.raises(NetworkError, match="vit_b_16: no spatial map leads straight"):
        load_network("vit_b_16", "random")


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


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


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
}


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_checkpoints_of_every_form(form: str, trained: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(CHECKPOINTS[form](trained), path)
    _assert_holds(load_network(SOURCE, str(path)), trained, str(path))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18", "resnet18=random"), "'resnet18' is there twice"),
        (("resnet18=random", "--target-layer", "layer9"), "no layer 'layer9'"),
        (("resnet18=random", "--target-layer", "a", "b"), "has a and b for every network"),
        (("resnet18=random", "--categories", "no.txt"), "cannot read the class names in no.txt"),
        (("resnet18=random", "--categories", __file__), "category names for 1000 classes"),
    ],
)
def test_options_that_cannot_be_met(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScacamError, match=message):
        _load("--networks", *arguments)


# --- Every network of torchvision

WITHOUT_A_MAP = "vit_"
SIZES = {"inception_v3": 160, "maxvit_t": 224, "vit": 224}
"""Of the inputs, where 96 × 96 is too small or the network takes one size alone."""


def _build(name: str) -> Network:
    module = torchvision.models.get_model(name).eval()
    size = next((size for start, size in SIZES.items() if name.startswith(start)), 96)
    return Network(module, name=name, preprocessing=Preprocessing(crop_size=(size, size)))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_network_with_every_method(name: str) -> None:
    """All of `torchvision.models` that classify, at random weights."""
    gc.collect()
    if name.startswith(WITHOUT_A_MAP):
        with pytest.raises(NetworkError, match=f"{name}: no spatial map leads straight"):
            _build(name)
        return
    network = _build(name)
    before = {key: value.clone() for key, value in network.module.state_dict().items()}
    images = torch.randn(2, 3, *network.preprocessing.crop_size)
    explanation = Explainer(network, top_k=2)(images)
    expected = {method for method in METHODS if network.supports(method)}
    assert set(explanation.heatmaps) == expected >= set(METHODS) - {"gap_cam"}
    for method, maps in explanation.heatmaps.items():
        assert maps.shape == (2, 2, *network.feature_shape[1:]), method
        assert maps.isfinite().all(), method
    assert not any(layer._forward_hooks for layer in network.module.modules())
    assert all(parameter.grad is None for parameter in network.module.parameters())
    torch.testing.assert_close(dict(network.module.state_dict()), before, rtol=0, atol=0)
