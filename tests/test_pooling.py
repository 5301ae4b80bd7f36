"""Section 3.2.2 of the paper: a 4 × 4 × 3 feature map, a pooling and a linear classifier."""

import pytest
import torch
from torch import Tensor, nn

from scacam import Explainer, Network, Preprocessing
from scacam.explainer import observe
from scacam.methods.gradients import averaged

POOLINGS = {
    "1: global average": (nn.AdaptiveAvgPool2d(1), 1),
    "2: average 2 × 2, stride 2": (nn.AvgPool2d(2, stride=2), 4),
    "3: maximum 2 × 2, stride 2": (nn.MaxPool2d(2, stride=2), 4),
    "4: average 2 × 2, stride 1": (nn.AvgPool2d(2, stride=1), 9),
}
CLASSES = 5


@pytest.fixture(params=POOLINGS)
def case(request: pytest.FixtureRequest) -> tuple[Network, int]:
    """A network and the number of its pooled cells."""
    pooling, cells = POOLINGS[request.param]
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), pooling, nn.Flatten(), nn.Linear(3 * cells, CLASSES)
    )
    preprocessing = Preprocessing(crop_size=(4, 4))
    return Network(module, target_layer="0", preprocessing=preprocessing), cells


def _images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_averaged_gradient_is_a_sixteenth_of_the_summed_weights(case: tuple[Network, int]) -> None:
    network, cells = case
    seen = observe(network, _images(), top_k=CLASSES)
    assert seen.features.shape == (2, 3, 4, 4)
    weights = network.module[3].weight.detach().view(CLASSES, 3, cells)
    expected = weights.sum(2)[seen.class_ids] / 16
    torch.testing.assert_close(averaged(seen.gradients), expected)


def test_only_global_pooling_has_class_weights(case: tuple[Network, int]) -> None:
    network, cells = case
    assert network.supports("gap_cam") == (cells == 1)
    assert (network.class_weights is not None) == (cells == 1)
    maps = Explainer(network)(_images()).heatmaps
    assert ("gap_cam" in maps) == (cells == 1)


def test_average_pooling_is_no_target_layer(case: tuple[Network, int]) -> None:
    network, _ = case
    found = Network(network.module, preprocessing=network.preprocessing).target_layer.name
    is_maximum = isinstance(network.module[1], nn.MaxPool2d)
    assert found == ("1" if is_maximum else "0")  # behind VGG's last maximum lie its features
