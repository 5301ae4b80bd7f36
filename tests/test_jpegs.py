"""JPEGs decoded many at a time: as one by one by Pillow, and whatever is odd is left to it."""

import io
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from test_stages import failures, manifest

from scacam.images import Preprocessing, see
from scacam.images.jpegs import plain_jpeg, see_together
from scacam.pipeline.progress import Held
from scacam.pipeline.stages import decode
from scacam.pipeline.stages.decode import Decode, DecodeOnGpu
from scacam.pipeline.stages.rows import tensors

CPU = torch.device("cpu")
GRAY = Preprocessing((112, 96), 100, "bilinear", (0.5,), (0.5,))
SAMPLINGS = [Preprocessing(), Preprocessing((240, 240), 272, "bicubic"), GRAY]
SMALL = Preprocessing((32, 32), 32)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def detailed(photo, width: int, height: int) -> Image.Image:
    """A photo with edges and grain, so that a shift of half a pixel shows."""
    image = np.asarray(photo(width, height)).astype(int)
    image[:, ::37] //= 2
    image[::23] = 255 - image[::23]
    grain = np.random.default_rng(0).normal(0, 8, image.shape)
    return Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("view", ["center_crop", "whole_image"])
@pytest.mark.parametrize("options", [{}, {"subsampling": "4:4:4"}, {"progressive": True}])
def test_what_is_seen_together_is_what_is_seen_one_by_one(photo, options, view):
    """But for what lies between two whole numbers, which Pillow rounds in fixed point."""
    sizes = [(500, 375), (375, 500), (227, 227), (333, 257), (100, 81), (640, 101), (1023, 768)]
    files = [jpeg(detailed(photo, *size), **options) for size in sizes]
    files.append(jpeg(detailed(photo, 301, 199).convert("L")))
    plain = [plain_jpeg(data) for data in files]
    assert all(plain)
    found = see_together([one for one in plain if one], SAMPLINGS, view, CPU)
    assert [one.is_gray for one in plain if one] == [False] * 7 + [True]
    for data, (size, looks) in zip(files, found, strict=True):
        expected_size, expected = see(data, SAMPLINGS, view)
        assert size == expected_size
        for (rectangle, pixels), (expected_rectangle, seen) in zip(looks, expected, strict=True):
            assert rectangle == expected_rectangle
            assert (pixels.shape, pixels.dtype) == (seen.shape, seen.dtype)
            difference = np.abs(pixels.astype(int) - seen)
            assert difference.max() <= 1
            assert difference.mean() < 0.02


