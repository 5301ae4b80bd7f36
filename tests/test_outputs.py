"""What a network returns: logits, or what its last step made of them."""

import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from scacam import Explainer, Network, NetworkError, Preprocessing
from scacam.jobs import explain

SMALL = Preprocessing((32, 32), 32, mean=(0.0,) * 3, std=(1.0,) * 3)


def _layers(classes: int = 4) -> list[nn.Module]:
    torch.manual_seed(1)
    return [
        nn.Conv2d(3, 8, 4, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    ]


def _network(*last: nn.Module, classes: int = 4, **more: Any) -> Network:
    return Network(nn.Sequential(*_layers(classes), *last), preprocessing=SMALL, **more)


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class _Functional(nn.Module):
    def __init__(self, step: Any) -> None:
        super().__init__()
        self.inner, self.step = nn.Sequential(*_layers()), step

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.step(self.inner(images))


@pytest.mark.parametrize(
    "last",
    [
        nn.Softmax(1),
        nn.LogSoftmax(1),
        lambda logits: logits.softmax(dim=1),
        lambda logits: torch.nn.functional.log_softmax(logits, 1),
        lambda logits: torch.softmax(logits, 1),
    ],
)
def test_a_softmax_at_the_end_is_seen_through(last):
    plain = _network()
    module = last if isinstance(last, nn.Module) else None
    ended = _network(module) if module else Network(_Functional(last), preprocessing=SMALL)
    assert (plain.output.kind, ended.output.kind) == ("softmax", "softmax")
    expected, found = Explainer(plain, top_k=2)(IMAGES), Explainer(ended, top_k=2)(IMAGES)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.heatmaps.keys() == expected.heatmaps.keys()
    for method, maps in expected.heatmaps.items():
        torch.testing.assert_close(found.heatmaps[method], maps, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        ended.probabilities(found.logits), expected.logits.softmax(1), rtol=1e-5, atol=1e-6
    )


def test_a_sigmoid_at_the_end_means_independent_labels():
    network = _network(nn.Sigmoid())
    assert network.output.kind == "sigmoid"
    explanation = Explainer(network, top_k=2)(IMAGES)
    torch.testing.assert_close(explanation.logits, _network().module(IMAGES))
    probabilities = network.probabilities(explanation.logits)
    torch.testing.assert_close(probabilities, network.module(IMAGES))
    assert _network(output_kind="sigmoid").output.kind == "sigmoid"


@pytest.mark.parametrize("last", [(), (nn.Sigmoid(),)])
def test_a_single_logit_has_two_classes(last):
    network = _network(*last, classes=1, categories=["no", "yes"])
    explanation = Explainer(network, top_k=2)(IMAGES)
    logit = nn.Sequential(*_layers(1))(IMAGES)[:, 0]
    torch.testing.assert_close(explanation.logits, torch.stack([-logit, logit], 1))
    probabilities = network.probabilities(explanation.logits)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    torch.testing.assert_close(probabilities[:, 1], logit.sigmoid())
    assert network.num_classes == 2
    # The map of one class is the opposite of the other's.
    for method in ("gap_cam", "grad_cam", "hires_cam"):
        maps = explanation.heatmaps[method]
        torch.testing.assert_close(maps[:, 0], -maps[:, 1])


class _Halves(nn.Module):
    """Probabilities whose logits cannot be had: they are a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(*_layers()), nn.Sequential(*_layers())
        nn.init.normal_(self.two[4].weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.one(images).softmax(1) + self.two(images).softmax(1)) / 2


class _NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, *rest = _layers()
        self.backbone, self.rest = first, nn.Sequential(*rest)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.backbone(images)
        return self.rest(features)


class _Empty(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: _Halves(), {"target_layer": "one.0"}, "probabilities .* sum to 1"),
        (lambda: nn.Sequential(*_layers(1), nn.Softmax(1)), {}, "always 1"),
        (lambda: nn.Sequential(*_layers(), nn.Softmax(1)), {"output_kind": "sigmoid"}, "ends in"),
        (lambda: nn.Sequential(*_layers()), {"output_kind": "tanh"}, "unknown output kind"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), *_layers()
            ),
            {},
            "(?i)batch",
        ),
        (lambda: torch.jit.trace(nn.Sequential(*_layers()), IMAGES), {}, "TorchScript"),
        (lambda: _Empty(), {}, "no"),
        (lambda: nn.Sequential(*_layers()).to("meta"), {}, "meta"),
    ],
)
def test_what_cannot_be_explained_is_refused_with_the_reason(module, options, message):
    with pytest.raises(NetworkError, match=message):
        Network(module(), preprocessing=SMALL, **options)


def test_a_backbone_without_gradients_is_explained():
    network = Network(_NoGrad(), preprocessing=SMALL, target_layer="rest.0")
    expected = Explainer(_network(), methods=["grad_cam"])(IMAGES)
    found = Explainer(network, methods=["grad_cam"])(IMAGES)
    torch.testing.assert_close(found.heatmaps["grad_cam"], expected.heatmaps["grad_cam"])


def locked() -> Network:
    """A network that cannot be pickled."""
    network = _network()
    network.module.lock = threading.Lock()
    return network


def parametrized() -> Network:
    first, *rest = _layers()
    return Network(nn.Sequential(parametrizations.weight_norm(first), *rest), preprocessing=SMALL)


def halved() -> Network:
    """It ends in a softmax."""
    return _network(nn.Softmax(1))


def single() -> Network:
    return _network(classes=1)


@pytest.mark.long
def test_a_job_over_networks_of_all_kinds(photo_folder, tmp_path):
    """The right probability is stored, and what cannot be pickled is built anew."""
    names = [
        f"tests.test_outputs:{name}" for name in ("locked", "parametrized", "halved", "single")
    ]
    result = explain.run(
        input=str(photo_folder(4)),
        output=str(tmp_path / "out"),
        networks=names,
        methods=["grad_cam"],
        top_k=4,
    )
    assert (result.explained, result.errors) == (4, {})
    rows = pd.read_parquet(tmp_path / "out/explanations", columns=["image_id", "probability"])
    rows["network"] = pd.read_parquet(tmp_path / "out/explanations", columns=["network"])["network"]
    sums = rows.groupby(["network", "image_id"], observed=True)["probability"].sum()
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    same = rows[rows["network"].isin([names[0], names[2]])]
    pairs = same.groupby(["image_id", same.groupby(["network", "image_id"]).cumcount()])
    assert (pairs["probability"].agg(np.ptp) < 1e-5).all()
