"""Broken bytes of every kind: decoding either gives pixels or an ImageError, and stays small."""

import io
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scacam.errors import ImageError
from scacam.images import Preprocessing, see

FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]


@pytest.mark.parametrize("format", FORMATS)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_mutated_files(photo, format, data):
    buffer = io.BytesIO()
    photo(64, 48, 1).save(buffer, format)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 12))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(1, len(content)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = None
    try:
        _, [(_, seen)] = see(bytes(content[:end]), [Preprocessing()], "center_crop")
    except ImageError as error:
        refused = error
    if refused:
        assert refused.kind in {"corrupt", "not_an_image", "too_large"}
        assert str(refused)
        return
    assert seen.shape == (224, 224, 3)
    assert seen.dtype == np.uint8
    # Pillow's limit is 179 million pixels; nothing here comes near it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3_000_000
