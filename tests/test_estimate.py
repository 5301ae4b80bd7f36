"""The dry run: its arithmetic by hand, and that it starts nothing."""

import re
from functools import partial

import pytest
import ray

from scacam.jobs import explain
from scacam.jobs.command import run_job
from scacam.jobs.estimate import Estimate

TEN_MILLION = Estimate(
    images=10_000_000,
    failed=0.25,
    input_bytes=5e11,
    output_bytes=1.2e10,
    feeding={"decode": 0.003, "localize": 0.001},
    explaining={"explain a": 0.001, "explain b": 0.001},
    sampled=256,
    cores=8,
    gpus=0,
)

main = partial(run_job, "explain")


def test_without_a_gpu_the_cores_do_everything():
    # 6 ms of a core, on 8 cores
    assert TEN_MILLION.hours == pytest.approx(10_000_000 * 0.006 / 8 / 3600)
    told = TEN_MILLION.told(price_per_hour=2.0)
    assert "images: 10,000,000, about 500 GB to read" in told
    assert "output: about 12 GB, 1,200 bytes per image" in told
    assert "about 2.1 h on 8 cores like these" in told
    assert "a core can feed 250 images/s to a GPU" in told
    assert "25% of the sampled images cannot be explained" in told
    assert "cost: about 4.17 at 2 per hour of 8 cores" in told


def test_with_gpus_the_slower_side_sets_the_pace():
    # A GPU explains an image in 2 ms and 4 ms of a core feed it: 2 cores keep one busy.
    fed = TEN_MILLION._replace(gpus=4)
    assert fed.hours == pytest.approx(10_000_000 * 0.002 / 4 / 3600)
    assert "one explains 500 images/s and needs 2.0 cores" in fed.told(None)
    assert "warning" not in fed.told(None)
    assert "pace: the GPUs set it; 8 cores could feed 4.0 of them" in fed.told(None)
    starved = TEN_MILLION._replace(gpus=4, cores=6)
    assert starved.hours == pytest.approx(10_000_000 * 0.004 / 6 / 3600)
    assert "warning: 6 cores cannot feed 4 GPUs, which will be 75% busy" in starved.told(None)
    assert "8 cores in all make it even" in starved.told(None)


def test_what_gpus_decode_is_no_work_of_the_cores():
    # A GPU decodes and explains an image in 2.5 ms, and a core localizes it in 1.
    spared = TEN_MILLION._replace(
        gpus=4,
        feeding={"localize": 0.001},
        explaining={"decode on the GPU": 0.0005, "explain a": 0.001, "explain b": 0.001},
    )
    assert spared.hours == pytest.approx(10_000_000 * 0.0025 / 4 / 3600)
    told = spared.told(None)
    assert "localize 1.0, decode on the GPU 0.5, explain a 1.0, explain b 1.0" in told
    assert "one explains 400 images/s and needs 0.4 cores" in told


def test_a_dry_run_times_the_decoding_of_gpus_as_theirs(tmp_path, photo_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # which does what a CPU does
    options = {"networks": ["tests.tiny_networks:colours"], "dry_run": True, "gpu_decode": True}
    told = str(explain.run(input=str(photo_folder(4)), output=f"{tmp_path}/out", **options))
    stages = (
        r"image: localize [\d.]+, decode on the GPU [\d.]+, explain tests.tiny_networks:colours"
    )
    assert re.search(stages, told)


def test_a_dry_run_times_no_gpu_that_is_not_there(tmp_path, photo_folder, capsys):
    options = ["--networks", "tests.tiny_networks:colours", "--dry-run", "--gpu-decode"]
    assert main(["--input", str(photo_folder(1)), "--output", f"{tmp_path}/out", *options]) == 2
    assert "--gpu-decode needs a GPU, and this machine has none" in capsys.readouterr().err


def test_a_dry_run_starts_nothing(tmp_path, photo_folder, capsys):
    output = tmp_path / "out"
    options = ["--networks", "tests.tiny_networks:colours", "--dry-run"]
    before = ray.is_initialized()  # by another test, perhaps
    assert main(["--input", str(photo_folder(30)), "--output", str(output), *options]) == 0
    told = capsys.readouterr().out
    assert "images: 30, about" in told
    assert "from a timed sample of 16 images" in told
    assert re.search(r"decode [\d.]+, localize [\d.]+, explain tests.tiny_networks:colours", told)
    assert not output.exists()
    assert ray.is_initialized() == before


def test_a_dry_run_of_broken_images(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"<html>")
    options = ["--networks", "tests.tiny_networks:colours", "--dry-run"]
    assert main(["--input", f"{tmp_path}/photos", "--output", f"{tmp_path}/out", *options]) == 2
    assert "none of 1 sampled images can be explained; the first" in capsys.readouterr().err
