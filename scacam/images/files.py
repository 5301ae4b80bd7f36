"""From the bytes of an image file of any format to what networks see of it, by Pillow."""

import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageFile

from scacam.errors import ImageError
from scacam.images.views import Preprocessing, Seen, View, ViewName, pixels, view_of

__all__ = ["decode", "opened", "orientation_of", "see"]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation; from 5 on, the sides change places."""

_SIGNED = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "PPM")
"""Formats whose first bytes are a signature that little else begins with."""

_HEIF_BRANDS = (
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
    *(b"mif1", b"msf1"),
)

_PNG = b"\x89PNG\r\n\x1a\n"
_XMP = ("xmp", "XML:com.adobe.xmp")
_EXIF_ITEM = re.compile(rb"(infe.{8})Exif", re.DOTALL)
_ORIENTING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


def see(data: bytes, samplings: Sequence[Preprocessing], view: ViewName) -> Seen:
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
    """Decode an image file of any format that Pillow reads, and HEIC where `pillow-heif` is.

    Args:
        data: the bytes of the file. Of an animation, the first frame is taken.

    Returns:
        The upright image in mode `RGB`, alpha dropped. 16-bit samples are divided by 257. Floats,
        and integers that are signed or longer, have no white of their own: they are scaled if
        none is below 0 and the largest is a float of at most 1, or in the upper half of what 8 or
        16 bits hold.

    Raises:
        ImageError: of one of these kinds. `empty`: there are no bytes; `not_an_image`: they are no
            image; `corrupt`: they are broken; `unsupported`: the format cannot be read, or its
            samples not be scaled; `too_large`: they hold more pixels than Pillow's limit against
            decompression bombs allows; `out_of_memory`: there is not enough for so many.
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
            try:
                return _read(data, shorter_side)
            except Exception:
                bare = _without_metadata(data)
                if bare == data:
                    raise
                return _read(bare, shorter_side)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except MemoryError as error:
        raise ImageError("out_of_memory", "its pixels take more memory than there is") from error
    except Exception as error:  # a broken file makes Pillow's plugins raise almost anything
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


def _read(data: bytes, shorter_side: int | None) -> tuple[Image.Image, tuple[int, int], float]:
    image = opened(data)
    size, factor = image.size, 1.0
    if shorter_side is not None and image.format in ("JPEG", "MPO"):
        drafted = image.draft(None, (shorter_side, shorter_side))
        factor = size[0] / drafted[1][2] if drafted else 1.0
    image.load()
    if factor == 1:
        size = image.size  # some formats know it only now
    orientation = orientation_of(image)
    upright = _to_rgb(image)
    if orientation in _UPRIGHT:
        upright = upright.transpose(_UPRIGHT[orientation])
    return upright, size[::-1] if orientation >= 5 else size, factor


def opened(data: bytes) -> ImageFile.ImageFile:
    """An image of which only the head has been read; what is broken raises almost anything."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError as error:
        if _is_heif(data) and "HEIF" not in Image.OPEN:
            _learn_heif()
            return opened(data)
        raise _unidentified(data) from error
    # Stubs know a format by its head alone; EPS would be run by Ghostscript, as a program.
    if isinstance(image, ImageFile.StubImageFile) or image.format in ("EPS", "MPEG"):
        raise ImageError("unsupported", f"{image.format} is not read; convert it to JPEG or PNG")
    return image


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS


def _learn_heif() -> None:
    """Teach Pillow to read HEIC, once in a process and only where it is met."""
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(
            "unsupported", "HEIC is not read without: pip install pillow-heif"
        ) from error
    pillow_heif.register_heif_opener()


def _unidentified(data: bytes) -> ImageError:
    """Why Pillow could not identify a file; it says nothing of the formats that it tried."""
    for name in _SIGNED:
        plugin, accepts = Image.OPEN.get(name, (None, None))
        accepted = accepts and accepts(data[:16])
        if isinstance(accepted, str):  # the format is known, but this Pillow was built without it
            return ImageError("unsupported", f"{name}: {accepted}")
        if plugin is not None and accepted:
            try:
                plugin(io.BytesIO(data), "")
            except Exception as error:
                kind = "unsupported" if "unknown pixel mode" in str(error) else "corrupt"
                return ImageError(kind, f"it begins as {name}: {error}")
    return ImageError("not_an_image", f"no known image format; it begins {data[:16]!r}")


def _without_metadata(data: bytes) -> bytes:
    """A PNG with the chunks that its pixels need, and of the others those that may turn it.

    Pillow gives up a PNG for any chunk that is broken or too large, as if it held pixels; and an
    AVIF for its EXIF, whose item gets another name here. It is turned by items of its own.
    """
    if data[4:8] == b"ftyp":
        return _EXIF_ITEM.sub(rb"\1none", data)
    if not data.startswith(_PNG):
        return data
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        chunk, checksum = data[start + 4 : end - 4], data[end - 4 : end]
        orients = chunk.startswith(b"eXIf") or chunk[4:].startswith(_ORIENTING_TEXTS)
        is_whole = zlib.crc32(chunk) == int.from_bytes(checksum)
        if chunk[:1].isupper() or (orients and is_whole):  # upper case: critical for the pixels
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def orientation_of(image: Image.Image) -> int:
    """The orientation that EXIF states, or else XMP: 1 to 8."""
    xmp = Image.new("1", (1, 1))  # over EXIF that is none, Pillow does not get as far as the XMP
    xmp.info = {name: image.info[name] for name in _XMP if name in image.info}
    for source in (image, xmp):
        with contextlib.suppress(Exception):  # what is malformed tells nothing
            found = source.getexif().get(ExifTags.Base.Orientation)
            if found and found in range(1, 9):
                return int(found)
    return 1


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):  # PPM scales to 16 bits
        gray = np.asarray(image, dtype=np.int64) // 257
    elif mode in ("I", "F"):
        gray = _scaled(np.asarray(image))
    else:
        return image.convert("RGB")
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Samples without a white of their own, scaled to 0 … 255 if their range tells it."""
    low, high = samples.min(), samples.max()
    if low >= 0:
        if samples.dtype.kind == "f" and high <= 1:
            return np.rint(samples * 255)
        for unit in (1, 257):
            if 128 * unit <= high <= 255 * unit:
                return samples // unit
    raise ImageError(
        "unsupported",
        f"its samples, from {low:g} to {high:g}, do not tell which is white; "
        "convert it to 8 or 16 bits",
    )
