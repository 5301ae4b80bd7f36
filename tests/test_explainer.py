"""The explainer: right maps from one forward pass, and nothing left behind in the module."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import LayerGradCam, LayerGradientXActivation
from memory import alone, held_now
from torch import Tensor, nn

from scacam import Explainer, Network, Preprocessing, ScacamError
from scacam.explainer import observe
from scacam.methods import METHODS

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

GRAY = Preprocessing(crop_size=(2, 2), mean=(0.0,), std=(1.0,))
SMALL = Preprocessing(crop_size=(64, 64))


def images(count: int = 2, size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def torchvision_network(name: str, preprocessing: Preprocessing = SMALL) -> Network:
    torch.manual_seed(0)
    return Network(torchvision.models.get_model(name), preprocessing=preprocessing)


class Cube(torch.autograd.Function):
    """An operation that autograd cannot take backwards for several classes at once."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.save_for_backward(values)
        return values**3

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return 3 * context.saved_tensors[0] ** 2 * gradients[0]


class Cubing(nn.Module):
    """The module whose operation Cube is."""

    def forward(self, values: Tensor) -> Tensor:
        return Cube.apply(values)


class Rectifying(nn.Module):
    """As DenseNet does it: the features are rectified in place behind the target layer."""

    def __init__(self, hidden: int | None = None, bend: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 5, stride=4)
        layers = [] if hidden is None else [nn.Linear(6, hidden), bend()]
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden or 6, 4))

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.features(images), inplace=True)
        return self.classifier(features.mean((2, 3)))


def one_by_one() -> nn.Module:
    """Gray 2 × 2 images; channels A₁ = x and A₂ = -2x + 1; logits of their averages F₁, F₂.

    S₀ = 4 F₁ + 2 F₂ + 1, S₁ = -4 F₁ + 8 F₂, S₂ = 0.
    """
    module = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([1.0, -2])[:, None, None, None])
        module[0].bias.copy_(torch.tensor([0.0, 1]))
        module[3].weight.copy_(torch.tensor([[4.0, 2], [-4, 8], [0, 0]]))
        module[3].bias.copy_(torch.tensor([1.0, 0, 0]))
    return module


def test_by_hand() -> None:
    network = Network(one_by_one(), preprocessing=GRAY)
    explanation = Explainer(network, top_k=2)(torch.tensor([[[[1.0, 2], [3, 4]]]]))
    # A₁ = [[1, 2], [3, 4]], A₂ = [[-1, -3], [-5, -7]]; F = (2.5, -4)
    torch.testing.assert_close(explanation.logits, torch.tensor([[3.0, -42, 0]]))
    assert explanation.class_ids.tolist() == [[0, 2]]
    expected = {
        "feature_map": [[0, -1], [-2, -3]],
        "gap_cam": [[2, 2], [2, 2]],  # 4 A₁ + 2 A₂
        "grad_cam": [[0.5, 0.5], [0.5, 0.5]],  # G = w / 4
        "sca_cam": [[0.75, 1.25], [1.75, 2.25]],  # A₁ + A₂ / 4
        "sca_cam_signed": [[0.75, 1.25], [1.75, 2.25]],  # the same, since no weight is negative
        "hires_cam": [[0.5, 0.5], [0.5, 0.5]],
        "grad_cam_elementwise": [[1, 2], [3, 4]],  # relu(A₁) + relu(A₂ / 2)
        # 1 / (2 + 10 · 1) of A₁, 0.5 / (2 - 16 · 0.5) of A₂, each for four cells
        "grad_cam_pp": [[2 / 3, 5 / 3], [8 / 3, 11 / 3]],
        "xgrad_cam": [[0.5, 0.5], [0.5, 0.5]],
        "layer_cam": [[0.5, 0.5], [0.5, 0.5]],
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            explanation.heatmaps[name][0, 0], torch.tensor(values, dtype=torch.float32)
        )
        zero = torch.zeros(2, 2)
        if name not in ("feature_map", "eigen_cam"):
            torch.testing.assert_close(explanation.heatmaps[name][0, 1], zero)  # S₂ is constant
    # A₁ and A₂ are centred multiples, 1 and -2, of one pattern, which ΣA follows with a minus
    pattern = torch.tensor([[-1.5, -0.5], [0.5, 1.5]])
    torch.testing.assert_close(explanation.heatmaps["eigen_cam"][0, 0], -(5**0.5) * pattern)
    assert set(explanation.heatmaps) == set(METHODS) - {
        *("extent_cam", "legrad", "attention_rollout")  # no layer is finer, and there are no tokens
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_class_weights_are_49_averaged_gradients(name: str) -> None:
    network = torchvision_network(name, Preprocessing())
    assert network.target_layer.name == "layer4"
    seen = observe(network, images(1, (224, 224)), top_k=3)
    # The gradient by autograd, not by the closed form that is to be checked.
    features = seen.features.clone().requires_grad_()
    logits = network.module.fc(features.mean((2, 3)))
    for rank, class_id in enumerate(seen.class_ids[0]):
        (gradient,) = torch.autograd.grad(logits[0, class_id], features, retain_graph=True)
        averaged = gradient.mean((2, 3))[0]
        torch.testing.assert_close(
            seen.class_weights[0, rank] / averaged, torch.full_like(averaged, 49), rtol=1e-4, atol=0
        )
    maps = Explainer(network, ("sca_cam",), top_k=3)(images(1, (224, 224))).heatmaps["sca_cam"]
    squares = torch.einsum("bkc,bchw->bkhw", seen.class_weights.square(), seen.features) / 49**2
    torch.testing.assert_close(maps, squares, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "densenet161"])
