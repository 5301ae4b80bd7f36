"""What the explain stage does when a GPU, its memory or native code fails."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch
from PIL import Image

from scacam.errors import RunError
from scacam.jobs.command import run_job
from scacam.methods import METHODS
from scacam.pipeline.cluster import root_cause, start_ray
from scacam.pipeline.progress import start_tally, taken_up
from scacam.pipeline.stages.decode import Decode
from scacam.pipeline.stages.explain import Explain
from scacam.pipeline.stages.holder import Holder
from scacam.pipeline.stages.rows import said
from tests.faulty_networks import ILLEGAL
from tests.tiny_networks import colours, greedy

main = partial(run_job, "explain")


@pytest.fixture
def with_white(photo_folder) -> Path:
    """Eleven photos and, in their midst, an image that is white."""
    folder = photo_folder(11)
    Image.new("RGB", (40, 40), "white").save(folder / "photo 0005 white.png")
    return folder


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """Where `faulty_networks` note their calls in the workers, by process."""
    path = tmp_path / "faults"
    monkeypatch.setenv("FAULTS", str(path))
    return path


def stage(network, sizes: list[int], error: Exception | None = None) -> Explain:
    """The stage by itself, that notes its batches' sizes; with an error, raised on white images."""
    stage = Explain(
        lambda: network,
        methods=list(METHODS),
        top_k=1,
        explain_label=False,
        embeddings=False,
        sampling=0,
        bfloat16=False,
        compile=False,
        last_use=True,
        batch_size=16,
        is_last=False,
        tally=None,
    )
    explain = stage._explain

    def noted(samples: np.ndarray, labels: np.ndarray):
        sizes.append(len(samples))
        if error is not None and (samples == 255).all((1, 2, 3)).any():
            raise error
        return explain(samples, labels)

    stage._explain = noted  # type: ignore[method-assign]
    return stage


def block(folder: Path) -> pa.Table:
    uris = [str(path) for path in sorted(folder.iterdir())]
    absent = pa.nulls(len(uris), pa.int64())
    columns = {"image_id": range(len(uris)), "uri": uris, "label": absent.cast(pa.int32())}
    table = pa.table(columns | {"offset": absent, "size": absent})
    return Decode([colours().preprocessing], "center_crop", None)(table)


def test_a_lack_of_memory_makes_batches_smaller_for_good(photo_folder):
    sizes: list[int] = []
    explain, batch = stage(greedy(), sizes), block(photo_folder(10))
    for _ in range(2):
        assert not explain(batch)["error"].drop_null()
    assert sizes == [10, 5, 2, 2, 1, 2, 2, 1] + 5 * [2]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("memory format is not supported"), "failed"),
        (TypeError("'NoneType' object is not subscriptable"), "failed"),
    ],
)
def test_the_image_that_is_to_blame_is_named(with_white, error, kind):
    batch = stage(colours(), [], error)(block(with_white))
    failed = batch.filter(pa.compute.is_valid(batch["error"]))
    assert [Path(uri).name for uri in failed["uri"].to_pylist()] == ["photo 0005 white.png"]
    assert failed["error"].to_pylist() == [kind]
    assert failed["message"].to_pylist()[0].startswith(type(error).__name__)
    network = colours()
    maps = batch[said(network.name, network.target_layer.name)].combine_chunks()
    numbers = sum(map(network.supports, METHODS)) * 8 * 8
    assert Counter(maps.value_lengths().to_pylist()) == {0: 1, numbers: 11}


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError(ILLEGAL), RuntimeError(ILLEGAL), RuntimeError("cuDNN error")]
)
def test_a_lost_gpu_is_not_a_lack_of_memory(with_white, error):
    """Without Ray nobody starts another process, so it is raised."""
    sizes: list[int] = []
    with pytest.raises(RuntimeError, match="error"):
        stage(colours(), sizes, error)(block(with_white))
    assert sizes == [12]


