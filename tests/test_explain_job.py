"""The explain job, on a real embedded Ray, with images that the tests make."""

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ray import cloudpickle

import scacam
from scacam import Preprocessing, load_network
from scacam.images import decode, pixels, view_of
from scacam.jobs.command import run_job
from scacam.pipeline.checkpoint import checkpoint
from scacam.pipeline.sink import ShardSink
from scacam.pipeline.stages.decode import Decode
from scacam.pipeline.stages.localize import Localize

main = partial(run_job, "explain")

CONTRACT = {
    "image_id": pa.int64(),
    "uri": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    **{f"view_{corner}": pa.float32() for corner in ("x0", "y0", "x1", "y1")},
    "label": pa.int32(),
    "class_id": pa.int32(),
    "class_name": pa.string(),
    "rank": pa.int16(),
    "probability": pa.float32(),
    "method": pa.string(),
    "heatmap": None,
    "map_height": pa.int16(),
    "map_width": pa.int16(),
    "scale": pa.float32(),
    "peak_x": pa.float32(),
    "peak_y": pa.float32(),
    **{f"box_{corner}": pa.float32() for corner in ("x0", "y0", "x1", "y1")},
}
NETWORKS = {"tests.tiny_networks:colours": (4, 8, 8), "squeezenet1_1": (3, 13, 13)}
METHODS = ("feature_map", "gap_cam", "grad_cam", "sca_cam")


def run(folder_or_manifest, output, *arguments) -> int:
    base = [
        "--input",
        str(folder_or_manifest),
        "--output",
        str(output),
        "--methods",
        *METHODS,
        METHODS[0],
    ]
    return main([*base, "--networks", "tests.tiny_networks:colours", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, module_photo):
    """A run of two networks over good, odd and bad images, with labels."""
    folder = tmp_path_factory.mktemp("explain")
    images = folder / "images"
    images.mkdir()
    names = [
        "plain.jpg",
        "with space.jpg",
        "hash#percent%41.jpg",
        "ünï 'quo\"te'.jpg",
        "new\nline.jpg",
    ]
    for seed, name in enumerate(names):
        module_photo(60 + 10 * seed, 50, seed).save(images / name, "JPEG")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    module_photo(80, 40, 9).save(images / "rotated.jpg", exif=rotated)
    Image.new("RGB", (1, 1), (255, 0, 0)).save(images / "dot.png")
    module_photo(900, 2, 3).save(images / "wide.png")
    (images / "empty.jpg").write_bytes(b"")
    (images / "page.jpg").write_bytes(b"<!doctype html>")
    whole = (images / "plain.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    good = [*names, "rotated.jpg", "dot.png", "wide.png", "plain.jpg"]
    bad = {
        "empty.jpg": "empty",
        "page.jpg": "not_an_image",
        "cut.jpg": "corrupt",
        "no.jpg": "missing",
    }
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "label"])
        writer.writerows([f"images/{name}", index % 4] for index, name in enumerate([*good, *bad]))
    output = folder / "out"
    arguments = ["--input", str(folder / "manifest.csv"), "--output", str(output)]
    arguments += ["--top-k", "3", "--explain-label", "--methods", *METHODS]
    arguments += ["--networks", "tests.tiny_networks:colours", "squeezenet1_1=random"]
    status = main(arguments)
    assert status == 0
    return output, images, good, bad


def shards(output: Path, network: str) -> list[Path]:
    return sorted((output / "explanations" / f"network={network}").glob("*/*.parquet"))


@pytest.mark.parametrize("network", NETWORKS)
def test_shards_have_the_columns_of_the_contract(finished, network):
    output = finished[0]
    assert shards(output, network)
    for shard in shards(output, network):
        schema = pq.read_schema(shard)
        assert schema.names == list(CONTRACT)
        for name, type_ in CONTRACT.items():
            expected = type_ or pa.fixed_shape_tensor(pa.float16(), NETWORKS[network][1:])
            assert schema.field(name).type == expected, name


