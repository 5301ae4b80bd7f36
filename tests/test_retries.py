"""`--retry-errors` and completion, cut off at every step and continued."""

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scacam.jobs.command import run_job
from scacam.runs import lifecycle
from scacam.runs.proof import prove
from scacam.runs.record import write_record
from scacam.tables import ERRORS, SCHEMA_VERSION, explanations_folder

STEPS = ("write_record", "write_table", "shards_of", "_forget_checkpoint")
"""What the life of a run consists of; `shards_of` comes just before files are deleted."""

EXPLAINED, FAILED = [0, 1, 3, 5], [2, 4]
RECORD = {
    "schema_version": SCHEMA_VERSION,
    "images": 6,
    "networks": [{"name": "n", "output_kind": "softmax", "layers": {"l": {"methods": ["m"]}}}],
    "versions": {"scacam": "0"},
    "explained": 4,
    "checkpoint": ".checkpoint",
}
MANIFEST = pa.table({lifecycle.ID: range(6)})


class Cut(BaseException):
    """Passes whatever catches errors, as the end of the process does."""


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Lets so many steps happen and cuts off the next one; None for all."""
    allowed: list[int | None] = [None]

    def counted(step: Callable[..., Any], *arguments: Any) -> Any:
        if allowed[0] == 0:
            raise Cut
        if allowed[0] is not None:
            allowed[0] -= 1
        return step(*arguments)

    for name in STEPS:
        monkeypatch.setattr(lifecycle, name, partial(counted, getattr(lifecycle, name)))
    return lambda steps: allowed.__setitem__(0, steps)


def made_run(output: Path, status: str) -> None:
    """As many rows as a proof reads, and a checkpoint that has all of them as done."""
    shards = output / explanations_folder("n", "l")
    shards.mkdir(parents=True)
    (output / "errors").mkdir()
    columns = {"image_id": EXPLAINED, "class_id": [1] * 4, "method": ["m"] * 4}
    pq.write_table(pa.table(columns), shards / "a.parquet")
    for image in FAILED:
        row = dict.fromkeys(ERRORS.names, "x") | {"image_id": image}
        pq.write_table(pa.Table.from_pylist([row], ERRORS), output / "errors" / f"{image}.parquet")
    write_record(str(output), RECORD | {"status": status})
    leave_checkpoint(output)


def leave_checkpoint(output: Path) -> None:
    folder = Path(lifecycle.checkpoint_path(str(output)))
    folder.mkdir()
    pq.write_table(pa.table({lifecycle.ID: range(6)}), folder / "left.parquet")


def failed(output: Path) -> list[int]:
    return sorted(pd.read_parquet(output / "errors")["image_id"])


def state(output: Path) -> tuple[list[int] | None, list[int]]:
    """What is done by the checkpoint, and what has failed by the errors."""
    folder = Path(lifecycle.checkpoint_path(str(output)))
    done = sorted(pd.read_parquet(folder)[lifecycle.ID]) if folder.exists() else None
    shards = (output / "errors").glob("*.parquet")
    return done, sorted(image for path in shards for image in pd.read_parquet(path)["image_id"])


def begin(output: Path, *, retry: bool) -> dict[str, Any]:
    record = lifecycle.begin(str(output), RECORD, MANIFEST)
    return lifecycle.retry_errors(str(output), record) if retry else record


def test_a_retry_cut_off_at_every_step(tmp_path, cut_after):
    """It begins with what the last steps of a completion have left, and is continued either way."""
    for steps in count():
        again, without = tmp_path / f"{steps} again", tmp_path / f"{steps} without"
        for output in (again, without):
            made_run(output, "complete")
            cut_after(steps)
            try:
                begin(output, retry=True)
                cut = False
            except Cut:
                cut = True
            cut_after(None)
        assert begin(again, retry=True)["status"] == "running"
        assert state(again) == (EXPLAINED, [])
        if begin(without, retry=False)["status"] == "complete":
            assert state(without) == (None, FAILED)
        else:
            assert state(without) == (EXPLAINED, [])
        if not cut:
            break
    assert steps > 5


def test_a_completion_cut_off_at_every_step(tmp_path, cut_after):
    for steps in count():
        output = tmp_path / str(steps)
        made_run(output, "running")
        proof = prove(str(output), RECORD["networks"], 6)
        cut_after(steps)
        try:
            lifecycle.complete(str(output), RECORD | {"status": "complete"}, proof)
            cut = False
        except Cut:
            cut = True
        cut_after(None)
        if begin(output, retry=False)["status"] == "complete":
            assert state(output) == (None, FAILED)
        else:
            assert state(output) == (list(range(6)), FAILED)
        if not cut:
            break
    assert steps > 2


def test_the_checkpoint_of_a_deleted_output_is_forgotten(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    leave_checkpoint(output)
    assert begin(output, retry=False)["status"] == "running"
    assert state(output)[0] is None


@pytest.fixture
def run(tmp_path: Path, photo_bytes: Callable[..., bytes]) -> Callable[..., int]:
    """The job on six images, of which two fail at first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        content = b"broken" if index in FAILED else photo_bytes("JPEG", 40, 40, index)
        (folder / f"{index}.jpg").write_bytes(content)
    base = ["--input", str(folder), "--output", str(tmp_path / "out")]
    base += ["--networks", "tests.tiny_networks:colours", "--methods", "grad_cam", "sca_cam"]
    return lambda *more: run_job("explain", [*base, *more])


@pytest.mark.long
def test_a_retry_cut_off_before_it_is_proven(run, cut_after, tmp_path, photo_bytes):
    output = tmp_path / "out"
    assert run("--methods", "grad_cam", "sca_cam", "grad_cam") == 0  # twice is once
    assert failed(output) == FAILED
    (tmp_path / "photos" / "2.jpg").write_bytes(photo_bytes("JPEG", 40, 40, 2))
    leave_checkpoint(output)
    cut_after(6)
    with pytest.raises(Cut):
        run("--retry-errors")
    cut_after(None)
    assert state(output)[1] == [4]  # all is written
    assert run("--retry-errors") == 0
    rows = pd.read_parquet(output / "explanations")
    assert not rows.duplicated(["image_id", "class_id", "method"]).any()
    assert sorted(set(rows["image_id"])) == [0, 1, 2, 3, 5]
    assert failed(output) == [4]
