"""Every method: by hand, by algebra, and against the libraries that people would use instead."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam as pgc
import torch
import torchvision
from torch import Tensor, nn
from torchcam.methods import CAM, LayerCAM

from scacam import Explainer, Network, Preprocessing, methods
from scacam.methods import METHODS
from scacam.methods.gradients import MaskedGradients

WEIGHTINGS = [
    name
    for name, method in METHODS.items()
    if not method.needs_finer_layer and not method.needs_head and method.needs_attention == "none"
]
"""Those that weigh features; the others have files of their own."""

FEATURES = torch.tensor([[[[1.0, 2], [3, 4]], [[-1, 1], [1, 2]]]])
GRADIENTS = torch.tensor([[[[[1.0, -1], [0, 2]], [[-2, 0], [-4, 2]]]]])  # averages 0.5 and -1
CLASS_WEIGHTS = torch.tensor([[[3.0, -1]]])

BY_HAND = {
    "feature_map": [[0, 3], [4, 6]],
    "gap_cam": [[4, 5], [8, 10]],
    "nwc_cam": [[3, 6], [9, 12]],
    "grad_cam": [[1.5, 0], [0.5, 0]],
    "sca_cam": [[-1.5, -1], [4, 0]],
    "sca_cam_signed": [[2.5, -1], [-4, 8]],
    "hires_cam": [[3, -2], [-4, 12]],
    "grad_cam_elementwise": [[3, 0], [0, 12]],
    # weights 1/12 + 1/11 and 1/4
    "grad_cam_pp": [[-10 / 132, 79 / 132], [102 / 132, 158 / 132]],
    # weights 7/10 and 2/3
    "xgrad_cam": [[0.7 - 2 / 3, 1.4 + 2 / 3], [2.1 + 2 / 3, 2.8 + 4 / 3]],
    "layer_cam": [[1, 0], [0, 12]],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    maps = METHODS[name].function(FEATURES, GRADIENTS, CLASS_WEIGHTS)
    expected = torch.tensor(BY_HAND[name], dtype=torch.float32)[None, None]
    torch.testing.assert_close(maps, expected, rtol=1e-6, atol=1e-6)


# Two channels share one pattern; a third, weaker one is orthogonal to it.
PATTERN = torch.tensor([[0.0, 0], [0, 4]])
RANK_TWO = torch.stack([3 * PATTERN, 4 * PATTERN, torch.tensor([[0.5, -0.5], [0, 0]])])[None]


@pytest.mark.parametrize("sign", [1, -1])
def test_eigen_cam_by_hand(sign: int) -> None:
    maps = methods.eigen_cam(sign * RANK_TWO, torch.ones(1, 2, 3, 1, 1), None)
    expected = sign * 5 * torch.tensor([[-1.0, -1], [-1, 3]])  # |(3, 4)| times the centred pattern
    torch.testing.assert_close(maps, expected.expand(1, 2, 2, 2), rtol=1e-5, atol=1e-5)


def test_eigen_grad_cam_by_hand() -> None:
    gradients = torch.tensor([[2.0, 1, 0], [-2, -1, 0], [0, 0, 0]])[None, :, :, None, None]
    maps = methods.eigen_grad_cam(RANK_TWO, gradients, None)
    expected = 52**0.5 * torch.tensor([[-1.0, -1], [-1, 3]])  # |(2 · 3, 1 · 4)|
    expected = torch.stack([expected, -expected, torch.zeros(2, 2)])[None]
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)


def test_gap_cam_needs_class_weights() -> None:
    with pytest.raises(ValueError, match="class weights"):
        methods.gap_cam(FEATURES, GRADIENTS, None)


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


FORMS: dict[str, tuple[Any, Tensor]] = {
    "constant": (values := _random(2, 3, 6, 1, 1, seed=0), values.expand(-1, -1, -1, 5, 4)),
    "masked by class": (
        MaskedGradients(values, mask := (_random(2, 3, 1, 5, 4, seed=1) > 0).double()),
        values * mask,
    ),
    "masked by channel": (
        MaskedGradients(values, mask := (_random(2, 1, 6, 5, 4, seed=1) > 0).double()),
        values * mask,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_form_of_the_gradients_gives_the_same(name: str, form: str) -> None:
    compact, full = FORMS[form]
    features = _random(2, 6, 5, 4, seed=2)
    weights = _random(2, 3, 6, seed=3)
    actual = METHODS[name].function(features, compact, weights)
    expected = METHODS[name].function(features, full.contiguous(), weights)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_methods_agree_behind_global_average_pooling() -> None:
    """With `G = w / Z` constant over a channel: the identities of the paper's Section 3.2.1."""
    features = _random(2, 6, 5, 4, seed=2)
    weights = _random(2, 3, 6, seed=3)
    cells = 20
    gradients = (weights / cells)[..., None, None]
    grad_cam = methods.grad_cam(features, gradients, None)
    torch.testing.assert_close(grad_cam * cells, methods.gap_cam(features, gradients, weights))
    torch.testing.assert_close(methods.hires_cam(features, gradients, None), grad_cam)
    torch.testing.assert_close(methods.xgrad_cam(features, gradients, None), grad_cam)
    squared = torch.einsum("bkc,bchw->bkhw", weights.square(), features) / cells**2
    torch.testing.assert_close(methods.sca_cam(features, gradients, None), squared)
    signed = torch.einsum("bkc,bchw->bkhw", weights.abs() * weights, features) / cells**2
    torch.testing.assert_close(methods.sca_cam_signed(features, gradients, None), signed)