def test_every_image_is_explained_or_an_error(finished):
    output, images, good, bad = finished
    errors = pd.read_parquet(output / "errors")
    assert dict(zip(errors["uri"], errors["error"], strict=True)) == {
        str(images / name): kind for name, kind in bad.items()
    }
    assert set(errors["stage"]) == {"read", "decode"}
    for network in NETWORKS:
        rows = pd.read_parquet(output / "explanations" / f"network={network}")
        assert set(rows["image_id"]) == set(range(len(good)))
        only_label = rows[rows["rank"].isna()]
        assert (only_label["class_id"] == only_label["label"]).all()
        keys = ["image_id", "class_id", "method"]
        assert not rows.duplicated(keys).any()
        # Three classes each, and the label where it is none of them, by every method.
        assert len(rows) == (3 * len(good) + only_label["image_id"].nunique()) * len(METHODS)
        labelled = rows[rows["class_id"] == rows["label"]]
        assert labelled["image_id"].nunique() == len(good)


def test_rows_are_what_the_library_says_of_each_image(finished):
    output, images, good, _ = finished
    for name, weights in (("tests.tiny_networks:colours", "DEFAULT"), ("squeezenet1_1", "random")):
        network = load_network(name, weights)
        explainer = scacam.Explainer(network, METHODS, top_k=3)
        rows = pa.concat_tables(pq.read_table(shard) for shard in shards(output, name))
        maps = rows["heatmap"].combine_chunks().to_numpy_ndarray().astype(np.float32)
        maps *= rows["scale"].to_numpy()[:, None, None]
        table = rows.drop_columns(["heatmap"]).to_pandas()
        for image_id, file in enumerate(good):
            image = decode((images / file).read_bytes())
            view = view_of(*image.size, network.preprocessing, "center_crop")
            seen = torch.from_numpy(pixels(image, view, network.preprocessing).copy())[None]
            expected = explainer(network.normalize(seen))
            probabilities = expected.logits.softmax(1)[0]
            of_image = table[table["image_id"] == image_id]
            assert set(of_image["width"]) == {image.size[0]}
            assert set(of_image["height"]) == {image.size[1]}
            assert of_image["view_x1"].iloc[0] == pytest.approx(view.x1, abs=1e-3)
            for k, class_id in enumerate(expected.class_ids[0].tolist()):
                of_class = of_image[of_image["class_id"] == class_id]
                assert set(of_class["rank"]) == {k + 1}
                assert of_class["probability"].iloc[0] == pytest.approx(
                    probabilities[class_id].item(), abs=1e-5
                )
                for index, method in of_class["method"].items():
                    raw = expected.heatmaps[method][0, k].numpy()
                    np.testing.assert_allclose(
                        maps[index], raw, rtol=0, atol=1e-3 * np.abs(raw).max() + 1e-6
                    )


