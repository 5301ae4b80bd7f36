"""The end of the stream: images unfold into shards of explanations, failures into errors."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from scacam.errors import RunError
from scacam.pipeline.progress import taken_up
from scacam.storage import join, locate, patiently
from scacam.storage.parquet import write_table
from scacam.tables import ERRORS, unfolded

__all__ = ["ShardSink"]

_ENOUGH_TO_JUDGE = 100
_PLAIN = ("heatmap", "channel_contributions", "embedding")


class ShardSink(BlockBasedFileDatasink):
    """Writes one shard per task and folder, and one of errors if there are any.

    Every file is named after its task: a task that runs again overwrites its own files, and Ray
    Data's checkpoint finds the files of a task that was cut off.

    Attributes:
        errors: the folder of the errors.
    """

    errors = "errors"

    def __init__(
        self,
        output: str,
        map_shapes: dict[str, tuple[int, int]],
        tally: Any,
        max_error_rate: float,
        explained_before: int = 0,
        further: Sequence[str] = (),
    ) -> None:
        """Write below an output.

        Args:
            output: the run's folder or prefix.
            map_shapes: height and width of the heatmaps, by the folder of explanations.
            tally: the `progress.Tally` actor.
            max_error_rate: the share of errors among the images so far above which to give up.
            explained_before: images explained before, of a run whose errors are tried again.
            further: folders of predictions and embeddings.
        """
        filesystem, path = locate(output)
        super().__init__(path, filesystem=filesystem, file_format="parquet", try_create_dir=False)
        self.output = output
        self.map_shapes = map_shapes
        self.folders = [*map_shapes, *further]
        self.tally = tally
        self.max_error_rate = max_error_rate
        self.explained_before = explained_before

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """Write the blocks of one task.

        Raises:
            RunError: too many of the images so far are errors.
        """
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if len(table)]
        if not tables:
            return
        images = pa.concat_tables(tables)
        with taken_up(self.tally, "write", images):  # not before: taking blocks localizes them
            name = self.filename_provider.get_filename_for_task(
                ctx.kwargs["write_uuid"], ctx.task_idx
            )
            failed = images.filter(pc.is_valid(images["error"]))
            explained = images.filter(pc.is_null(images["error"]))
            errors = failed.select(ERRORS.names).cast(ERRORS)
            patiently(partial(self._write_shard, self.errors, name, errors))
            for folder in self.folders:
                rows = self.unfolded(explained, folder) if len(explained) else explained
                patiently(partial(self._write_shard, folder, name, rows))
        self._judge(ctx.task_idx, len(images), errors)

    def unfolded(self, images: pa.Table, folder: str) -> pa.Table:
        """The rows of some images that belong into a folder, from the column of that name."""
        return unfolded(images, folder, self.map_shapes)

    def _judge(self, shard: int, images: int, errors: pa.Table) -> None:
        """Give up on a run in which too much fails, before it has gone through all images."""
        failures = Counter(errors["error"].to_pylist())
        counts = ray.get(self.tally.write.remote(shard, images, failures))
        failed = counts.errors.total()
        enough = counts.written >= _ENOUGH_TO_JUDGE
        if enough and failed > self.max_error_rate * (counts.written + self.explained_before):
            kinds = counts.errors.most_common()
            examples = errors.filter(pc.equal(errors["error"], kinds[0][0])).slice(0, 1).to_pylist()
            raise RunError(
                f"{failed:,} of the first {counts.written:,} images failed, more than "
                f"--max-error-rate {self.max_error_rate:g} allows: "
                + ", ".join(f"{count:,} {kind}" for kind, count in kinds)
                + "".join(f" ({one['uri']}: {one['message']})" for one in examples)
                + "; --max-error-rate 1 goes on regardless, and --retry-errors tries the failed "
                "images again once the run is complete"
            )

    def _write_shard(self, folder: str, name: str, rows: pa.Table) -> None:
        path = join(self.output, folder, name)
        if len(rows):
            write_table(path, rows, plain=_PLAIN)
        else:  # an earlier attempt of this task may have had such rows
            filesystem, inner_path = locate(path)
            with suppress(FileNotFoundError):
                filesystem.delete_file(inner_path)
