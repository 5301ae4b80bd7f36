"""The images of a run, from its manifest, and Ray Data's checkpoint of those that are done.

The checkpoint lies in `OUTPUT/.checkpoint/`, so that a role that may write nothing but the output
suffices. Every worker loads this module with its context, so it must stay light.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pyarrow import fs
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import CheckpointManager
from ray.data.datasource import Datasource, ReadTask

from scacam.runs.lifecycle import ID, checkpoint_path
from scacam.storage import join, locate, read_ahead
from scacam.storage.parquet import read_columns
from scacam.tables import SHARDED

__all__ = ["checkpoint", "done_before", "images_of"]

_PENDING = ".pending.parquet"
_ROWS_AT_ONCE = 1 << 16


def images_of(output: str, num_cpus: float, images: int, rows: int) -> ray.data.Dataset:
    """The rows of a run's manifest that its checkpoint does not have, so many per block.

    Args:
        output: the run.
        num_cpus: what each task reserves that reads them.
        images: how many the manifest has.
        rows: per block.
    """
    # Ray would read into two blocks per CPU at least, and an empty one, too, is a task per stage.
    most = ray.data.DataContext.get_current().read_op_min_num_blocks
    blocks = min(math.ceil(images / rows), most)
    stream = ray.data.read_datasource(
        ManifestSource(output), num_cpus=num_cpus, override_num_blocks=blocks
    )
    return stream.repartition(target_num_rows_per_block=rows)


class ManifestSource(Datasource):
    """The manifest of a run, a task for each of its row groups.

    Ray Data's own reader of Parquet lists files and footers in actors, and a job whose node is lost
    with one of these does not survive it.
    """

    def __init__(self, output: str) -> None:
        """Look at the manifest's footer."""
        super().__init__()
        self.output = output
        filesystem, path = locate(join(output, "manifest.parquet"))
        with filesystem.open_input_file(path) as file:
            footer = pq.read_metadata(file)
        self.groups = [footer.row_group(group) for group in range(footer.num_row_groups)]

    def estimate_inmemory_data_size(self) -> int:
        """As Ray asks for it, in bytes."""
        return sum(group.total_byte_size for group in self.groups)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """As Ray asks for them, whatever it would like their number to be."""
        return [
            ReadTask(
                partial(_read_group, self.output, index),
                BlockMetadata(group.num_rows, group.total_byte_size, None, None),
            )
            for index, group in enumerate(self.groups)
        ]


def _read_group(output: str, group: int) -> Iterator[pa.Table]:
    filesystem, path = locate(join(output, "manifest.parquet"))
    with filesystem.open_input_file(path) as file:
        manifest = pq.ParquetFile(file)
        for batch in manifest.iter_batches(_ROWS_AT_ONCE, row_groups=[group]):
            yield pa.Table.from_batches([batch])


def checkpoint(output: str, manager: "type[Checkpoint] | None" = None) -> CheckpointConfig:
    """Ray Data's checkpoint of this run, which `runs.complete` removes; loaded by a manager."""
    filesystem, path = locate(checkpoint_path(output))
    return CheckpointConfig(
        id_column=ID,
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=manager or Checkpoint,
    )


class Checkpoint(CheckpointManager):
    """Loads a checkpoint of as many files as there are shards.

    Ray Data's own loader takes a thread per file, and ten million images have 20,000 of them; and
    its clean-up would take the checkpoint below the output for shards.

    Attributes:
        folders: where the shards are, below what the sink writes to.
    """

    folders: tuple[str, ...] = SHARDED

    def load_checkpoint(
        self,
        data_file_dir: str | None = None,
        data_file_filesystem: fs.FileSystem | None = None,
    ) -> tuple[Any, int]:
        """The sorted ids of the images that are done, as a reference, and how many bytes."""
        pending, done = _files(self.filesystem, self.checkpoint_path)
        if data_file_dir is not None:
            self._undo(pending, done, data_file_dir)
        parts = list(_ids(self.filesystem, done))
        if not parts:
            return None, 0
        ids = np.sort(np.concatenate(parts))
        return ray.put(ids), ids.nbytes

    def _undo(self, pending: list[str], done: list[str], output: str) -> None:
        """Delete the shards of the tasks that were cut off, and only then what tells of them.

        On a store a commit is a copy and a deletion: of a task cut off in between, both files are
        there, and its shards are whole.
        """
        whole = {_name(path) for path in done}
        cut_off = {_name(path).replace(_PENDING, ".parquet") for path in pending} - whole
        for folder in self.folders if cut_off else ():
            selector = fs.FileSelector(join(output, folder), allow_not_found=True, recursive=True)
            for info in self.filesystem.get_file_info(selector):
                if info.is_file and info.base_name in cut_off:
                    self.filesystem.delete_file(info.path)
        for path in pending:
            self.filesystem.delete_file(path)


def done_before(output: str) -> int:
    """How many images of a run are done before it is continued."""
    filesystem, path = locate(checkpoint_path(output))
    _, done = _files(filesystem, path)
    return sum(map(len, _ids(filesystem, done)))


def _files(filesystem: fs.FileSystem, path: str) -> tuple[list[str], list[str]]:
    """The files of a checkpoint: of tasks that were cut off, and of those that are done."""
    selector = fs.FileSelector(path, allow_not_found=True)
    files = [info.path for info in filesystem.get_file_info(selector) if info.is_file]
    pending = [path for path in files if path.endswith(_PENDING)]
    return pending, [path for path in files if not path.endswith(_PENDING)]


def _ids(filesystem: fs.FileSystem, done: list[str]) -> Iterator[np.ndarray]:
    return read_ahead(lambda path: read_columns(filesystem, path, [ID])[ID].to_numpy(), done)


def _name(path: str) -> str:
    return path.rpartition("/")[2]
