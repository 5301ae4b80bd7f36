"""The faithfulness job over finished runs, on a real embedded Ray."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
import torch
from made_runs import evaluate

import scacam
from scacam.images import see
from scacam.jobs import explain, faithfulness
from scacam.jobs.command import run_job
from scacam.jobs.faithfulness_pass import sample
from scacam.report.run import report
from scacam.trials.metrics import BASELINES, CURVES, METRICS
from scacam.trials.tables import (
    FAITHFULNESS,
    FAITHFULNESS_CURVES,
    FAITHFULNESS_DIFFERENCES,
    IMAGE_FAITHFULNESS,
)

main = partial(run_job, "faithfulness")

ROOT = Path(__file__).parent.parent
NETWORK = "tests.tiny_networks:colours"
METHODS = ("feature_map", "gap_cam", "grad_cam", "sca_cam")
BRIEF = ("--metrics", "deletion_auc", "average_drop", "random_head", "--steps", "4")


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def finished(tmp_path_factory, module_photo):
    """A run over 20 photos, of which one is unreadable, one gone by now and one another one now."""
    folder = tmp_path_factory.mktemp("faithfulness")
    photos = folder / "photos"
    photos.mkdir()
    for seed in range(20):
        module_photo(60 + seed, 50, seed).save(photos / f"{seed:02d}.png")
    (photos / "07.png").write_bytes(b"no image")
    out = folder / "out"
    explain.run(input=str(photos), output=str(out), networks=[NETWORK], methods=METHODS, top_k=3)
    (photos / "03.png").unlink()
    module_photo(99, 99, 0).save(photos / "05.png")
    return out


@pytest.fixture(scope="module")
def tried(finished):
    return faithfulness.run(run=str(finished))


def table(out, name="faithfulness_images") -> pd.DataFrame:
    return pd.read_parquet(out / "metrics" / name)


def test_every_image_is_tried_or_an_error(finished, tried):
    assert tried.ok
    assert tried.images == 19
    assert tried.errors == {"missing": 1, "changed": 1}
    errors = table(finished, "faithfulness/errors").set_index("error")
    assert errors.loc["missing", "uri"].endswith("03.png")
    assert "65 × 50 pixels" in errors.loc["changed", "message"]
    images = table(finished)
    assert set(images["image_id"]) == set(range(20)) - {3, 5, 7}
    assert set(images.groupby("image_id")["method"].agg(tuple)) == {(*METHODS, *BASELINES)}
    rows = table(finished, "faithfulness.parquet")
    assert set(rows["images"]) == {17}
    record = json.loads((finished / "metrics/faithfulness/run.json").read_text())
    assert record["status"] == "complete"
    assert record["tried"] == 17
    assert not (finished / "metrics/faithfulness/.checkpoint").exists()
    assert pd.read_parquet(finished / "metrics/faithfulness/index.parquet")["images"].sum() == 19


def test_the_tables_have_their_columns(finished, tried):
    for name, schema in (
        ("faithfulness", FAITHFULNESS),
        ("faithfulness_differences", FAITHFULNESS_DIFFERENCES),
        ("faithfulness_curves", FAITHFULNESS_CURVES),
    ):
        assert pq.read_schema(finished / f"metrics/{name}.parquet").equals(schema)
    shard = next((finished / f"metrics/faithfulness_images/network={NETWORK}").iterdir())
    assert pq.read_schema(shard).equals(IMAGE_FAITHFULNESS)
    rows = table(finished, "faithfulness.parquet").set_index(["method", "metric"])
    images = table(finished)
    assert len(rows) == len(METRICS) * len([*METHODS, *BASELINES])
    for (method, metric), row in rows.iterrows():
        values = images.loc[images["method"] == method, metric]
        assert row["value"] == pytest.approx(values.mean())
        assert row["ci_low"] <= row["value"] + 1e-9
        assert row["value"] <= row["ci_high"] + 1e-9
    pairs = table(finished, "faithfulness_differences.parquet")
    one = pairs.query("metric == 'road' and method == 'grad_cam' and other == 'sca_cam'").iloc[0]
    expected = rows.loc[("grad_cam", "road"), "value"] - rows.loc[("sca_cam", "road"), "value"]
    assert one["difference"] == pytest.approx(expected)
    curves = table(finished, "faithfulness_curves.parquet")
    curve = curves.query("method == 'sca_cam' and curve == 'deletion'")
    np.testing.assert_allclose(curve["share"], np.linspace(0, 1, 21))
    stored = np.stack(images.loc[images["method"] == "sca_cam", "deletion"])
    np.testing.assert_allclose(curve["probability"], stored.mean(0), rtol=1e-5)


def test_the_job_finds_what_the_function_finds(finished, tried):
    run = scacam.open_run(str(finished))
    network = scacam.load_network(NETWORK)
    some = [0, 11]
    uris = run.manifest["uri"].to_pylist()
    samples = [
        see(Path(uris[index]).read_bytes(), [network.preprocessing], "center_crop")[1][0][1]
        for index in some
    ]
    images = network.normalize(torch.from_numpy(np.stack(samples)))
    heatmaps = scacam.Explainer(network, METHODS, 3)(images).heatmaps
    found = scacam.faithfulness(network, images, heatmaps)
    frame = table(finished).set_index(["image_id", "method"])
    for name, values in found.metrics.items():
        for index, image_id in enumerate(some):
            for claimant, method in enumerate(found.claimants):
                if method == "random_map":  # it is drawn by the image's id
                    continue
                stored = frame.loc[(image_id, method), name]
                assert stored == pytest.approx(values[index, claimant], abs=2e-3), name


def test_again_there_is_nothing_to_do(finished, tried):
    before = sorted((finished / "metrics/faithfulness_images").rglob("*.parquet"))
    again = faithfulness.run(run=str(finished))
    assert sorted((finished / "metrics/faithfulness_images").rglob("*.parquet")) == before
    assert again.rows == tried.rows


def test_it_is_told_what_was_found(finished, tried):
    said = str(tried)
    assert "17 of 19 images tried" in said
    assert "insertion ↑" in said
    assert "maps hardly change when the classifier's weights are random: feature_map" in said
    assert "noise" in said


def test_another_pass_is_refused(finished, tried, capfd):
    assert main(["--run", str(finished), *BRIEF]) == 2
    said = capfd.readouterr().err
    assert "holds what another pass found; delete" in said
    assert "steps: 20 → 4" in said


def refused(finished, capfd, *arguments) -> str:
    assert main(["--run", str(finished), *arguments]) == 2
    return capfd.readouterr().err


def test_what_the_run_does_not_have_is_refused(finished, tmp_path, capfd):
    assert "has no network 'vgg'" in refused(finished, capfd, "--networks", "vgg")
    assert "has no 'layer_cam' of" in refused(finished, capfd, "--methods", "layer_cam")
    assert "unknown metric 'auc'" in refused(finished, capfd, "--metrics", "auc")
    assert "--images must be at least 1" in refused(finished, capfd, "--images", "0")
    assert "holds no run" in refused(tmp_path, capfd)
    other = tmp_path / "other"
    shutil.copytree(finished, other, ignore=lambda folder, names: ["metrics"])
    record = json.loads((other / "run.json").read_text())
    record["networks"][0]["sha256"] = "0" * 64
    (other / "run.json").write_text(json.dumps(record))
    assert "has other weights now than in the run" in refused(other, capfd)
    (other / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert "is not complete; complete it first" in refused(other, capfd)
    (other / "run.json").write_text(json.dumps(record | {"top_k": 1}))
    said = refused(other, capfd, "--metrics", "random_logit_ssim")
    assert "random_logit needs as many classes" in said


def test_a_sample_is_the_same_every_time(finished):
    run = scacam.open_run(str(finished))
    three, six = (sample(run, count)["image_id"].to_pylist() for count in (3, 6))
    assert three == sorted(three)
    assert set(three) < set(six) < set(range(20)) - {7}
    assert sample(run, 3)["image_id"].to_pylist() == three
    assert len(sample(run, None)) == len(sample(run, 99)) == 19


def test_a_dry_run_only_tells(finished, tmp_path, capfd):
    other = tmp_path / "other"
    shutil.copytree(finished, other, ignore=lambda folder, names: ["metrics"])
    assert main(["--run", str(other), "--dry-run", "--price-per-hour", "2", *BRIEF]) == 0
    said = capfd.readouterr().out
    assert "images: 19" in said
    assert f"try {NETWORK}" in said
    assert "cost: about" in said
    assert not (other / "metrics").exists()


def test_the_report_says_it(finished, tried, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    evaluate(out)  # made up, of Grad-CAM and SCA-CAM
    page = report(scacam.open_run(str(out)))
    assert '<section id="faithfulness">' in page
    assert (
        "<li>maps hardly change when the classifier&#39;s weights are random: feature_map" in page
    )
    assert "insertion ↑" in page
    assert "deletion ↓" in page
    assert f"insertion over MaxBoxAccV2 of the methods of {NETWORK}" in page
    for done in CURVES.values():
        assert done in page
    assert "the least faithful" in page
    assert "constant_map" in page
    shutil.rmtree(out / "metrics")
    assert 'id="faithfulness"' not in report(scacam.open_run(str(out)))


def test_killed_three_times_and_continued(finished, tried, tmp_path):
    """Before there is anything, and twice as soon as there is more of it, or a little later."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, ignore=lambda folder, names: ["metrics"])
    command = [sys.executable, "jobs/faithfulness.py", "--run", str(out)]
    # On the Ray that is there: the job is killed, not its cluster, which need not start anew.
    joined = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    moments = random.Random(5)
    folder = out / "metrics/faithfulness_images"

    def shards() -> int:
        return len(list(folder.rglob("*.parquet")))

    for kill in range(3):
        before, earliest = shards(), time.monotonic() + moments.uniform(0, 5)
        process = subprocess.Popen(
            command, cwd=ROOT, env=joined, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (
            time.monotonic() < earliest if kill == 0 else shards() == before
        ):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
    assert shards() > 0
    ended = subprocess.run(command, cwd=ROOT, env=joined, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    order = ["image_id", "method"]
    expected, actual = (
        table(one).sort_values(order, ignore_index=True).drop(columns="network")
        for one in (finished, out)
    )
    assert len(actual) == len(expected)
    for name in IMAGE_FAITHFULNESS.names:
        if expected[name].dtype.kind == "f":
            np.testing.assert_allclose(actual[name], expected[name], atol=1e-4, err_msg=name)
        elif name in order:
            assert actual[name].tolist() == expected[name].tolist()
    one, other = (table(each, "faithfulness.parquet") for each in (finished, out))
    np.testing.assert_allclose(one["value"], other["value"], atol=1e-4)
