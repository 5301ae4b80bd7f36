"""Checkpoints as people have them: each holds the same weights in another wrapping."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from scacam import NetworkError, load_network

NAME = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(3)
    return torchvision.models.get_model(NAME, num_classes=7)


def _prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


WRAPPINGS = {
    "plain": lambda module, state: state,
    "data parallel": lambda module, state: nn.DataParallel(module).state_dict(),
    "compiled": lambda module, state: torch.compile(module).state_dict(),
    "both": lambda module, state: _prefixed(state, "module._orig_mod."),
    "Lightning": lambda module, state: {
        "state_dict": {**_prefixed(state, "model."), "criterion.weight": torch.ones(7)},
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1},
    },
    "a prefix of its own": lambda module, state: {"model": _prefixed(state, "backbone.net.")},
    "averaged": lambda module, state: AveragedModel(module).state_dict(),
    "only the average": lambda module, state: {"model_ema": state, "epoch": 3},
    "average beside": lambda module, state: {
        "model": state,
        "model_ema": {key: torch.zeros_like(value) for key, value in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
    },
    "no counters": lambda module, state: {
        key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
    },
    "half precision": lambda module, state: {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_same_weights_in_another_wrapping(wrapping, module, tmp_path):
    state = module.state_dict()
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](module, state), path)
    found = load_network(NAME, str(path)).module.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        if wrapping == "no counters" and key.endswith("num_batches_tracked"):
            continue
        tolerance = 1e-2 if wrapping == "half precision" else 0
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance / 10)


def test_what_was_taken_off_is_said(module, tmp_path, caplog):
    path = tmp_path / "weights.ckpt"
    torch.save(WRAPPINGS["Lightning"](module, module.state_dict()), path)
    with caplog.at_level(logging.INFO, "scacam"):
        load_network(NAME, str(path))
    (told,) = [record.message for record in caplog.records if "weights.ckpt" in record.message]
    assert "without the prefix model." in told
    assert "left out criterion.weight" in told


def test_auxiliary_heads_are_left_out(tmp_path):
    torch.manual_seed(0)
    trained = torchvision.models.googlenet(aux_logits=True, init_weights=False, num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    network = load_network("googlenet", str(tmp_path / "weights.pth"))
    found = network.module.state_dict()
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in found.items())
    without = {k: v for k, v in trained.state_dict().items() if not k.startswith("aux")}
    torch.save(without, tmp_path / "without.pth")
    other = load_network("googlenet", str(tmp_path / "without.pth"))
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(other.module(images), network.module(images))


def test_a_bare_name_in_the_working_folder(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model_best.pth.tar", "weights"):
        torch.save({"state_dict": module.state_dict()}, name)
        assert load_network(NAME, name).num_classes == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"", "no state dict"),
    ],
)
def test_files_that_are_none(content, message, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(NetworkError, match=message):
        load_network(NAME, str(tmp_path / "weights.pth"))


def test_the_same_keys_twice_are_refused(module, tmp_path):
    state = module.state_dict()
    torch.save({**_prefixed(state, "student."), **_prefixed(state, "teacher.")}, tmp_path / "w.pth")
    with pytest.raises(NetworkError, match=r"more than once, under 'student\.' and 'teacher\.'"):
        load_network(NAME, str(tmp_path / "w.pth"))


def test_other_weights_are_refused_with_their_keys(tmp_path):
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "w.pth")
    with pytest.raises(NetworkError, match="does not fit ShuffleNetV2; missing: conv1"):
        load_network(NAME, str(tmp_path / "w.pth"))
    torch.save({"epoch": 3, "best": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(NetworkError, match=r"holds no state dict.*it has epoch, best"):
        load_network(NAME, str(tmp_path / "w.pth"))


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": {}, "trap": Trap()}, tmp_path / "w.pth")
    with pytest.raises(NetworkError, match="without running code"):
        load_network(NAME, str(tmp_path / "w.pth"))
    assert not (tmp_path / "sprung").exists()
