"""Bytes to pixels and view: equal to torchvision's own transforms, whatever the file."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
import torchvision
from PIL import Image, ImageOps
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


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "LAB"])
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


def oriented(image: Image.Image, format: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_of_every_format(photo, format, orientation):
    options = {"lossless": True} if format == "WEBP" else {}
    data = oriented(photo(40, 20), format, orientation, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((40, 20) if orientation < 5 else (20, 40))
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(expected))
    size, _ = see(data, [Preprocessing()], "whole_image")
    assert size == expected.size


def exif_with(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of one directory, little endian: tag, type, count and the four bytes of the value."""
    tags = b"".join(struct.pack("<HHI", *head) + value for *head, value in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + tags + b"\0\0\0\0"


TURNED = (0x0112, 3, 1, b"\x06\0\0\0")


@pytest.mark.parametrize(
    "malformed",
    [
        (0x011A, 2, 4, b"72 \0"),  # a resolution in words
        (0x011A, 10, 1, b"\xff\xff\xff\xff"),  # a fraction beyond the end
        (0x0100, 11, 1, struct.pack("<f", 40.5)),  # a width that is no whole number
        (0x8769, 4, 1, b"\xff\xff\xff\x7f"),  # a directory beyond the end
        (0x9286, 7, 1 << 30, b"\0\0\0\0"),  # a comment longer than the file
        (0x0131, 99, 1, b"\0\0\0\0"),  # a type that there is not
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_malformed_tags_cost_neither_pixels_nor_orientation(photo, format, malformed):
    image = photo(160, 120)
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(image, format, exif=exif_with(TURNED, malformed), **options)
    size, [(_, seen)] = see(data, [Preprocessing()], "whole_image")
    assert size == (120, 160)
    plain = decode(saved(image, format, **options)).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(plain))
    np.testing.assert_array_equal(seen, pixels(plain, View(0, 0, 120, 160), Preprocessing()))


@pytest.mark.parametrize("exif", [None, b"Exif\0\0no TIFF header at all"])
def test_xmp_orients_where_exif_does_not(photo, exif):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    options = {"exif": exif} if exif else {}
    assert decode(saved(photo(40, 20), "JPEG", xmp=xmp, **options)).size == (20, 40)


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content).to_bytes(4)
    return len(content).to_bytes(4) + name + content + checksum


def png_with(image: Image.Image, *chunks: bytes, at_end: bool = False, **options) -> bytes:
    data = saved(image, "PNG", **options)
    place = -12 if at_end else 33  # before IEND, or after IHDR
    return data[:place] + b"".join(chunks) + data[place:]


HUGE = zlib.compress(bytes(2_000_000))


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"iCCP", b"profile\0\0" + HUGE)],
        [chunk(b"zTXt", b"comment\0\0" + HUGE)],
        [chunk(b"iTXt", b"comment\0\1\0\0\0" + HUGE)],
        [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 70,
        [chunk(b"zTXt", b"comment\0\7" + HUGE)],  # compressed by no known method
        [chunk(b"gAMA", b"\0\0\xb1\x8f")[:-4] + b"oops"],  # a broken checksum
        [chunk(b"pHYs", b"")],
    ],
)
@pytest.mark.parametrize("at_end", [False, True])
def test_chunks_without_pixels_do_not_cost_them(photo, chunks, at_end):
    image = photo(40, 20)
    upright = png_with(image, *chunks, at_end=at_end)
    np.testing.assert_array_equal(np.asarray(decode(upright)), np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(png_with(image, *chunks, at_end=at_end, exif=exif)).size == (20, 40)
    xmp = chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<rdf tiff:Orientation="6"/>')
    assert decode(png_with(image, *chunks, xmp, at_end=at_end)).size == (20, 40)


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_that_is_none_does_not_cost_the_pixels_of_an_avif(photo, orientation):
    """Nor is it turned otherwise, as it has its orientation elsewhere."""
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = orientation, "somebody"
    buffer = io.BytesIO()
    photo(60, 40).save(buffer, "AVIF", exif=exif.tobytes())
    whole = buffer.getvalue()
    before, header, behind = whole.partition(b"II*\0" if b"II*\0" in whole else b"MM\0*")
    broken = before + b"\xff" * len(header) + behind
    with pytest.raises(ValueError, match=r"(?i)exif"):
        Image.open(io.BytesIO(broken))
    np.testing.assert_array_equal(np.asarray(decode(broken)), np.asarray(decode(whole)))
    assert decode(broken).size == ((40, 60) if orientation == 6 else (60, 40))


def test_a_palette_is_no_metadata(photo):
    image = photo(40, 20).convert("P")
    data = png_with(image, chunk(b"zTXt", b"comment\0\0" + HUGE), transparency=3)
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(image.convert("RGB")))


def tiff(samples: np.ndarray, sample_format: int) -> bytes:
    """A gray TIFF as simple as there is; formats are 1 for unsigned, 2 signed, 3 floats."""
    height, width = samples.shape
    bits, size = 8 * samples.itemsize, samples.nbytes
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 134)]
    tags += [(277, 1), (278, height), (279, size), (339, sample_format)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)
    return head + samples.tobytes()


