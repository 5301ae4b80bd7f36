"""The images of a run, read from its manifest as far as they are asked for."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scacam.errors import RunError
from scacam.inputs.containers import Place
from scacam.storage import join, locate

__all__ = ["Images"]

_AT_ONCE = 1 << 16
_BUFFER = 1 << 22


class Images:
    """The manifest of a run, of which a piece at a time is in memory.

    The id of an image is its row there, so what is known of some images is found by counting.
    """

    def __init__(self, output: str) -> None:
        """Nothing is read yet."""
        self.path = join(output, "manifest.parquet")

    @cached_property
    def count(self) -> int:
        """How many images there are."""
        with self._opened() as manifest:
            return int(manifest.metadata.num_rows)

    @cached_property
    def labelled(self) -> bool:
        """Whether any has a label."""
        with self._opened() as manifest:
            batches = manifest.iter_batches(_AT_ONCE, columns=["label"])
            return any(pc.any(pc.greater_equal(each["label"], 0)).as_py() for each in batches)

    def rows(self, image_ids: Collection[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """What the manifest has of some images, one row each, by rising id.

        Args:
            image_ids: of the images; each counts once.
            columns: only these, as far as the manifest has them.
        """
        ids = np.unique(np.fromiter(image_ids, dtype=np.int64, count=len(image_ids)))
        found = []
        with self._opened() as manifest:
            schema = manifest.schema_arrow
            names = [name for name in columns if name in schema.names]
            end = 0
            for group in range(manifest.num_row_groups):
                first, end = end, end + manifest.metadata.row_group(group).num_rows
                if not len(_within(ids, first, end)):
                    continue
                for batch in manifest.iter_batches(_AT_ONCE, [group], names):
                    wanted = _within(ids, first, first + len(batch))
                    if len(wanted):
                        found.append(batch.take(pa.array(wanted - first)))
                    first += len(batch)
        empty = pa.schema([schema.field(name) for name in names]).empty_table()
        return pa.Table.from_batches(found) if found else empty

    def places(self, image_ids: Collection[int]) -> dict[int, Place]:
        """Where some images are, in their containers as far as the manifest knows, by their ids."""
        rows = self.rows(image_ids, ["image_id", *Place._fields]).to_pylist()
        return {row["image_id"]: Place(*(row.get(name) for name in Place._fields)) for row in rows}

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        filesystem, path = locate(self.path)
        try:
            with filesystem.open_input_file(path) as file:
                yield pq.ParquetFile(file, buffer_size=_BUFFER)
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"cannot read {self.path}: {error}") from error


def _within(ids: np.ndarray, first: int, end: int) -> np.ndarray:
    """Those of the rising ids that lie in a range."""
    return ids[slice(*np.searchsorted(ids, [first, end]))]