def test_equals_captum(name: str) -> None:
    network = torchvision_network(name, Preprocessing(crop_size=(96, 96)))
    batch = images(1, (96, 96))
    explanation = Explainer(network, ("grad_cam", "hires_cam"), top_k=3)(batch)
    layer = network.module.get_submodule(network.target_layer.name)
    for rank in range(3):
        target = explanation.class_ids[:, rank]
        grad_cam = LayerGradCam(network.module, layer).attribute(batch, target)[:, 0]
        products = LayerGradientXActivation(network.module, layer).attribute(batch, target)
        for method, expected in (("grad_cam", grad_cam), ("hires_cam", products.sum(1))):
            actual = explanation.heatmaps[method][:, rank]
            assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


HEADS = {
    "pooled": lambda: torchvision_network("resnet18"),
    "scores": lambda: torchvision_network("squeezenet1_1"),
    "rectified": lambda: Network(Rectifying(), preprocessing=SMALL),
    "general": lambda: Network(Rectifying(hidden=5), preprocessing=SMALL),
    "general, class by class": lambda: Network(
        Rectifying(hidden=5, bend=Cubing), preprocessing=SMALL, target_layer="features"
    ),
}


@pytest.fixture(params=HEADS)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """One network of every kind of head, with parameters that are being trained."""
    torch.manual_seed(1)
    found = HEADS[request.param]()
    assert found.head.kind == request.param.split(",")[0]
    return found


def test_gradients_are_those_of_autograd(network: Network) -> None:
    """Whatever the closed form, against one backward pass through the module per class."""
    batch = images(3)
    seen = observe(network, batch, top_k=3)
    held: list[Tensor] = []

    def hook(_layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1].clone()

    with network.module.get_submodule(network.target_layer.name).register_forward_hook(hook):
        logits = network.module(batch)
    torch.testing.assert_close(held[0], seen.features)
    expected = torch.stack(
        [
            torch.autograd.grad(logits.gather(1, ids[:, None]).sum(), held[0], retain_graph=True)[0]
            for ids in seen.class_ids.T
        ],
        dim=1,
    )
    actual = seen.gradients
    if not isinstance(actual, Tensor):
        actual = actual.values * actual.mask
    torch.testing.assert_close(actual.expand_as(expected), expected, rtol=1e-4, atol=1e-7)


