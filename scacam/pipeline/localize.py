"""The stage after the networks: the peak and the box of every heatmap, on CPU workers."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.localization import localize
from scacam.pipeline.progress import taken_up
from scacam.pipeline.rows import Failure, list_column, set_failures
from scacam.tables import EXPLANATION, stacked, unpack_heatmaps

__all__ = ["Localize"]

_LOCATION = EXPLANATION.names[-6:]


@dataclass(frozen=True)
class Localize:
    """Fills in `peak_x` to `box_y1` of all explanations."""

    input_sizes: dict[str, tuple[int, int]]
    """Height and width of the network's input, by the column of explanations."""
    rectified: Collection[str]
    """The methods that apply a ReLU before they localize."""
    tally: Any

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fill in the locations of one block."""
        if not len(batch):
            return batch
        with taken_up(self.tally, "localize", batch):
            try:
                return self._localized(batch)
            except Exception:  # some image's map raises; the others have no part in it
                return self._one_by_one(batch)

    def _localized(self, batch: pa.Table) -> pa.Table:
        for name, input_size in self.input_sizes.items():
            lists = batch[name].combine_chunks()
            rows = pa.Table.from_struct_array(lists.flatten())
            if not len(rows):
                continue
            rows = _located(rows, input_size, self.rectified)
            structs = rows.cast(EXPLANATION).to_struct_array().chunks
            column = list_column(structs, lists.value_lengths().to_numpy())
            batch = batch.set_column(batch.schema.get_field_index(name), name, column)
        return batch

    def _one_by_one(self, batch: pa.Table) -> pa.Table:
        images: list[pa.Table] = []
        failures: dict[int, Failure] = {}
        for row in range(len(batch)):
            image = batch.slice(row, 1)
            try:
                image = self._localized(image)
            except Exception as error:
                if not image["error"][0].is_valid:  # else an earlier stage has said why
                    message = f"{type(error).__name__}: {error}"
                    failures[row] = Failure("localize", "failed", message)
            images.append(image)
        return set_failures(pa.concat_tables(images), failures)


def _located(rows: pa.Table, input_size: tuple[int, int], rectified: Collection[str]) -> pa.Table:
    shape = (rows["map_height"][0].as_py(), rows["map_width"][0].as_py())
    packed = rows["heatmap"].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
    heatmaps = unpack_heatmaps(packed, rows["scale"].to_numpy())
    relu = pc.is_in(rows["method"], pa.array(list(rectified), pa.string())).to_numpy()
    views = stacked(rows, EXPLANATION.names[:4])
    peaks, boxes = localize(heatmaps, relu, views, input_size)
    for name, values in zip(_LOCATION, np.concatenate([peaks, boxes], axis=1).T, strict=True):
        column = pa.array(values, pa.float32(), mask=np.isnan(values))
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows
