"""Plain JPEGs, many at a time, by torch: by nvJPEG where there is a GPU, else by libjpeg.

What networks see of them is what `see` gives, but for rounding and how a decoder enlarges colours.
Whatever is no plain JPEG is left to `see`, with all that makes decoding hard.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from PIL.JpegImagePlugin import JpegImageFile

from scacam.images.files import opened, orientation_of
from scacam.images.views import Preprocessing, Seen, ViewName, placed, view_of

if TYPE_CHECKING:
    import torch

__all__ = ["PlainJpeg", "plain_jpeg", "see_together"]

_END = b"\xff\xd9"
_LARGEST = 1 << 25
"""Pixels: resizing takes twelve bytes of the GPU for each, and decoding three."""
_LONGEST = 8
"""Times the shorter side: resized, the whole image is held, and not what is kept of it alone."""


class PlainJpeg(NamedTuple):
    """A JPEG that is upright and as nearly all are.

    Attributes:
        data: the bytes of the file.
        width, height: as its head states them.
        is_gray: whether it has one component, and not three.
    """

    data: bytes
    width: int
    height: int
    is_gray: bool


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """The file as a plain JPEG, if it is one.

    It has to be whole, since a decoder may fill up what was cut off; of at most 33 megapixels and
    eight times as long as wide; upright by its EXIF; gray, or of three components that no Adobe
    marker or name calls anything but Y, Cb and Cr.
    """
    if not data.endswith(_END):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = opened(data)
            if not isinstance(image, JpegImageFile) or image.format != "JPEG":
                return None  # such as MPO, of several images
            if image.mode not in ("L", "RGB") or image.info.get("adobe_transform", 1) != 1:
                return None
            if [component[0] for component in image.layer] == list(b"RGB"):
                return None
            if orientation_of(image) != 1:
                return None
    except Exception:  # it is for `see` to say what is wrong
        return None
    width, height = image.size
    if width * height > _LARGEST or max(width, height) > _LONGEST * min(width, height):
        return None
    return PlainJpeg(data, width, height, image.mode == "L")


def see_together(
    files: Sequence[PlainJpeg],
    samplings: Sequence[Preprocessing],
    view: ViewName,
    device: "torch.device",
) -> list[Seen]:
    """What networks see of plain JPEGs, which are decoded and resampled on a device.

    None of them is decoded at a part of its size, as large ones are by `see`.

    Args:
        files: the files, as many as their pixels fit into the memory of the device, three bytes
            each.
        samplings: how each network wants its images.
        view: what they look at.
        device: where to.

    Returns:
        For each file what `see` returns.

    Raises:
        Exception: whatever torch raises if any of them cannot be decoded, or for lack of memory.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes cannot be written to, nor are they
        coded = [torch.frombuffer(file.data, dtype=torch.uint8) for file in files]
        decoded = decode_jpeg(coded, ImageReadMode.RGB, device=device)
    looks: list[list[torch.Tensor]] = [[] for _ in samplings]
    for file, image in zip(files, decoded, strict=True):
        if image.shape[1:] != (file.height, file.width):
            raise ValueError(f"decoded to {tuple(image.shape)}, not {file.width} × {file.height}")
        colours = image[:1].expand(3, -1, -1) if file.is_gray else image
        for seen, sampling in zip(looks, samplings, strict=True):
            seen.append(_resampled(colours, sampling, view))
    # The copy waits for the device. Only then may what was decoded be freed: the next files are
    # decoded in a stream of their own, which would not wait before it takes that memory.
    samples = [torch.stack(seen).cpu().numpy() for seen in looks]
    return [
        (
            (file.width, file.height),
            [
                (view_of(file.width, file.height, sampling, view), pixels[index])
                for sampling, pixels in zip(samplings, samples, strict=True)
            ],
        )
        for index, file in enumerate(files)
    ]


def _resampled(image: "torch.Tensor", sampling: Preprocessing, view: ViewName) -> "torch.Tensor":
    """What `pixels` is of an image as Pillow has it, of one of uint8 `[3, height, width]`."""
    import torch
    from torch.nn.functional import interpolate

    height, width = sampling.crop_size
    resized_width, resized_height, left, top = placed(
        image.shape[2], image.shape[1], sampling, view
    )
    if sampling.channels == 1:
        red, green, blue = image.int()
        image = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[None]  # as Pillow
    across = image.shape[1], resized_width
    found = image[None].float()
    for size in (across, (resized_height, resized_width)):  # and after each it rounds
        found = interpolate(found, size, mode=sampling.interpolation, antialias=True)
        found = found.round().clip(0, 255)
    kept = found[0, :, top : top + height, left : left + width]
    return kept.to(torch.uint8).permute(1, 2, 0)