def test_a_batch_gives_what_its_images_give_one_by_one(network: Network) -> None:
    batch, labels = images(4), torch.tensor([3, 0, 1, 2])
    explainer = Explainer(network, top_k=2)
    together = explainer(batch, labels)
    for index in range(len(batch)):
        alone = explainer(batch[index : index + 1], labels[index : index + 1])
        assert alone.class_ids.tolist() == together.class_ids[index : index + 1].tolist()
        torch.testing.assert_close(alone.logits[0], together.logits[index])
        for name, maps in together.heatmaps.items():
            one, other = _unrooted(name, alone.heatmaps[name][0]), _unrooted(name, maps[index])
            assert (one - other).abs().max() <= 1e-4 * other.abs().max(), name


def _unrooted(name: str, maps: Tensor) -> Tensor:
    """Of `extent_cam` the square: near 0 the root makes 1e-4 of a rounding of 1e-8."""
    return maps.square() if name == "extent_cam" else maps


def _state(module: nn.Module) -> dict[str, object]:
    return {
        "hooks": [
            (len(layer._forward_hooks), len(layer._forward_pre_hooks), len(layer._backward_hooks))
            for layer in module.modules()
        ],
        "required": [parameter.requires_grad for parameter in module.parameters()],
        "filled": [parameter.grad is not None for parameter in module.parameters()],
        "training": [layer.training for layer in module.modules()],
        "in place": [getattr(layer, "inplace", None) for layer in module.modules()],
        "values": {key: value.clone() for key, value in module.state_dict().items()},
    }


def _assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    values, values_after = before.pop("values"), after.pop("values")
    assert before == after
    torch.testing.assert_close(values, values_after, rtol=0, atol=0)


def test_the_module_comes_back_as_it_was(network: Network) -> None:
    next(network.module.parameters()).requires_grad_(False)
    before = _state(network.module)
    assert torch.is_grad_enabled()
    explanation = Explainer(network)(images())
    assert torch.is_grad_enabled()
    assert not any(before["filled"])
    _assert_same(before, _state(network.module))
    for tensor in (explanation.logits, *explanation.heatmaps.values()):
        assert not tensor.requires_grad


