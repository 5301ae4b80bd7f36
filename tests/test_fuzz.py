"""Broken bytes of every kind: decoding either gives pixels or an ImageError, and stays small."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import most_held
from PIL import Image

from scacam.errors import ImageError
from scacam.images import Preprocessing, see

FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA"]
LIMIT = 300_000_000
"""Bytes. Broken sizes may be large ones, up to Pillow's limit; those here are not."""


def seen_and_peak(data: bytes) -> tuple[Any, int]:
    """What is seen of an image, or why not, and the most memory that this process ever had."""
    try:
        found = see(data, [Preprocessing()], "center_crop")
    except ImageError as error:
        found = error
    return found, most_held()


@pytest.fixture
def decoded() -> Iterator[Callable[[bytes], tuple[Any, int]]]:
    """`seen_and_peak` in a process that does nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        yield lambda data: child.submit(seen_and_peak, data).result()


@pytest.mark.parametrize("format", FORMATS)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_mutated_files(photo, decoded, format, data):
    buffer = io.BytesIO()
    photo(64, 48, 1).save(buffer, format)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 12))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(1, len(content)))
    found, peak = decoded(bytes(content[:end]))
    assert peak < LIMIT
    if isinstance(found, ImageError):
        assert found.kind in {"corrupt", "not_an_image", "too_large", "unsupported"}
        assert str(found)
        return
    _, [(_, seen)] = found
    assert seen.shape == (224, 224, 3)
    assert seen.dtype == np.uint8


def test_a_file_that_takes_much_memory_is_noticed(decoded):
    buffer = io.BytesIO()
    Image.new("L", (10_000, 9_000)).save(buffer, "PNG")
    found, peak = decoded(buffer.getvalue())
    assert not isinstance(found, ImageError)
    assert peak > LIMIT
