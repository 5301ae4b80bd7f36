"""Ray Data's checkpoint of a run: which images are done while it is under way.

It lies in `OUTPUT/.checkpoint/`, so that a role that may write nothing but the output suffices.
Every worker loads this module with its context, so it must stay light.
"""

from typing import Any

import numpy as np
import ray
from pyarrow import fs
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import CheckpointManager

from scacam.runs.lifecycle import ID, checkpoint_path
from scacam.storage import join, locate, read_ahead
from scacam.storage.parquet import read_columns

__all__ = ["checkpoint"]

_PENDING = ".pending.parquet"


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

    folders = ("explanations", "errors")

    def load_checkpoint(
        self,
        data_file_dir: str | None = None,
        data_file_filesystem: fs.FileSystem | None = None,
    ) -> tuple[Any, int]:
        """The sorted ids of the images that are done, as a reference, and how many bytes."""
        selector = fs.FileSelector(self.checkpoint_path, allow_not_found=True)
        files = [info.path for info in self.filesystem.get_file_info(selector) if info.is_file]
        pending = [path for path in files if path.endswith(_PENDING)]
        done = [path for path in files if not path.endswith(_PENDING)]
        if data_file_dir is not None:
            self._undo(pending, done, data_file_dir)

        def read(path: str) -> np.ndarray:
            return read_columns(self.filesystem, path, [ID])[ID].to_numpy()

        parts = list(read_ahead(read, done))
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


def _name(path: str) -> str:
    return path.rpartition("/")[2]
