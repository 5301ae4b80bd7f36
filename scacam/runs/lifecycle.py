"""The life of a run: begun, continued, its errors retried, completed."""

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from pyarrow import fs

from scacam.errors import RunError
from scacam.inputs.manifest import Manifest, new_files
from scacam.inputs.sheets import SHEETS
from scacam.runs.proof import Proof, explained_ids
from scacam.runs.record import differences, read_record, write_record
from scacam.runs.shards import shards_of
from scacam.storage import join, locate
from scacam.storage.parquet import read_columns, write_table
from scacam.tables import ERRORS, MANIFEST, SHARDED, explanations_folder

__all__ = [
    "ID",
    "begin",
    "checkpoint_path",
    "complete",
    "listed_before",
    "refuse_output",
    "retry_errors",
]

logger = logging.getLogger("scacam")

ID = "image_id"
_CHECKPOINT = ".checkpoint"


def checkpoint_path(output: str) -> str:
    """The folder of the checkpoint of a run, below the output: it may be all one may write to."""
    return join(output, _CHECKPOINT)


def refuse_output(output: str) -> None:
    """Create the output if need be. Raises RunError if that cannot be done or it is foreign."""
    try:
        filesystem, path = locate(output)
        filesystem.create_dir(path, recursive=True)
        if read_record(output) is None:
            for name in SHARDED:
                if filesystem.get_file_info(join(path, name)).type != fs.FileType.NotFound:
                    raise RunError(
                        f"output {output} has {name} but no run.json: it holds something else; "
                        "choose another output"
                    )
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write to output {output}: {error}") from error


def listed_before(output: str, asked: Mapping[str, Any]) -> Manifest | None:
    """The images of the run that is there, if it was asked for the same; None if not.

    So a run continues with what it began with when its folder has grown; how much is new is told.
    A manifest of the user's own is to be read anew: it may say something else now.

    Args:
        output: the run's folder or prefix.
        asked: `input`, `limit` and what else decides its images, as `run.json` has it.

    Raises:
        RunError: the input is not there any more.
        OSError: the run's manifest cannot be read.
    """
    record = read_record(output)
    if record is None or asked["input"].lower().endswith(SHEETS):
        return None
    if any(key not in record or record[key] != value for key, value in asked.items()):
        return None
    filesystem, path = locate(join(output, "manifest.parquet"))
    table = read_columns(filesystem, path, MANIFEST.names).cast(MANIFEST)
    new = 0 if asked["limit"] is not None else new_files(asked["input"], table)
    if new:
        logger.warning(
            "%d files of %s are new and no part of the run in %s; explain them into another output",
            *(new, asked["input"], output),
        )
    return Manifest(table, record.get("left_out", {}))


def begin(output: str, record: dict[str, Any], manifest: pa.Table) -> dict[str, Any]:
    """Begin a run, or continue the one that is there.

    Args:
        output: the run's folder or prefix.
        record: what is wanted, as `run.json` will say it.
        manifest: its images.

    Returns:
        The record of the run that is now under way, or complete already.

    Raises:
        RunError: the output holds another run; says in what it differs. Nothing is changed.
    """
    existing = read_record(output)
    if existing is None:
        _forget_checkpoint(output)  # of a run whose output was deleted
        write_table(join(output, "manifest.parquet"), manifest)
        running = {"status": "running", "checkpoint": _CHECKPOINT, **record}
        write_record(output, running)
        return running
    told = differences(existing, record)
    if told:
        raise RunError(
            f"output {output} holds another run; choose another output. It differs in "
            + "; ".join(told[:5])
            + (f" and {len(told) - 5} more" if len(told) > 5 else "")
        )
    if existing["status"] == "complete":
        _forget_checkpoint(output)  # completing it was cut off before its last step
    elif "checkpoint" not in existing:
        raise RunError(
            f"the run in {output} was begun by a scacam that kept its checkpoint beside the "
            "output; complete it with that one, or choose another output"
        )
    if existing["status"] == "retrying":
        return _forget_errors(output, existing)
    return existing


def retry_errors(output: str, record: dict[str, Any]) -> dict[str, Any]:
    """Make the failed images of a run undone again, if `begin` found it complete.

    The job then continues it. A run that is not complete is to be continued as it is: that may be
    this very retry, which was cut off.
    """
    if record["status"] == "running":
        return record
    retrying = {**record, "status": "retrying", "checkpoint": _CHECKPOINT}
    write_record(output, retrying)
    return _forget_errors(output, retrying)


def _forget_errors(output: str, record: dict[str, Any]) -> dict[str, Any]:
    """Can be cut off anywhere and done again, as long as the record says `retrying`."""
    _forget_checkpoint(output)
    filesystem, _ = locate(output)
    first = record["networks"][0]
    done = explained_ids(output, explanations_folder(first["name"], next(iter(first["layers"]))))
    write_table(join(checkpoint_path(output), "explained.parquet"), pa.table({ID: done}))
    for shard in shards_of(output, "errors"):
        filesystem.delete_file(shard.path)
    running = {**record, "status": "running"}
    write_record(output, running)
    return running


def complete(output: str, record: dict[str, Any], proof: Proof) -> None:
    """Write the index, mark the run complete, and only then forget the checkpoint.

    Without errors their table is empty, but it is there: queries need not ask.
    """
    if not proof.errors:
        write_table(join(output, "errors/none.parquet"), ERRORS.empty_table())
    write_table(join(output, "index.parquet"), proof.index)
    write_record(output, record)
    _forget_checkpoint(output)


def _forget_checkpoint(output: str) -> None:
    filesystem, path = locate(checkpoint_path(output))
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)