def test_classes_and_images_do_not_mix() -> None:
    features, gradients = _random(3, 6, 5, 4, seed=4), _random(3, 4, 6, 5, 4, seed=5)
    weights = _random(3, 4, 6, seed=6)
    for name in WEIGHTINGS:
        method = METHODS[name]
        together = method.function(features, gradients, weights)
        alone = method.function(features[1:2], gradients[1:2, 2:3], weights[1:2, 2:3])
        torch.testing.assert_close(together[1:2, 2:3], alone)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_degenerate_values_stay_finite(name: str) -> None:
    features = torch.zeros(4, 3, 4, 4)
    features[1, 0] = 1.0  # constant
    features[2, 0, 0, 0], features[2, 0, 1, 1] = 1.0, -1.0  # sums to zero
    features[3, 0] = -0.25  # Σ A · G = -2, where the denominator of Grad-CAM++ is 0
    gradients = torch.zeros(4, 2, 3, 4, 4)
    gradients[:, 0] = 0.5
    maps = METHODS[name].function(features, gradients, torch.ones(4, 2, 3))
    assert maps.shape == (4, 2, 4, 4)
    assert maps.isfinite().all()


def test_xgrad_cam_of_a_channel_that_cancels_takes_the_plain_average() -> None:
    features = torch.tensor([[[[1.0, -1], [2, -2]]]])
    gradients = torch.tensor([[[[[4.0, 0], [0, 0]]]]])
    torch.testing.assert_close(methods.xgrad_cam(features, gradients, None), features)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("size", [1e-15, 1e12])
