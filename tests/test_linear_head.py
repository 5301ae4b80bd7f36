"""Maps for which others run the head again and again: against doing that."""

import copy
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from scacam import Explainer, Network, Preprocessing, load_network, methods
from scacam.explainer import Explanation, observe
from scacam.methods import METHODS

torch.set_num_threads(1)  # more of them only wait for each other on networks this small

OF_HEAD = [name for name, method in METHODS.items() if method.needs_head]


def _network(name: str, size: int) -> Network:
    if name == "efficientnet_lite0":
        return load_network(name)
    torch.manual_seed(0)
    if name == "vgg16_gap":
        module = load_network(name, "random").module
    else:
        module = torchvision.models.get_model(name, num_classes=20)
    return Network(module, preprocessing=Preprocessing(crop_size=(size, size)))


# The last one is the paper's VGG-16, which has the only pooled head of that family.
KINDS = {
    "efficientnet_lite0": ("pooled", 224),
    "densenet121": ("rectified", 96),
    "squeezenet1_1": ("scores", 96),
    "vgg16_gap": ("pooled", 64),
}


class Case(NamedTuple):
    """A network, its copy in double precision, whose head is run for real, and an explanation."""

    network: Network
    module: nn.Module
    features: Tensor
    explanation: Explanation

    def head(self, features: Tensor) -> Tensor:
        """Logits of features of one's own, in double precision."""
        layer, calls = self.network.target_layer, count()

        def give(_layer: nn.Module, _inputs: object, _output: Tensor) -> Tensor | None:
            return features.double().clone() if next(calls) == layer.call else None

        # Of any size; one is enough where the head asks the features how many they are.
        count_images = len(features) if hasattr(self.module, "extract_features") else 1
        images = torch.zeros(count_images, 3, 32, 32).double()
        with self.module.get_submodule(layer.name).register_forward_hook(give):
            return self.module(images)

    def maps(self, method: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features, explained classes and maps of each image."""
        ids, maps = self.explanation.class_ids, self.explanation.heatmaps[method]
        return zip(self.features, ids, maps, strict=True)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    kind, size = KINDS[request.param]
    network = _network(request.param, size)
    assert network.head.kind == kind
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 5])
    explanation = Explainer(network, [*OF_HEAD, "nwc_cam"], top_k=2)(images, labels)
    features = observe(network, images, top_k=1).features
    module = copy.deepcopy(network.module).double().requires_grad_(False)
    return Case(network, module, features, explanation)


def _assert_near(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert expected.abs().max() > 0


def test_recipro_cam_is_the_probability_of_a_cell_alone(case: Case) -> None:
    height, width = case.network.feature_shape[1:]
    cells = torch.eye(height * width).unflatten(1, (1, height, width))
    for features, ids, maps in case.maps("recipro_cam"):
        probabilities = case.head(features * cells).softmax(1)
        _assert_near(maps, probabilities[:, ids].T.unflatten(1, (height, width)))


@pytest.mark.long
def test_ablation_cam_takes_every_channel_out(case: Case) -> None:
    for features, ids, maps in [next(case.maps("ablation_cam"))]:
        drops = []
        for channels in torch.arange(len(features)).split(64):
            without = features.repeat(len(channels), 1, 1, 1)
            without[range(len(channels)), channels] = 0
            drops.append(case.head(features[None])[:, ids] - case.head(without)[:, ids])
        _assert_near(maps, torch.einsum("ck,chw->khw", torch.cat(drops), features.double()))


def test_finer_cam_is_grad_cam_of_the_difference(case: Case) -> None:
    """By autograd, of the logit less 0.6 times the mean of the three that are closest to it."""
    for features, ids, maps in case.maps("finer_cam"):
        leaf = features[None].double().requires_grad_()
        logits = case.head(leaf)[0]
        for class_id, found in zip(ids.tolist(), maps, strict=True):
            order = (logits - logits[class_id]).abs().argsort().tolist()
            references = [other for other in order if other != class_id][:3]
            difference = logits[class_id] - 0.6 * logits[references].mean()
            (slopes,) = torch.autograd.grad(difference, leaf, retain_graph=True)
            _assert_near(found, (slopes.mean((2, 3), keepdim=True) * leaf).sum(1)[0].detach())


def test_nwc_cam_leaves_out_what_speaks_against(case: Case) -> None:
    for features, ids, maps in case.maps("nwc_cam"):
        weights = case.network.class_weights[ids].clamp(min=0)
        _assert_near(maps, torch.einsum("kc,chw->khw", weights, features))


def test_nwc_cam_needs_class_weights() -> None:
    with pytest.raises(ValueError, match="class weights"):
        methods.nwc_cam(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 2, 1, 1), None)


def _small(classes: int, step: nn.Module | None = None) -> Network:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes, bias=False),
        step or nn.Identity(),
    )
    return Network(module, preprocessing=Preprocessing(crop_size=(32, 32)))


def test_independent_labels_and_a_single_logit() -> None:
    """Of which Recipro-CAM is the sigmoid, and which has one class to be told apart from."""
    network = _small(1)
    images = torch.randn(2, 3, 32, 32)
    explanation = Explainer(network, OF_HEAD, top_k=2)(images)
    features = network.module[0](images).detach()
    logits = torch.einsum("bchw,c->bhw", features, network.module[3].weight[0].detach()) / 64
    sides = torch.where(explanation.class_ids == 1, 1.0, -1.0)[..., None, None]
    expected = (sides * logits[:, None]).sigmoid()
    torch.testing.assert_close(explanation.heatmaps["recipro_cam"], expected)
    grad_cam = Explainer(network, ("grad_cam",), top_k=2)(images).heatmaps["grad_cam"]
    torch.testing.assert_close(explanation.heatmaps["finer_cam"], 1.6 * grad_cam)


def test_shapley_values_by_all_orders() -> None:
    """What a channel adds to the logit on average over the channels that are there already."""
    network = _small(3)
    images = torch.randn(1, 3, 32, 32)
    explanation = Explainer(network, ("ablation_cam",), top_k=1)(images)
    features = network.module[0](images).detach()
    weights = network.module[3].weight[explanation.class_ids[0, 0]].detach()
    values = weights * features.mean((2, 3))[0]  # the same for every order, as the logit is a sum
    expected = torch.einsum("c,chw->hw", values, features[0])
    torch.testing.assert_close(explanation.heatmaps["ablation_cam"][0, 0], expected)


def test_a_general_head_has_no_rows() -> None:
    torch.manual_seed(0)
    network = Network(
        torchvision.models.mobilenet_v3_small(num_classes=5),
        preprocessing=Preprocessing(crop_size=(64, 64)),
    )
    maps = Explainer(network, top_k=1)(torch.randn(1, 3, 64, 64)).heatmaps
    assert not {*OF_HEAD, "nwc_cam", "gap_cam"} & set(maps)
