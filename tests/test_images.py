"""Bytes to pixels and view: equal to torchvision's own transforms, whatever the file."""

import io
import warnings

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision.transforms import functional as F

from scacam.errors import ImageError
from scacam.images import Preprocessing, View, decode, pixels, see, view_of


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (227, 227), (1024, 683), (333, 257), (100, 80), (900, 2)]
)
@pytest.mark.parametrize(
    "name", ["ResNet50_Weights.IMAGENET1K_V2", "EfficientNet_B3_Weights.DEFAULT"]
)
def test_center_crop_is_what_torchvisions_transforms_see(photo, size, name):
    weights = torchvision.models.get_weight(name)
    transform = weights.transforms()
    image = photo(*size)
    preprocessing = Preprocessing(
        (transform.crop_size[0],) * 2, transform.resize_size[0], transform.interpolation.value
    )
    resized = F.resize(image, transform.resize_size, interpolation=transform.interpolation)
    expected = np.asarray(F.center_crop(resized, transform.crop_size))

    view = view_of(*size, preprocessing, "center_crop")
    difference = np.abs(pixels(image, view, preprocessing).astype(int) - expected)

    # Pillow keeps boxes in single precision: ties round otherwise in a few pixels.
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


def test_view_of_a_centre_crop_by_hand():
    # 512 × 256 to 512 × 256: the middle 224 × 224 pixels.
    assert view_of(512, 256, Preprocessing(), "center_crop") == View(144, 16, 368, 240)
    # A quarter of the size: the same rectangle in the original's pixels.
    assert view_of(2048, 1024, Preprocessing(), "center_crop") == View(576, 64, 1472, 960)


def test_whole_image_is_squashed(photo):
    image = photo(300, 200)
    view = view_of(300, 200, Preprocessing(), "whole_image")
    assert view == View(0, 0, 300, 200)
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels(image, view, Preprocessing()), expected)


def test_a_wide_input_stays_inside_the_image():
    preprocessing = Preprocessing(crop_size=(64, 256), resize_size=64)
    view = view_of(100, 100, preprocessing, "center_crop")
    assert view.x0 >= 0
    assert view.x1 <= 100
    assert (view.x1 - view.x0) / (view.y1 - view.y0) == pytest.approx(4)


def test_exif_orientation_is_applied(photo):
    image = photo(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: shown 90° clockwise
    upright = decode(saved(image, "PNG", exif=exif))
    assert upright.size == (20, 40)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("view", ["center_crop", "whole_image"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(2501, 2050), (1700, 4090)])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(photo, size, orientation, view):
    image = photo(*size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, "JPEG", quality=90, exif=exif)
    gray = Preprocessing((112, 96), 100, "bilinear", (0.5,), (0.5,))
    samplings = [Preprocessing(), Preprocessing((240, 240), 272, "bicubic"), gray]
    found_size, found = see(data, samplings, view)
    full = decode(data)
    assert found_size == full.size == (size if orientation == 1 else size[::-1])
    for sampling, (rectangle, seen) in zip(samplings, found, strict=True):
        assert rectangle == view_of(*full.size, sampling, view)
        difference = np.abs(seen.astype(int) - pixels(full, rectangle, sampling))
        assert 0 < difference.max() <= 3  # 0 if it had been decoded whole
        assert difference.mean() < 0.4


def test_a_jpeg_that_is_not_large_is_decoded_whole(photo):
    data = saved(photo(1800, 1023), "JPEG")
    size, [(rectangle, seen)] = see(data, [Preprocessing()], "center_crop")
    assert size == (1800, 1023)
    np.testing.assert_array_equal(seen, pixels(decode(data), rectangle, Preprocessing()))


def test_16_bit_samples_are_scaled_not_clipped():
    samples = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode(saved(Image.fromarray(samples), "PNG")))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(photo, mode):
    image = photo(20, 10).convert(mode)
    decoded = decode(saved(image, "TIFF"))
    assert (decoded.mode, decoded.size) == ("RGB", (20, 10))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_an_animation_gives_its_first_frame(photo):
    first, second = photo(16, 16, 1).convert("P"), photo(16, 16, 2).convert("P")
    data = saved(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(first.convert("RGB")))


def test_unreadable_metadata_does_not_matter(photo):
    data = saved(photo(20, 10), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert decode(data).size == (20, 10)


def test_one_channel_networks_get_gray(photo):
    preprocessing = Preprocessing((8, 8), 8, mean=(0.5,), std=(0.5,))
    image = photo(8, 8)
    gray = pixels(image, View(0, 0, 8, 8), preprocessing)
    np.testing.assert_array_equal(gray[..., 0], np.asarray(image.convert("L")))


def test_broken_bytes_are_named(photo):
    jpeg = saved(photo(200, 200), "JPEG")
    cases = {
        b"": "empty",
        b"<!doctype html><html>": "not_an_image",
        jpeg[: len(jpeg) // 2]: "corrupt",
        saved(photo(64, 64), "PNG")[:200]: "corrupt",
    }
    for data, kind in cases.items():
        with pytest.raises(ImageError) as raised:
            decode(data)
        assert raised.value.kind == kind


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch, photo):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="limit") as raised:
            decode(saved(photo(200, 200), "PNG"))
    assert raised.value.kind == "too_large"


def test_preprocessing_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="1 or 3"):
        Preprocessing(mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(ValueError, match="nearest"):
        Preprocessing(interpolation="nearest")
