"""From the bytes of an image to the pixels that a network sees.

An image is upright (its EXIF orientation applied) and RGB or gray before anything else happens.
The *view* is the rectangle of it, in its own pixels, that is resized to the network's input.
"""

import contextlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from scacam.errors import ImageError

__all__ = ["VIEWS", "Preprocessing", "View", "decode", "pixels", "see", "view_of"]

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


def see(
    data: bytes, samplings: Sequence[Preprocessing], view: ViewName
) -> tuple[tuple[int, int], list[tuple[View, np.ndarray]]]:
    """What networks see of an image file, decoded no further than they need.

    A JPEG whose shorter side is four times what the networks resize it to, or more, is decoded at a
    half, a quarter or an eighth of its size: three times as fast at 12 megapixels. What networks
    see then differs by 0.3 of 255 on average, and in a photo by 2 at most.

    Args:
        data: the bytes of the file.
        samplings: how each network wants its images.
        view: what they look at.

    Returns:
        Width and height of the upright image; and for each sampling the view and its `pixels`.

    Raises:
        ImageError: as `decode`.
    """
    needed = max(max(sampling.resize_size, *sampling.crop_size) for sampling in samplings)
    image, (width, height), factor = _decoded(data, shorter_side=2 * needed)
    seen = []
    for sampling in samplings:
        rectangle = view_of(width, height, sampling, view)
        scaled = View(*(end / factor for end in rectangle))
        seen.append((rectangle, pixels(image, scaled, sampling)))
    return (width, height), seen


def decode(data: bytes) -> Image.Image:
    """Decode an image file of any format that Pillow reads.

    Args:
        data: the bytes of the file. Of an animation, the first frame is taken.

    Returns:
        The upright image in mode `RGB`. 16-bit samples are scaled to 8 bits, alpha is dropped.

    Raises:
        ImageError: the bytes are no image, are broken, or hold more pixels than Pillow's limit
            against decompression bombs allows.
    """
    return _decoded(data, shorter_side=None)[0]


def _decoded(data: bytes, shorter_side: int | None) -> tuple[Image.Image, tuple[int, int], float]:
    """The upright image, its width and height, and how many times smaller it was decoded.

    With a shorter side, a JPEG is decoded as small as it can be and still have that.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            size, factor = image.size, 1.0
            if shorter_side is not None:
                drafted = image.draft(None, (shorter_side, shorter_side))
                factor = size[0] / drafted[1][2] if drafted else 1.0
            image.load()
            if _turn_upright(image):
                size = size[::-1]
            return _to_rgb(image), size, factor
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        start = data[:16]
        raise ImageError("not_an_image", f"no known image format; it begins {start!r}") from error
    except Exception as error:  # a broken file makes Pillow's plugins raise almost anything
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


def _turn_upright(image: Image.Image) -> bool:
    """Apply the EXIF orientation; returns whether width and height changed places."""
    # Unreadable metadata does not make the pixels unreadable.
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        ImageOps.exif_transpose(image, in_place=True)
        return orientation in (5, 6, 7, 8)
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        samples = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((samples.clip(0, 65535) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def view_of(width: int, height: int, preprocessing: Preprocessing, view: ViewName) -> View:
    """Where a network looks in an image of this size.

    `center_crop` is the network's published preprocessing: exactly the pixels that resizing the
    shorter side to `resize_size` and cropping the centre would keep. `whole_image` squashes the
    whole image to the network's input.
    """
    if view == "whole_image":
        return View(0.0, 0.0, float(width), float(height))
    crop_height, crop_width = preprocessing.crop_size
    scale = max(preprocessing.resize_size / min(width, height), crop_width / width)
    scale = max(scale, crop_height / height)
    # torchvision truncates the resized longer side and rounds the crop's offset: so do we.
    resized_width = max(int(width * scale + 1e-6), crop_width)
    resized_height = max(int(height * scale + 1e-6), crop_height)
    left = round((resized_width - crop_width) / 2)
    top = round((resized_height - crop_height) / 2)
    per_x, per_y = width / resized_width, height / resized_height
    return View(
        left * per_x,
        top * per_y,
        min((left + crop_width) * per_x, float(width)),
        min((top + crop_height) * per_y, float(height)),
    )


def pixels(image: Image.Image, view: View, preprocessing: Preprocessing) -> np.ndarray:
    """The view, resized to the network's input: uint8 `[height, width, channels]`."""
    height, width = preprocessing.crop_size
    if preprocessing.channels == 1:
        image = image.convert("L")
    # Pillow's filter reaches beyond the box: the same as to resize the whole image, then crop.
    resized = image.resize((width, height), _RESAMPLING[preprocessing.interpolation], box=view)
    return np.asarray(resized).reshape(height, width, preprocessing.channels)
