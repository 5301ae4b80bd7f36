"""What the stages of the explain job pass on: one row per image, all the way.

A stage takes a table and returns it with more columns. What goes wrong with an image is written
into its row (`stage`, `error`, `message`), and the later stages pass it by. What a network says of
an image are lists of numbers, in the columns of `said`, none of an image that has failed. The stage
after the networks turns them into lists of structs as in `EXPLANATION` or `PREDICTION`, in columns
that are called as the folders in which these will be stored (`scacam.tables`).
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from scacam.images import Preprocessing

__all__ = [
    "SAID",
    "Failure",
    "bytes_per_image",
    "list_column",
    "said",
    "sampling_of",
    "set_failures",
    "tensors",
]

SAID = {
    "class_id": pa.int32(),
    "probability": pa.float32(),
    "logit": pa.float32(),
    "channel_ids": pa.int16(),
    "channel_contributions": pa.float16(),
    "channel_cells": pa.int16(),
}
"""What a network says of the K classes of an image beside its maps: `[K]`, of channels `[K, M]`."""


class Failure(NamedTuple):
    """Why an image cannot be explained: the stage it failed in, the kind of error, a message."""

    stage: str
    error: str
    message: str


def sampling_of(preprocessing: Preprocessing) -> Preprocessing:
    """The part of a preprocessing that decides the pixels: networks that share it share them."""
    channels = preprocessing.channels
    return replace(preprocessing, mean=(0.0,) * channels, std=(1.0,) * channels)


def bytes_per_image(samplings: Iterable[Preprocessing]) -> int:
    """Of its pixels in all these samplings, which is nearly all that a row has."""
    return sum(math.prod(one.crop_size) * one.channels for one in samplings)


def said(network: str, what: str) -> str:
    """The column of what a network says: a key of `SAID`, or a layer for its maps.

    Those are float32 `[K, methods, h, w]`, raw.
    """
    return f"{network} says {what}"


def set_failures(batch: pa.Table, failures: dict[int, Failure]) -> pa.Table:
    """Add failures by row to those that the batch has already."""
    for index, name in enumerate(Failure._fields):
        if name in batch.column_names:
            values = batch[name].to_pylist()
            batch = batch.drop_columns([name])
        else:
            values = [None] * len(batch)
        for row, failure in failures.items():
            values[row] = failure[index]
        batch = batch.append_column(name, pa.array(values, pa.string()))
    return batch


def tensors(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-shape tensors as one array `[rows, ...]`, without a copy if it can be."""
    chunks = [chunk.to_numpy_ndarray() for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def list_column(parts: list[pa.Array], lengths: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """Values of a type, in row order, as one list per row, given how many each row has."""
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    values = pa.concat_arrays(parts) if parts else pa.array([], kind)
    return pa.ListArray.from_arrays(offsets, values)