def test_no_hook_outlives_an_exception(network: Network) -> None:
    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    before = _state(network.module)
    last = [layer for layer in network.module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    with last[-1].register_forward_hook(fail), pytest.raises(ValueError, match="on purpose"):
        Explainer(network)(images())
    assert torch.is_grad_enabled()
    _assert_same(before, _state(network.module))


@pytest.mark.parametrize("hidden", [None, 5])
def test_what_works_in_place_behind_the_target_layer_changes_no_features(
    hidden: int | None,
) -> None:
    network = Network(Rectifying(hidden), preprocessing=SMALL)
    batch = images()
    seen = observe(network, batch, top_k=1)
    assert seen.features.min() < 0
    torch.testing.assert_close(seen.features, network.module.features(batch).detach())
    torch.testing.assert_close(seen.logits, network.module(batch).detach())


def _growth(head: str) -> tuple[int, int]:
    """By how many tensors, and by how many bytes, 200 calls grow a process."""
    explainer, batch = Explainer(HEADS[head]()), images(2, (48, 48))

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    for _ in range(20):
        explainer(batch)
    known, memory = tensors(), held_now()
    for _ in range(200):
        explainer(batch)
    return tensors() - known, held_now() - memory


@pytest.mark.long
@pytest.mark.parametrize("head", HEADS)
def test_200_calls_do_not_grow_memory(head: str) -> None:
    tensors, memory = alone(_growth, head)
    assert tensors == 0
    assert memory < 5e6


def test_labels_are_explained_as_one_more_class(network: Network) -> None:
    batch, labels = images(3), torch.tensor([1, 1, 3])
    explainer = Explainer(network, top_k=2)
    plain, labelled = explainer(batch), explainer(batch, labels)
    assert labelled.class_ids[:, :2].tolist() == plain.class_ids.tolist()
    assert labelled.class_ids[:, 2].tolist() == labels.tolist()
    every = Explainer(network, top_k=network.num_classes)(batch)
    alone = Explainer(network, top_k=0)(batch, labels)
    assert alone.class_ids.tolist() == labels[:, None].tolist()
    for name, maps in labelled.heatmaps.items():
        maps = _unrooted(name, maps)
        torch.testing.assert_close(_unrooted(name, alone.heatmaps[name]), maps[:, 2:])
        torch.testing.assert_close(maps[:, :2], _unrooted(name, plain.heatmaps[name]))
        for index, label in enumerate(labels):
            rank = every.class_ids[index].tolist().index(label)
            expected = _unrooted(name, every.heatmaps[name][index, rank])
            torch.testing.assert_close(maps[index, 2], expected)


def test_one_label_per_image_is_wanted() -> None:
    explainer = Explainer(Network(Rectifying(), preprocessing=SMALL))
    with pytest.raises(ScacamError, match="3 images need one label each"):
        explainer(images(3), torch.tensor([1, 2]))


@pytest.mark.parametrize("part", ["", "features"])
def test_a_module_in_training_mode_is_refused(part: str) -> None:
    network = Network(Rectifying(), preprocessing=SMALL)
    network.module.get_submodule(part).train()
    with pytest.raises(ScacamError, match="training mode"):
        Explainer(network)(images())


def test_methods_and_classes_that_are_asked_for() -> None:
    closed = Network(Rectifying(), preprocessing=SMALL)
    general = Network(Rectifying(hidden=5), preprocessing=SMALL)
    with pytest.raises(ScacamError, match="unknown method 'gradcam'"):
        Explainer(closed, ("gradcam",))
    with pytest.raises(ScacamError, match="number of classes"):
        Explainer(closed, top_k=-1)
    with pytest.raises(ScacamError, match="no class is to be explained"):
        Explainer(closed, top_k=0)(images())
    explanation = Explainer(closed, ("sca_cam", "grad_cam"), top_k=99)(images())
    assert list(explanation.heatmaps) == ["sca_cam", "grad_cam"]
    assert explanation.class_ids.shape == (2, 4)
    assert "gap_cam" in Explainer(closed)(images()).heatmaps
    assert "gap_cam" not in Explainer(general, ("gap_cam", "grad_cam"))(images()).heatmaps


def test_any_input_size(network: Network) -> None:
    """Feature maps follow the images, also where these are not of the preprocessed size."""
    explanation = Explainer(network)(images(2, (96, 160)))
    maps = explanation.heatmaps["sca_cam"]
    assert maps.shape[3] > maps.shape[2] > 1
    assert maps.isfinite().all()


def test_inside_inference_mode(network: Network) -> None:
    expected = Explainer(network)(images())
    with torch.inference_mode():
        explanation = Explainer(network)(images())
    for name, maps in expected.heatmaps.items():
        torch.testing.assert_close(explanation.heatmaps[name], maps)


@pytest.mark.parametrize("cast", [False, True])
def test_half_precision_is_summed_in_single(network: Network, cast: bool) -> None:
    batch = images().bfloat16()
    expected = Explainer(network)(batch.float())
    if cast:
        with torch.autocast("cpu", torch.bfloat16):
            explanation = Explainer(network)(batch.float())
    else:
        network.module.bfloat16()
        explanation = Explainer(network)(batch)
    top = explanation.class_ids[:, 0] == expected.class_ids[:, 0]
    for name in ("sca_cam", "eigen_cam"):
        actual, wanted = explanation.heatmaps[name][top, 0], expected.heatmaps[name][top, 0]
        assert actual.dtype == torch.float32
        assert (actual.bfloat16() != actual).any()  # summed, too
        assert (actual - wanted).abs().max() < 0.2 * wanted.abs().max()
