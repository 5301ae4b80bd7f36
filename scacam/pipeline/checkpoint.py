"""Ray Data's checkpoint of a run: which images are done while it is under way.

It lies in `OUTPUT.checkpoint/` beside the output and not below it, where Ray Data cleans up files
by their names. Every worker loads this module with its context, so it must stay light.
"""

from typing import Any

import numpy as np
import ray
from pyarrow import fs
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import CheckpointManager

from scacam.runs.lifecycle import ID, checkpoint_path
from scacam.storage import locate, read_ahead
from scacam.storage.parquet import read_columns

__all__ = ["checkpoint"]


def checkpoint(output: str) -> CheckpointConfig:
    """Ray Data's checkpoint of this run, which `runs.complete` removes."""
    filesystem, path = locate(checkpoint_path(output))
    return CheckpointConfig(
        id_column=ID,
        checkpoint_path=path,
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=Checkpoint,
    )


class Checkpoint(CheckpointManager):
    """Loads a checkpoint of as many files as there are shards.

    Ray Data's own loader takes a thread per file, and ten million images have 20,000 of them.
    """

    def load_checkpoint(
        self,
        data_file_dir: str | None = None,
        data_file_filesystem: fs.FileSystem | None = None,
    ) -> tuple[Any, int]:
        """The sorted ids of the images that are done, as a reference, and how many bytes."""
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        selector = fs.FileSelector(self.checkpoint_path_unwrapped, allow_not_found=True)
        files = [info.path for info in self.filesystem.get_file_info(selector) if info.is_file]

        def read(path: str) -> np.ndarray:
            return read_columns(self.filesystem, path, [ID])[ID].to_numpy()

        parts = list(read_ahead(read, files))
        if not parts:
            return None, 0
        ids = np.sort(np.concatenate(parts))
        return ray.put(ids), ids.nbytes
