"""What the stages of the explain job pass on."""

import numpy as np
import pyarrow as pa

from scacam.pipeline.stages.rows import tensors


def column_of(*arrays: np.ndarray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(one) for one in arrays])


def test_a_column_in_one_piece_is_not_copied():
    pixels = np.arange(24, dtype=np.uint8).reshape(3, 2, 2, 2)
    found = tensors(column_of(pixels))
    assert np.array_equal(found, pixels)
    assert np.shares_memory(found, pixels)


def test_a_column_in_pieces_keeps_its_order():
    pixels = np.arange(24, dtype=np.uint8).reshape(3, 2, 2, 2)
    assert np.array_equal(tensors(column_of(pixels[:1], pixels[1:])), pixels)