def test_an_actor_that_was_given_no_gpu_uses_none(monkeypatch):
    """`--gpus 0` on a machine with GPUs: Ray leaves them visible to all that ask for none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    start_ray()

    arguments = {"sampling": 0, "bfloat16": False, "last_use": True, "batch_size": None}
    holder = Holder(colours, **arguments, is_last=True, tally=start_tally())
    assert (holder.device.type, holder.batch_size) == ("cpu", 16)


def run(folder: Path, output: Path, network: str, *arguments: str) -> int:
    base = ["--input", str(folder), "--output", str(output), "--methods", "grad_cam"]
    return main([*base, "--networks", f"tests.faulty_networks:{network}", *arguments])


def errors(output: Path) -> list[Path]:
    return [path for path in output.glob("errors/*") if pq.read_metadata(path).num_rows]


@pytest.mark.long
def test_a_gpu_that_fails_is_left_to_another_process(with_white, tmp_path, log):
    assert run(with_white, tmp_path / "out", "failing_twice") == 0
    assert len(set(log.read_text().split())) >= 3
    assert pd.read_parquet(tmp_path / "out" / "explanations")["image_id"].nunique() == 12
    assert not errors(tmp_path / "out")


@pytest.mark.long
def test_a_broken_gpu_stops_the_job_and_blames_no_image(with_white, tmp_path, log, capsys):
    assert run(with_white, tmp_path / "out", "always_failing") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 processes of explain tests.faulty_networks:always_failing died" in told
    assert f"RuntimeError: {ILLEGAL}; the same command continues it" in told
    assert not errors(tmp_path / "out")


@pytest.mark.long
def test_an_image_that_kills_the_network_is_found(with_white, tmp_path, log):
    assert run(with_white, tmp_path / "out", "killed_by_white") == 0
    found = pd.read_parquet(tmp_path / "out" / "errors")
    assert found[["uri", "stage", "error"]].values.tolist() == [
        [str(with_white / "photo 0005 white.png"), "explain", "crashed"]
    ]
    assert pd.read_parquet(tmp_path / "out" / "explanations")["image_id"].nunique() == 11


@pytest.mark.long
def test_an_image_that_confuses_the_network_is_a_row(with_white, tmp_path, log):
    assert run(with_white, tmp_path / "out", "confused_by_white") == 0
    found = pd.read_parquet(tmp_path / "out" / "errors")
    assert found[["error", "message"]].values.tolist() == [["failed", "TypeError: too white"]]


@pytest.mark.long
def test_a_stage_that_always_crashes_stops_the_job(monkeypatch):
    """As localizing or writing might: whatever enters and leaves blocks is bounded."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray()
    tally = start_tally()

    def crash(batch: pa.Table) -> pa.Table:
        with taken_up(tally, "localize", batch):
            os._exit(1)

    blocks = ray.data.from_arrow(pa.table({"image_id": [512]}))
    with pytest.raises(ray.exceptions.RayError) as caught:
        blocks.map_batches(crash, batch_size=None, batch_format="pyarrow").materialize()
    told = root_cause(caught.value)
    assert told.startswith("6 processes of localize died one after the other, with image 512 ")


@pytest.mark.long
def test_a_run_that_fails_for_one_reason_stops_by_itself(tmp_path, capsys):
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for index in range(130):
        (folder / f"{index:04d}.jpg").write_bytes(b"broken")
    base = ["--input", str(folder), "--output", str(output)]
    base += ["--networks", "tests.tiny_networks:colours", "--methods", "grad_cam"]
    assert main(base) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "images failed, more than --max-error-rate 0.5 allows: 1" in told
    assert "not_an_image (" in told
    assert "--max-error-rate 1 goes on" in told
    assert main([*base, "--max-error-rate", "1"]) == 1
    assert "--retry-errors tries them again" in capsys.readouterr().out


@pytest.mark.long
def test_errors_that_stay_do_not_stop_their_retry(tmp_path, photo_bytes):
    """Of what is tried again nearly all may fail; of the whole run it is few."""
    folder, output = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    good = photo_bytes("JPEG", 40, 40)
    for index in range(240):
        (folder / f"{index:04d}.jpg").write_bytes(good if index % 2 else b"broken")
    (folder / "0000.jpg").write_bytes(good)
    base = ["--input", str(folder), "--output", str(output)]
    base += ["--networks", "tests.tiny_networks:colours", "--methods", "grad_cam"]
    assert main([*base, "--max-error-rate", "1"]) == 0
    assert main([*base, "--retry-errors"]) == 0
    assert len(pd.read_parquet(output / "errors")) == 119


@pytest.mark.parametrize(
    ("option", "value"), [("max_error_rate", 1.5), ("max_error_rate", -0.1), ("gpus", -1)]
)
def test_a_number_out_of_range_is_refused(photo_folder, tmp_path, option, value):
    from scacam.jobs.explain import run

    networks = ["tests.tiny_networks:colours"]
    with pytest.raises(RunError, match=f"--{option.replace('_', '-')} must be"):
        run(
            input=str(photo_folder(1)),
            output=str(tmp_path / "out"),
            networks=networks,
            **{option: value},
        )