@pytest.mark.parametrize(
    ("samples", "sample_format", "expected"),
    [
        (np.float32([0, 0.5, 1]), 3, [0, 128, 255]),
        (np.float32([0, 0.1, 0.2]), 3, [0, 26, 51]),  # dark, but of 1 all the same
        (np.float32([0, 100, 254]), 3, [0, 100, 254]),
        (np.float32([0, 25700, 65535]), 3, [0, 100, 255]),
        (np.uint16([0, 25700, 65535]), 1, [0, 100, 255]),
        (np.uint16([0, 257, 514]), 1, [0, 1, 2]),
        (np.int32([0, 100, 255]), 2, [0, 100, 255]),
        (np.uint32([0, 25700, 65535]), 1, [0, 100, 255]),
        (np.float32([0, 1, 7.5]), 3, "from 0 to 7.5"),
        (np.float32([-1, 0, 1]), 3, "from -1 to 1"),
        (np.float32([0, np.nan, 1]), 3, "nan"),
        (np.float32([0, 1, np.inf]), 3, "inf"),
        (np.int16([-1000, 0, 3000]), 2, "from -1000 to 3000"),
        (np.uint32([0, 1 << 20, 1 << 31]), 1, "convert it to 8 or 16 bits"),
        (np.int32([0, 3, 7]), 2, "from 0 to 7"),
        (np.float64([0, 0.5, 1]), 3, "unknown pixel mode"),
    ],
)
def test_samples_are_scaled_or_refused_but_never_black(samples, sample_format, expected):
    data = tiff(samples[None], sample_format)
    if isinstance(expected, list):
        assert np.asarray(decode(data))[0].tolist() == [[value] * 3 for value in expected]
    else:
        with pytest.raises(ImageError, match=expected) as raised:
            decode(data)
        assert raised.value.kind == "unsupported"


def test_a_pgm_says_what_is_white():
    data = b"P5 3 1 1023\n" + struct.pack(">3H", 0, 102, 204)
    # Of 1023; Pillow rounds them to 16 bits, of which 257 make one of 8.
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 25, 50]


def test_inverted_cmyk_is_not_inverted():
    image = Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK")
    data = saved(image, "JPEG", quality=100)
    assert b"Adobe" in data
    np.testing.assert_allclose(np.asarray(decode(data))[8, 8], (200, 60, 30), atol=2)


@pytest.mark.parametrize(
    ("format", "options", "difference"),
    [
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4),
        ("JPEG2000", {}, 0),
        ("PPM", {}, 0),
        ("TGA", {}, 0),
        ("TGA", {"compression": "tga_rle"}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
        ("TIFF", {"compression": "packbits"}, 0),
        ("TIFF", {"compression": "jpeg", "quality": 95}, 8),
        ("TIFF", {"big_tiff": True}, 0),
        ("HEIF", {"quality": 100, "chroma": 444}, 6),
    ],
)
def test_formats(photo, format, options, difference):
    if format == "HEIF":
        pillow_heif.register_heif_opener()
    image = photo(64, 48)
    found = np.asarray(decode(saved(image, format, **options))).astype(int)
    assert np.abs(found - np.asarray(image)).max() <= difference


@pytest.fixture
def heic(monkeypatch, photo) -> bytes:
    """A photo as a telephone takes it, and a Pillow that has seen none yet."""
    buffer = io.BytesIO()
    pillow_heif.from_pillow(photo(64, 48)).save(buffer, quality=100, chroma=444)
    Image.init()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    monkeypatch.setattr(Image, "OPEN", {name: Image.OPEN[name] for name in Image.ID})
    return buffer.getvalue()


def test_heic_is_learnt_when_it_is_met(heic, photo):
    found = np.asarray(decode(heic)).astype(int)
    assert np.abs(found - np.asarray(photo(64, 48))).max() <= 6
    with pytest.raises(ImageError, match="HEIF") as raised:
        decode(heic[:200])
    assert raised.value.kind == "corrupt"


def test_heic_without_its_plug_in_says_what_to_install(heic, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="pip install pillow-heif") as raised:
        decode(heic)
    assert raised.value.kind == "unsupported"


def test_a_heic_is_not_seen_by_its_thumbnail(heic, photo):
    pillow_heif.register_heif_opener()
    data = saved(photo(1200, 900), "HEIF", thumbnails=[600])
    size, [(view, seen)] = see(data, [Preprocessing()], "center_crop")
    assert size == (1200, 900)
    np.testing.assert_array_equal(seen, pixels(decode(data), view, Preprocessing()))


def test_formats_that_are_known_and_not_read_say_so():
    wmf = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 100, 100, 96)
    cases = {
        wmf.ljust(22, b"\0") + b"\1\0\t\0".ljust(60, b"\0"): "WMF",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n": "EPS",
        b"\x89HDF\r\n\x1a\n".ljust(100, b"\0"): "HDF5",
        b"\0\0\1\xb3\1\0\x10".ljust(50, b"\0"): "MPEG",
    }
    for data, name in cases.items():
        with pytest.raises(ImageError, match=f"{name} is not read") as raised:
            decode(data)
        assert raised.value.kind == "unsupported"


def test_a_broken_header_is_told_from_no_image(photo):
    data = bytearray(saved(photo(64, 48), "PNG"))
    data[30] ^= 1  # in the checksum of IHDR
    with pytest.raises(ImageError, match=r"begins as PNG: .*checksum in b.IHDR") as raised:
        decode(bytes(data))
    assert raised.value.kind == "corrupt"
    with pytest.raises(ImageError, match="begins as TIFF"):
        decode(b"II*\0" + bytes(40))


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
