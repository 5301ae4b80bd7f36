"""What a network looks at in an image, and the pixels that it gets of it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

__all__ = ["VIEWS", "Preprocessing", "Seen", "View", "ViewName", "pixels", "placed", "view_of"]

ViewName = Literal["center_crop", "whole_image"]
VIEWS: tuple[ViewName, ...] = ("center_crop", "whole_image")

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class View(NamedTuple):
    """A rectangle in continuous pixels of the upright image: x to the right, y down."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images: resized, centre-cropped, scaled to [0, 1] and normalised.

    Attributes:
        crop_size: height and width of the network's input.
        resize_size: length of the image's shorter side before the centre crop.
        interpolation: `bilinear` or `bicubic`, antialiased.
        mean, std: one value per channel, of pixels in [0, 1]; one value alone means gray.
    """

    crop_size: tuple[int, int] = (224, 224)
    resize_size: int = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(f"mean and std need 1 or 3 values each, not {self.mean}, {self.std}")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f"interpolation is bilinear or bicubic, not {self.interpolation!r}")

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for gray."""
        return len(self.mean)


Seen = tuple[tuple[int, int], list[tuple[View, np.ndarray]]]
"""Width and height of an upright image; and by network the view and its `pixels`."""


def view_of(width: int, height: int, preprocessing: Preprocessing, view: ViewName) -> View:
    """Where a network looks in an image of this size.

    `center_crop` is the network's published preprocessing: exactly the pixels that resizing the
    shorter side to `resize_size` and cropping the centre would keep. `whole_image` squashes the
    whole image to the network's input.
    """
    if view == "whole_image":
        return View(0.0, 0.0, float(width), float(height))
    crop_height, crop_width = preprocessing.crop_size
    resized_width, resized_height, left, top = placed(width, height, preprocessing, view)
    per_x, per_y = width / resized_width, height / resized_height
    return View(
        left * per_x,
        top * per_y,
        min((left + crop_width) * per_x, float(width)),
        min((top + crop_height) * per_y, float(height)),
    )


def placed(
    width: int, height: int, preprocessing: Preprocessing, view: ViewName
) -> tuple[int, int, int, int]:
    """What an image of this size is resized to, and where in it the network's input lies.

    Returns:
        The width and height that the whole image gets; and from the left and from the top, where
        the `crop_size` begins that is kept of it.
    """
    crop_height, crop_width = preprocessing.crop_size
    if view == "whole_image":
        return crop_width, crop_height, 0, 0
    scale = max(preprocessing.resize_size / min(width, height), crop_width / width)
    scale = max(scale, crop_height / height)
    # torchvision truncates the resized longer side and rounds the crop's offset: so do we.
    resized_width = max(int(width * scale + 1e-6), crop_width)
    resized_height = max(int(height * scale + 1e-6), crop_height)
    left = round((resized_width - crop_width) / 2)
    top = round((resized_height - crop_height) / 2)
    return resized_width, resized_height, left, top


def pixels(image: Image.Image, view: View, preprocessing: Preprocessing) -> np.ndarray:
    """The view, resized to the network's input: uint8 `[height, width, channels]`."""
    height, width = preprocessing.crop_size
    if preprocessing.channels == 1:
        image = image.convert("L")
    # Pillow's filter reaches beyond the box: the same as to resize the whole image, then crop.
    resized = image.resize((width, height), _RESAMPLING[preprocessing.interpolation], box=view)
    return np.asarray(resized).reshape(height, width, preprocessing.channels)
