"""`--retry-errors` and completion, cut off at every step and continued."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scacam.jobs.command import run_job
from scacam.runs import lifecycle

pytestmark = pytest.mark.long

STEPS = ("write_record", "write_table", "shards_of", "_forget_checkpoint")
"""What the life of a run consists of; `shards_of` comes just before files are deleted."""


class Cut(BaseException):
    """Passes whatever catches errors, as the end of the process does."""


@pytest.fixture
def run(tmp_path: Path, photo_bytes: Callable[..., bytes]) -> Callable[..., int]:
    """The job on six images, of which two fail at first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.jpg").write_bytes(photo_bytes("JPEG", 40, 40, index))
    for index in (2, 4):
        (folder / f"{index}.jpg").write_bytes(b"broken")
    base = ["--input", str(folder), "--output", str(tmp_path / "out"), "--methods", "grad_cam"]
    return lambda *more: run_job(
        "explain", [*base, "--networks", "tests.tiny_networks:colours", *more]
    )


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


def failed(output: Path) -> list[int]:
    folder = output / "errors"
    return sorted(pd.read_parquet(folder)["image_id"]) if any(folder.glob("*.parquet")) else []


def explained(output: Path) -> list[int]:
    rows = pd.read_parquet(output / "explanations")
    assert not rows.duplicated(["image_id", "class_id", "method"]).any()
    return sorted(set(rows["image_id"]))


def test_a_retry_cut_off_at_every_step(run, cut_after, tmp_path, photo_bytes, capsys):
    """Continued by turns with the option and without it, until nothing is left to cut off."""
    output = tmp_path / "out"
    assert run() == 0
    assert failed(output) == [2, 4]
    (tmp_path / "photos" / "2.jpg").write_bytes(photo_bytes("JPEG", 40, 40, 2))
    for steps in range(100):
        cut_after(steps)
        try:
            assert run("--retry-errors") == 0
            break
        except Cut:
            pass
        cut_after(None)
        if steps % 2:
            assert run("--retry-errors") == 0
        else:
            assert run() == 0
        assert sorted(failed(output) + explained(output)) == list(range(6))
        assert not (output / ".checkpoint").exists()
    assert steps > 5
    cut_after(None)
    assert run("--retry-errors") == 0
    assert failed(output) == [4]
    assert explained(output) == [0, 1, 2, 3, 5]


def test_what_a_cut_off_completion_left_is_forgotten(run, tmp_path, photo_bytes):
    """Its checkpoint has all images as done, those that failed as well."""
    output, left = tmp_path / "out", tmp_path / "out.checkpoint"
    assert run() == 0

    def leave() -> None:
        left.mkdir()
        pq.write_table(pa.table({lifecycle.ID: range(6)}), left / "left.parquet")

    leave()
    (tmp_path / "photos" / "2.jpg").write_bytes(photo_bytes("JPEG", 40, 40, 2))
    assert run("--retry-errors") == 0
    assert failed(output) == [4]
    leave()
    assert run() == 0
    assert not left.exists()


def test_the_checkpoint_of_a_deleted_output_is_forgotten(run, tmp_path):
    left = tmp_path / "out.checkpoint"
    left.mkdir()
    pq.write_table(pa.table({lifecycle.ID: range(6)}), left / "left.parquet")
    assert run() == 0
    assert explained(tmp_path / "out") == [0, 1, 3, 5]


def test_a_method_named_twice_is_one(run, tmp_path):
    assert run("--methods", "grad_cam", "sca_cam", "grad_cam") == 0
    rows = pd.read_parquet(tmp_path / "out" / "explanations")
    assert rows.groupby("method").size().to_dict() == {"grad_cam": 16, "sca_cam": 16}
    assert run("--methods", "grad_cam", "sca_cam") == 0
