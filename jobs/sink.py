"""The end of the stream: images unfold into shards of explanations, failures into errors."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink, WriteResult
from stages import explanations_column

from scacam.storage import join, locate
from scacam.tables import ERRORS, explanations

__all__ = ["ShardSink", "Written"]


class Written(NamedTuple):
    """What was written: images with explanations, and images with errors by kind."""

    explained: int
    errors: Counter[str]


class ShardSink(BlockBasedFileDatasink):
    """Writes one shard per task and network, and one of errors if there are any.

    Every file is named after its task, so that a task that runs again overwrites its own files.
    """

    def __init__(self, output: str, map_shapes: dict[str, tuple[int, int]]) -> None:
        """Write below `output`; `map_shapes` has height and width of the maps by network."""
        filesystem, path = locate(output)
        super().__init__(path, filesystem=filesystem, file_format="parquet")
        self.map_shapes = map_shapes
        self.written = Written(0, Counter())

    def write(self, blocks: Iterable[Block], ctx: object) -> Written:  # type: ignore[override]
        """Write the blocks of one task."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        images = pa.concat_tables(table for table in tables if len(table))
        task = ctx.kwargs["write_uuid"], ctx.task_idx  # type: ignore[attr-defined]
        name = self.filename_provider.get_filename_for_task(*task)
        failed = images.filter(pc.is_valid(images["error"]))
        if len(failed):
            self._write_shard("errors", name, failed.select(ERRORS.names).cast(ERRORS))
        explained = images.filter(pc.is_null(images["error"]))
        if len(explained):
            for network, shape in self.map_shapes.items():
                lists = explained[explanations_column(network)].combine_chunks()
                rows = explanations(explained, lists, shape)
                self._write_shard(f"explanations/network={network}", name, rows)
        return Written(len(explained), Counter(failed["error"].to_pylist()))

    def _write_shard(self, folder: str, name: str, rows: pa.Table) -> None:
        path = join(self.path, folder)
        self.filesystem.create_dir(path, recursive=True)
        with self.open_output_stream(join(path, name)) as file:
            pyarrow.parquet.write_table(rows, file, compression="zstd")

    def on_write_complete(self, write_result: WriteResult[Written]) -> None:  # type: ignore[override]
        """Add up what the tasks wrote."""
        returns: Sequence[Written] = write_result.write_returns
        for part in returns:
            self.written = Written(
                self.written.explained + part.explained, self.written.errors + part.errors
            )