def test_no_method_underflows_or_overflows(name: str, size: float) -> None:
    """In single precision, gradients of any plausible size give the map of double precision."""
    features, gradients = _random(1, 6, 5, 4, seed=2), size * _random(1, 2, 6, 5, 4, seed=3)
    weights = size * _random(1, 2, 6, seed=4)
    expected = METHODS[name].function(features, gradients, weights)
    maps = METHODS[name].function(features.float(), gradients.float(), weights.float())
    assert (maps - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_image_that_is_not_finite_harms_no_other(name: str) -> None:
    features, gradients = _random(3, 6, 5, 4, seed=2), _random(3, 2, 6, 5, 4, seed=3)
    weights = _random(3, 2, 6, seed=4)
    expected = METHODS[name].function(features, gradients, weights)
    features[1, 0, 0, 0] = float("nan")
    maps = METHODS[name].function(features, gradients, weights)
    torch.testing.assert_close(maps[[0, 2]], expected[[0, 2]])
    assert not maps[1].isfinite().all()


def test_first_component_is_that_of_a_singular_value_decomposition() -> None:
    """Also where there are more positions than channels, and only one of either."""
    for shape in [(20, 5, 4), (3, 9, 9), (1, 3, 3), (6, 1, 2), (6, 1, 1), (64, 13, 13)]:
        features = _random(1, *shape, seed=sum(shape))
        centred = features[0].flatten(1).T.numpy()
        centred = centred - centred.mean(0)
        left, values, _ = np.linalg.svd(centred, full_matrices=False)
        expected = torch.from_numpy(values[0] * left[:, 0]).reshape(shape[1:])
        actual = methods.eigen_cam(features, torch.ones(1, 1, shape[0], 1, 1), None)[0, 0]
        if (actual * expected).sum() < 0:
            expected = -expected
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- Against other libraries


class MlpHead(nn.Module):
    """Two linear layers behind max pooling: gradients differ from position to position."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 36, 40), nn.ReLU(), nn.Linear(40, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


LAYERS = {"resnet18": "layer4", "squeezenet1_1": "features", "mlp_head": "features"}
SIZE = 64


@pytest.fixture(scope="module", params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    """A network in double precision and images for it."""
    torch.manual_seed(0)
    name = request.param
    module = MlpHead() if name == "mlp_head" else torchvision.models.get_model(name)
    return name, module.eval().double(), _random(3, 3, SIZE, SIZE, seed=0).float().double()


def _explained(module: nn.Module, layer: str, images: Tensor, method: str) -> tuple[Tensor, Tensor]:
    preprocessing = Preprocessing(crop_size=(SIZE, SIZE))
    network = Network(module, target_layer=layer, preprocessing=preprocessing)
    explanation = Explainer(network, (method,), top_k=3)(images)
    return explanation.class_ids, explanation.heatmaps[method].double()


ORACLES = {
    "grad_cam": pgc.GradCAM,
    "hires_cam": pgc.HiResCAM,
    "grad_cam_elementwise": pgc.GradCAMElementWise,
    "grad_cam_pp": pgc.GradCAMPlusPlus,
    "xgrad_cam": pgc.XGradCAM,
    "layer_cam": pgc.LayerCAM,
    "eigen_cam": pgc.EigenCAM,
    "eigen_grad_cam": pgc.EigenGradCAM,
}


def _without_epsilon(function: Callable) -> Callable:
    """The function with its constants 1e-6 and 1e-7 set to 0: they stand in no paper."""
    code = function.__code__
    constants = tuple(0.0 if value in (1e-6, 1e-7) else value for value in code.co_consts)
    return type(function)(code.replace(co_consts=constants), function.__globals__)


def _by_pytorch_grad_cam(name: str, module: nn.Module, layer: str, images: Tensor, ids: Tensor):
    cam = ORACLES[name](module, [module.get_submodule(layer)])
    try:
        outputs = cam.activations_and_grads(images)
        outputs.gather(1, ids[:, None]).sum().backward()
        seen = cam.activations_and_grads
        features, gradients = (held[0].numpy() for held in (seen.activations, seen.gradients))
    finally:
        cam.activations_and_grads.release()
        module.zero_grad()
    if name in ("grad_cam_pp", "xgrad_cam"):
        weights = _without_epsilon(type(cam).get_cam_weights)
        with np.errstate(invalid="ignore"):
            channels = weights(cam, images, None, None, features, gradients)
        return torch.from_numpy((np.nan_to_num(channels)[..., None, None] * features).sum(1))
    maps = cam.get_cam_image(images, None, None, features, gradients, eigen_smooth=False)
    return torch.from_numpy(maps).double()


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_equals_pytorch_grad_cam(
    case: tuple[str, nn.Module, Tensor], method: str, dtype: torch.dtype, tolerance: float
) -> None:
    name, module, images = case
    try:
        ids, maps = _explained(module.to(dtype), LAYERS[name], images.to(dtype), method)
    finally:
        module.double()
    for rank in range(ids.shape[1]):
        expected = _by_pytorch_grad_cam(method, module, LAYERS[name], images, ids[:, rank])
        for image in range(len(images)):
            wanted, actual = expected[image], maps[image, rank]
            if method.startswith("eigen") and (wanted * actual).sum() < 0:
                wanted = -wanted  # their sign is arbitrary
            assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_equals_torchcam(
    case: tuple[str, nn.Module, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    name, module, images = case
    try:
        ids, layer_cam = _explained(module.to(dtype), LAYERS[name], images.to(dtype), "layer_cam")
        if name == "resnet18":
            _, gap_cam = _explained(module, LAYERS[name], images.to(dtype), "gap_cam")
    finally:
        module.double()
    top = ids[:, 0].tolist()
    with LayerCAM(module, LAYERS[name], input_shape=(3, SIZE, SIZE)) as extractor:
        (expected,) = extractor(top, module(images), normalized=False)
    actual = layer_cam[:, 0].relu()
    assert (actual - expected.relu()).abs().max() <= tolerance * expected.abs().max()
    if name == "resnet18":
        with CAM(module, "layer4", "fc", input_shape=(3, SIZE, SIZE)) as extractor:
            module(images)
            (expected,) = extractor(top, normalized=False)
        actual = gap_cam[:, 0].relu()
        assert (actual - expected.relu()).abs().max() <= tolerance * expected.abs().max()