def test_peaks_are_where_the_colour_is(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.new("RGB", (64, 64), "black")
    image.paste((255, 0, 0), (8, 40, 24, 48))
    image.save(folder / "red.png")
    assert run(folder, tmp_path / "out", "--top-k", "1", "--view", "whole_image") == 0
    rows = pd.read_parquet(tmp_path / "out" / "explanations").set_index("method")
    assert set(rows["class_name"]) == {"red"}
    for method in ("gap_cam", "grad_cam", "sca_cam"):
        row = rows.loc[method]
        # The rectangle covers two cells of 8 × 8 pixels; the first of them is the peak.
        assert (row["peak_x"], row["peak_y"]) == (12, 44)
        assert row["box_x0"] < 8 < 24 < row["box_x1"]
        assert row["box_y0"] < 40 < 48 < row["box_y1"]
        assert row["box_x1"] - row["box_x0"] <= 16 + 16


def test_any_reader_opens_a_shard(finished):
    output = finished[0]
    pattern = f"{output}/explanations/network=squeezenet1_1/layer=features/*.parquet"
    count = sum(pq.read_metadata(shard).num_rows for shard in shards(output, "squeezenet1_1"))
    assert len(pd.read_parquet(f"{output}/explanations/network=squeezenet1_1")) == count
    total, cells = duckdb.sql(
        f"select count(*), min(len(heatmap)) from read_parquet('{pattern}')"
    ).fetchall()[0]
    assert (total, cells) == (count, 13 * 13)
    assert polars.read_parquet(pattern)["heatmap"].len() == count


def test_the_record_says_what_ran(finished):
    output, _, good, bad = finished
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "complete"
    assert (record["images"], record["explained"]) == (len(good) + len(bad), len(good))
    assert record["errors"] == {"empty": 1, "not_an_image": 1, "corrupt": 1, "missing": 1}
    colours, squeezenet = record["networks"]
    assert (colours["target_layer"], colours["class_weights"]) == ("0", "3")
    assert squeezenet["weights"] == "random"
    assert squeezenet["sha256"] == load_network("squeezenet1_1", "random").digest()
    index = pd.read_parquet(output / "index.parquet")
    for folder in ("explanations", "predictions"):
        shards = index[index["path"].str.startswith(f"{folder}/")]
        images = shards.groupby("network")["images"].sum()
        assert images.to_dict() == dict.fromkeys(NETWORKS, len(good))
    assert not (output / ".checkpoint").exists()


def test_a_finished_run_is_left_alone(finished, capsys):
    output, *_ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    arguments = ["--input", str(output.parent / "manifest.csv"), "--output", str(output)]
    arguments += ["--top-k", "3", "--explain-label", "--methods", *METHODS, "--networks"]
    both = ["tests.tiny_networks:colours", "squeezenet1_1=random"]
    assert main(arguments + both) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(arguments + both[:1]) == 2
    assert "networks" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == before


def test_only_the_workers_of_networks_load_torch(tmp_path):
    """It would be most of what each of the others takes to start, in time and in memory."""
    output = str(tmp_path / "out")
    sent = (
        checkpoint(output),
        Decode([Preprocessing()], "center_crop", None),
        Localize([], ["grad_cam"], False, 0.0, None),
        ShardSink(output, {"explanations": (7, 7)}, None, 1.0),
    )
    program = "import pickle, sys; pickle.load(sys.stdin.buffer); print('torch' in sys.modules)"
    receiver = subprocess.run(
        [sys.executable, "-c", program], input=cloudpickle.dumps(sent), capture_output=True
    )
    assert receiver.stdout.strip() == b"False", receiver.stderr.decode()


def raw_maps(output):
    """The maps of a run of one network and layer, in a fixed order."""
    (folder,) = (output / "explanations").glob("*/*")
    rows = pq.read_table(folder, partitioning=None).sort_by(
        [(key, "ascending") for key in ("image_id", "class_id", "method")]
    )
    rows = rows.filter(pc.field("class_name") != "gray")  # its weights cancel each other
    found = rows["heatmap"].combine_chunks().to_numpy_ndarray().astype(np.float32)
    return found * rows["scale"].to_numpy()[:, None, None]


def maps_without_and_with(option, folder, tmp_path, capsys):
    """The maps of a run without an option and of one with it, which are not the same run."""
    maps = []
    for name, arguments in (("without", []), ("with", [f"--{option}"])):
        assert run(folder, tmp_path / name, *arguments) == 0
        maps.append(raw_maps(tmp_path / name))
    assert run(folder, tmp_path / "without", f"--{option}") == 2
    assert f"{option}: False → True" in capsys.readouterr().err
    return maps


@pytest.mark.long
def test_bfloat16_gives_the_same_maps_but_for_its_rounding(tmp_path, photo_folder, capsys):
    maps = maps_without_and_with("bfloat16", photo_folder(6), tmp_path, capsys)
    # Eight bits of mantissa; the network multiplies three times.
    differences = np.abs(maps[1] - maps[0]).max((1, 2)) / np.abs(maps[0]).max((1, 2))
    assert 1e-4 < differences.max() < 3 * 2**-8


@pytest.mark.long
def test_compiled_networks_give_the_same_maps(tmp_path, photo_folder, capsys):
    maps = maps_without_and_with("compile", photo_folder(3), tmp_path, capsys)
    assert np.abs(maps[1] - maps[0]).max() < 2**-10 * np.abs(maps[0]).max()


def test_gpus_that_are_not_there_decode_nothing(tmp_path, photo_folder, capsys):
    """And nothing is begun that could then be continued with GPUs alone."""
    assert run(photo_folder(1), tmp_path / "out", "--gpu-decode") == 2
    assert "--gpu-decode needs a GPU, and there is none here; leave it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.long
def test_failed_images_are_tried_again(tmp_path, photo):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(6):
        photo(40, 40, seed).save(folder / f"{seed}.png")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:60])
    (folder / "4.png").write_bytes(b"")
    output = tmp_path / "out"
    assert run(folder, output) == 0
    assert set(pd.read_parquet(output / "errors")["image_id"]) == {2, 4}
    (folder / "2.png").write_bytes(whole)
    assert run(folder, output, "--retry-errors") == 0
    assert pd.read_parquet(output / "errors")["image_id"].tolist() == [4]
    rows = pd.read_parquet(output / "explanations")
    assert len(rows) == 5 * 4 * 4
    assert not rows.duplicated(["image_id", "class_id", "method"]).any()