def test_a_large_jpeg_is_decoded_whole(photo):
    """Which `see` spares itself; they differ by what that costs in faithfulness."""
    data = jpeg(photo(2501, 2050), quality=90)
    plain = plain_jpeg(data)
    assert plain
    [(size, [(rectangle, pixels)])] = see_together([plain], [Preprocessing()], "center_crop", CPU)
    expected_size, [(expected_rectangle, seen)] = see(data, [Preprocessing()], "center_crop")
    assert (size, rectangle) == (expected_size, expected_rectangle)
    difference = np.abs(pixels.astype(int) - seen)
    assert difference.max() <= 3
    assert difference.mean() < 0.4


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def odd(photo) -> dict[str, bytes]:
    """Files that are no plain JPEGs, by what they are."""
    image = photo(64, 48)
    whole = jpeg(image)
    buffer = io.BytesIO()
    image.save(buffer, "MPO", save_all=True, append_images=[image])
    png = io.BytesIO()
    image.save(png, "PNG")
    return {
        "empty": b"",
        "HTML": b"<html>\xff\xd9",
        "PNG": png.getvalue(),
        "MPO": buffer.getvalue(),
        "turned": jpeg(image, exif=exif(6)),
        "turned by XMP": jpeg(image, xmp=b'<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>'),
        "CMYK": jpeg(image.convert("CMYK")),
        "RGB": jpeg(image, keep_rgb=True),
        "cut off": whole[: len(whole) // 2],
        "cut off, and ended": whole[:20] + b"\xff\xd9",
        "long": jpeg(photo(900, 100)),
        "large": jpeg(Image.new("L", (7000, 5000))),
    }


def test_what_is_odd_is_left_to_pillow(photo):
    assert plain_jpeg(jpeg(photo(64, 48), exif=exif(1)))
    assert plain_jpeg(jpeg(photo(800, 100)))
    assert [name for name, data in odd(photo).items() if plain_jpeg(data)] == []


def broken(image: Image.Image) -> bytes:
    """A JPEG with whole ends, and in between a table of Huffman codes that cannot be."""
    data = bytearray(jpeg(image))
    start = data.index(b"\xff\xc4") + 5
    data[start : start + 16] = b"\xff" * 16
    return bytes(data)


@pytest.fixture
def mixed(tmp_path, photo) -> list[str]:
    """Plain JPEGs among all that is odd, one that is broken inside, and one that is not there."""
    contents = dict(odd(photo), broken=broken(photo(60, 40)))
    for index in range(5):
        contents[f"{index * 3} plain"] = jpeg(photo(200 + index, 150, index))
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return sorted(str(tmp_path / name) for name in [*contents, "none"])


def assert_alike(found: pa.Table, expected: pa.Table, most: int) -> None:
    """The same block, but that pixels may differ by so much."""
    assert found.column_names == expected.column_names
    for name in expected.column_names:
        if name.startswith("pixels"):
            both = (tensors(block[name]).astype(int) for block in (found, expected))
            assert np.abs(np.subtract(*both)).max() <= most
        else:
            assert found[name].equals(expected[name]), name


@pytest.mark.parametrize("together", [1, 2, 128])
def test_a_block_decoded_together_is_the_same_block(mixed, monkeypatch, together):
    """Which of two stages decoded it shows in no column, errors and their words least of all."""
    monkeypatch.setattr(decode, "_TOGETHER", together)
    block = manifest(mixed)
    found = DecodeOnGpu([SMALL, GRAY], "center_crop", None)(block)
    expected = Decode([SMALL, GRAY], "center_crop", None)(block)
    assert_alike(found, expected, most=1)
    names = [Path(uri).name for uri in mixed]
    failed = {names[row]: how for row, how in failures(found).items()}
    assert failed["none"] == ("read", "missing")
    assert failed["broken"] == ("decode", "corrupt")
    assert failed["cut off"] == ("decode", "corrupt")
    assert not [name for name in failed if "plain" in name]


def test_what_raises_together_is_tried_in_halves(mixed, monkeypatch):
    """So the one that is to blame is found, and Pillow decodes that alone."""
    tried = []

    def noted(files, *others):
        tried.append([names[file.data] for file in files])
        return see_together(files, *others)

    names = {path.read_bytes(): path.name for path in map(Path, mixed) if path.exists()}
    monkeypatch.setattr(decode, "see_together", noted)
    DecodeOnGpu([SMALL], "center_crop", None)(manifest(mixed))
    zero, twelve, three, six, nine = (f"{index} plain" for index in (0, 12, 3, 6, 9))
    assert tried == [
        [zero, twelve, three, six, nine, "broken"],
        *([zero, twelve, three], [six, nine, "broken"]),
        *([six], [nine, "broken"], [nine], ["broken"]),
    ]


def test_the_pixels_that_are_decoded_at_once_are_bounded(mixed, monkeypatch):
    monkeypatch.setattr(decode, "_PIXELS_TOGETHER", 70_000)  # of two of 200 × 150
    areas = []

    def noted(files, *others):
        areas.append([file.width * file.height for file in files])
        return see_together(files, *others)

    monkeypatch.setattr(decode, "see_together", noted)
    plain = [uri for uri in mixed if "plain" in uri]
    DecodeOnGpu([SMALL], "center_crop", None)(manifest(plain))
    assert [len(batch) for batch in areas] == [2, 2, 1]
    assert max(map(sum, areas)) <= 70_000


def test_a_lost_gpu_is_no_reason_to_decode_without_one(mixed, monkeypatch):
    """As with networks: without Ray nobody starts another process, so it is raised."""

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(decode, "see_together", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        DecodeOnGpu([SMALL], "center_crop", None)(manifest(mixed))


def test_a_block_that_a_process_died_of_is_decoded_apart(mixed, monkeypatch):
    @contextmanager
    def after_a_death(*_):
        yield [Held("decode", 0, "node")]

    block = manifest([uri for uri in mixed if "plain" in uri or "cut off" in uri])
    expected = Decode([SMALL], "center_crop", None)(block)
    monkeypatch.setattr(decode, "taken_up", after_a_death)
    monkeypatch.setattr(decode, "see_together", None)
    assert_alike(DecodeOnGpu([SMALL], "center_crop", None)(block), expected, most=0)
