"""The audit of class activation weights: by hand, by the kinds of heads, and as a job."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from scacam import Network, load_network
from scacam.explainer import observe
from scacam.inputs.manifest import read_manifest
from scacam.jobs import caw
from scacam.jobs.command import run_job
from scacam.methods.caw import CAW, Weights, relate, verdict
from scacam.methods.gradients import averaged
from scacam.pipeline.stages.decode import Decode
from scacam.pipeline.stages.rows import sampling_of
from scacam.tables import MANIFEST

main = partial(run_job, "caw")

torch.set_num_threads(1)


def test_relation_by_hand() -> None:
    weights = np.array([[2.0, -4, 6, 8], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    gradients = np.array([[1.0, -2, 3, 4], [1, 1, 1, 4], [-1, 0, -3, -4], [0, 0, 0, 0]])
    relation = relate(weights, gradients)
    # ratios: 2 2 2 2; 1 2 3 1; -1 · -1 -1; none
    np.testing.assert_allclose(relation.ratio, [2, 1.5, -1, np.nan])
    np.testing.assert_allclose(relation.spread_channels, [0, 1.25 / 1.5, 0, np.nan])
    np.testing.assert_allclose(relation.silent_channels, [0, 0, 0.25, 1])
    expected = [1, np.corrcoef(weights[1], gradients[1])[0, 1]]
    np.testing.assert_allclose(relation.correlation[:2], expected)
    assert np.isnan(relation.correlation[3])


def test_classes_are_gathered_over_images() -> None:
    class_weights = np.array([[1.0, 2], [3, 4], [5, 6]], dtype=np.float32)
    weights = Weights(
        "n", head="scores", cells=4, class_weights=class_weights, categories=["a", "b", "c"]
    )
    weights.add(np.array([2, 0]), np.array([[5.0, 6], [0.5, 1]], dtype=np.float32))
    weights.add(np.array([2]), np.array([[2.5, 3]], dtype=np.float32))
    table = weights.table()
    assert table.schema == CAW
    often, once = table.to_pylist()
    assert (often["class_id"], often["class_name"], often["images"]) == (2, "c", 2)
    assert often["class_weights"] == [5, 6]
    assert often["averaged_gradients"] == [3.75, 4.5]
    assert often["ratio"] == 1.5  # the median of 1 and 2
    assert often["ratio_spread_channels"] == 0
    assert often["ratio_spread_images"] == pytest.approx(1 / 1.5)
    assert often["correlation"] == pytest.approx(1)
    assert (once["class_id"], once["images"], once["ratio"]) == (0, 1, 2)
    assert weights.images == 3
    assert weights.summary()["ratio"] == 2


def test_without_class_weights_there_is_nothing_to_compare() -> None:
    weights = Weights("n", head="general", cells=4, class_weights=None, categories=None)
    weights.add(np.array([1]), np.array([[1.0, 2]], dtype=np.float32))
    (row,) = weights.table().to_pylist()
    assert row["averaged_gradients"] == [1, 2]
    assert row["class_name"] == "class 1"
    assert row["class_weights"] is row["ratio"] is None
    assert weights.summary() == {}


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("resnet18", "pooled", "linear, w = 49 α for every image"),
        ("squeezenet1_1", "scores", "linear up to one constant per image and class, w = 169² / n"),
        ("densenet121", "rectified", "not linear, α_k = w_k n_k / 49²"),
        ("alexnet", "general", "not defined"),
    ],
)
def test_the_verdict_is_what_networks_show(name: str, kind: str, words: str) -> None:
    """Each sentence, and the formula in it, at random weights."""
    network = load_network(name, "random")
    assert network.head.kind == kind
    cells = network.feature_shape[1] * network.feature_shape[2]
    assert verdict(kind, cells).startswith(words)
    if network.class_weights is None:
        return
    torch.manual_seed(0)
    if kind == "scores":  # random scores are positive everywhere: shift some below 0
        network.module.classifier[1].bias -= 0.5
    seen = observe(network, torch.randn(2, 3, 224, 224), top_k=1)
    weights, alpha = seen.class_weights[:, 0].numpy(), averaged(seen.gradients)[:, 0].numpy()
    relation = relate(weights, alpha)
    if kind == "pooled":
        np.testing.assert_allclose(relation.ratio, 49, rtol=1e-5)
    elif kind == "scores":
        with torch.no_grad():
            maps = network.module.classifier[2](network.module.classifier[1](seen.features))
        positive = maps.gather(1, seen.class_ids[:, :1, None, None].expand(-1, -1, 13, 13)) > 0
        expected = 169**2 / positive.sum((1, 2, 3)).numpy()
        np.testing.assert_allclose(relation.ratio, expected, rtol=1e-5)
    else:
        positive = (seen.features > 0).sum((2, 3)).numpy()
        np.testing.assert_allclose(alpha, weights * positive / 49**2, rtol=1e-5)
    assert (relation.spread_channels < 1e-4).all() == (kind != "rectified")
    assert (relation.correlation > 0.99).all() == (kind != "rectified")


@pytest.mark.parametrize(
    "others",
    [["alexnet"], pytest.param(["squeezenet1_1", "alexnet"], marks=pytest.mark.long)],
    ids=len,
)
def test_the_job(
    photo_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[str]
) -> None:
    folder = photo_folder(10)
    (folder / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    networks = ["tests.tiny_networks:colours", *(f"{name}=random" for name in others)]
    arguments = ["--input", str(folder), "--output", str(out), "--networks", *networks]
    assert main([*arguments, "--batch-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "tests.tiny_networks:colours: linear, w = 64 α for every image and class" in said
    assert "measured on 10 images: w / α = 64" in said
    assert "1 of 11 images failed: not_an_image" in said
    table = pq.read_table(out / "metrics" / "caw.parquet")
    assert table.schema.equals(CAW)
    rows = table.to_pylist()
    for name in ("tests.tiny_networks:colours", *others):
        assert sum(row["images"] for row in rows if row["network"] == name) == 10
    for row in rows:
        if row["network"] == "tests.tiny_networks:colours":
            weights = 4 * np.eye(4) - 1
            np.testing.assert_allclose(row["class_weights"], weights[row["class_id"]])
            np.testing.assert_allclose(row["averaged_gradients"], weights[row["class_id"]] / 64)
        assert (row["class_weights"] is None) == (row["network"] == "alexnet")


@pytest.mark.long
def test_a_job_that_is_stopped_goes_on(photo_folder, tmp_path: Path, monkeypatch) -> None:
    """With the images that it has not seen, and comes to the same."""
    folder, out = photo_folder(24), tmp_path / "out"
    (folder / "broken.jpg").write_bytes(b"no image")
    arguments = ["--input", str(folder), "--networks", "tests.tiny_networks:colours", "--output"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(caw, "rows_per_shard", lambda *_: 6)
    save, streamed = caw.Seen.save, []

    def and_stop(seen: caw.Seen) -> None:
        save(seen)
        streamed.append(seen.done.sum())
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(caw, "_SAVED_EVERY_S", 0.0)
        patched.setattr(caw.Seen, "save", and_stop)
        assert main([*arguments, str(out)]) == 2
    assert 0 < streamed[0] < 25
    weigh = caw.weigh

    def counted(manifest: pa.Table, *more: Any) -> None:
        streamed.append(len(manifest))
        weigh(manifest, *more)

    monkeypatch.setattr(caw, "weigh", counted)
    assert main([*arguments, str(out)]) == 0
    assert sum(streamed) == 25
    one, other = (pq.read_table(path / "metrics/caw.parquet") for path in (tmp_path / "whole", out))
    for actual, expected in zip(other.to_pylist(), one.to_pylist(), strict=True):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            approximate = isinstance(value, float | list)
            assert actual[name] == (pytest.approx(value, rel=1e-5) if approximate else value)
    assert [path.name for path in (out / "metrics").iterdir()] == ["caw.parquet"]


def observing(network: Network) -> caw.Observe:
    """The stage by itself, four images at a time."""
    settings = {"sampling": 0, "bfloat16": False, "last_use": True, "batch_size": 4}
    return caw.Observe(lambda: network, **settings, is_last=False, tally=None)


def test_an_image_on_which_the_network_fails_counts_for_none(photo_folder, tmp_path: Path) -> None:
    """Whatever it raises, or if its gradients are none; the images beside it count."""
    folder = photo_folder(6)
    Image.new("RGB", (40, 40), "white").save(folder / "photo 0002 white.png")
    Image.new("RGB", (40, 40), "black").save(folder / "photo 0003 black.png")
    network = load_network("tests.tiny_networks:colours")

    stage = observing(network)
    observed = stage._observed

    def faulty(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means = samples.mean((1, 2, 3))
        if (means == 255).any():
            raise TypeError("too white\nby far")
        ids, averaged = observed(samples)
        return ids, np.where(means[:, None] == 0, np.nan, averaged)

    stage._observed = faulty
    manifest = read_manifest(str(folder)).table
    decode = Decode([sampling_of(network.preprocessing)], "center_crop", None)
    block = stage(decode(manifest))
    failed = block.filter(pc.is_valid(block["error"])).select(["stage", "error", "message"])
    assert [tuple(row.values()) for row in failed.to_pylist()] == [
        ("observe", "failed", "TypeError: too white"),
        ("observe", "not_finite", f"{network.name} gives gradients that are not finite"),
    ]
    seen = caw.Seen.before(str(tmp_path / "caw.partial.npz"), manifest, [network])
    seen.add(block)
    assert seen.done.all()
    assert seen.errors == {"failed": 1, "not_finite": 1}
    assert seen.weights[0].images == 6


def test_what_was_seen_is_taken_up_again(photo_folder, tmp_path: Path) -> None:
    """Half before the stop and half after it, with an image that fails in each."""
    folder = photo_folder(12)
    for name in ("broken.jpg", "photo 0003.jpg"):
        (folder / name).write_bytes(b"no image")
    network = load_network("tests.tiny_networks:colours")
    manifest = read_manifest(str(folder)).table
    decode = Decode([sampling_of(network.preprocessing)], "center_crop", None)
    observe = observing(network)
    whole = caw.Seen.before(str(tmp_path / "whole.npz"), manifest, [network])
    whole.add(observe(decode(manifest)))
    path = str(tmp_path / "caw.partial.npz")
    stopped = caw.Seen.before(path, manifest, [network])
    stopped.add(observe(decode(manifest.slice(0, 6))))
    stopped.save()
    seen = caw.Seen.before(path, manifest, [network])
    assert seen.done.tolist() == [True] * 6 + [False] * 7
    seen.add(observe(decode(manifest.filter(pa.array(~seen.done)))))
    assert seen.errors == whole.errors == {"not_an_image": 2}
    assert seen.done.all()
    (one,), (other,) = whole.weights, seen.weights
    assert one.summary() == pytest.approx(other.summary())
    rows = [
        each.table().to_pandas().sort_values("class_id", ignore_index=True) for each in (one, other)
    ]
    pd.testing.assert_frame_equal(*rows)


def test_what_was_seen_of_other_images_is_not_taken(tmp_path: Path, caplog) -> None:
    network = load_network("tests.tiny_networks:colours")
    path = str(tmp_path / "caw.partial.npz")
    manifests = [
        pa.Table.from_pylist([{"image_id": i, "uri": f"{name}{i}"} for i in range(3)], MANIFEST)
        for name in "ab"
    ]
    seen = caw.Seen.before(path, manifests[0], [network])
    seen.done[1], seen.errors["corrupt"] = True, 1
    seen.save()
    again = caw.Seen.before(path, manifests[0], [network])
    assert (again.done.tolist(), again.errors) == ([False, True, False], {"corrupt": 1})
    assert not caw.Seen.before(path, manifests[1], [network]).done.any()


def test_a_job_that_cannot_run_says_so(
    photo_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photo_folder(1)
    base = ["--output", str(tmp_path / "out"), "--input"]
    for arguments, message in {
        (str(folder / "none"), "--networks", "resnet18"): "no such input",
        (str(folder), "--networks", "resnet17"): "unknown network",
        (str(folder), "--limit", "0", "--networks", "resnet18"): "--limit must be at least 1",
    }.items():
        assert main([*base, *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("caw: ")
        assert message in said
    assert not (tmp_path / "out").exists()