def test_maps_that_are_not_finite_are_errors(tmp_path, photo):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32), "white").save(folder / "white.png")
    photo(32, 32).save(folder / "fine.png")
    network = ["--networks", "tests.tiny_networks:not_a_number"]
    arguments = ["--input", str(folder), "--output", str(tmp_path / "out"), *network]
    assert main(arguments) == 0
    errors = pd.read_parquet(tmp_path / "out" / "errors")
    assert errors[["image_id", "stage", "error"]].values.tolist() == [[1, "explain", "not_finite"]]


def test_a_run_without_a_good_image_fails(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"")
    assert run(folder, tmp_path / "out") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "nowhere"], "no such input: nowhere"),
        (["--networks", "resnet1"], "unknown network 'resnet1'"),
        (["--networks", "resnet18=V9"], "resnet18 has no weights 'V9'"),
        (["--networks", "resnet18=gone.pth"], "cannot read checkpoint gone.pth"),
        (["--networks", "tests.tiny_networks:colours", "tests.tiny_networks:colours"], "twice"),
        (["--methods", "grad_cam", "no_cam"], "unknown method 'no_cam'"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--explain-label"], "needs labels"),
        (["--networks", "vgg11=random", "--methods", "gap_cam"], "supports none of the methods"),
        (["--output", "/proc/here"], "cannot write to output /proc/here"),
    ],
)
def test_what_cannot_run_is_one_line(tmp_path, photo_folder, capsys, arguments, said):
    output = tmp_path / "out"
    base = ["--input", str(photo_folder(2)), "--output", str(output)]
    base += ["--networks", "tests.tiny_networks:colours"]
    assert main(base + arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("explain: ")
    assert said in error
    assert not output.exists() or not list(output.iterdir())


def test_an_input_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    assert run(tmp_path, tmp_path.parent / "out") == 2
    assert "no images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file,label\na.jpg,1\n", "no column 'uri'"),
        ("uri,label\na.jpg,9\n", "4 classes"),
        ("uri,label\na.jpg,-2\n", "labels below 0"),
        ("uri,label\na.jpg,cat\n", "mean no one class"),
        ("uri,label\n,1\n", "rows without a uri"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_first_rows(tmp_path, capsys, content, said):
    (tmp_path / "manifest.csv").write_text(content)
    assert run(tmp_path / "manifest.csv", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()
