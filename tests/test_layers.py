"""Runs of several layers, and runs from before a network had more than one.

Their storage, every reader of it, the jobs that look at it, and the job that writes it, killed.
"""

import json
import shutil
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from killing import killed_and_begun_again
from made_runs import Images, Said, as_version_1, write_run
from PIL import Image

import scacam
from scacam import RunError
from scacam.audit.agreement import Agreement, Compare
from scacam.audit.compare import compare_runs, pair_claimants
from scacam.audit.maps import judge, top_maps
from scacam.audit.passes import Opening, top_answers
from scacam.images import decode, pixels, view_of
from scacam.jobs import compare, evaluate, pictures, report
from scacam.runs.proof import prove
from scacam.tables import claimant_names

ROOT = Path(__file__).parent.parent
SIDE = 64
RIGHT, WRONG = (16, 16, 48, 48), (0, 0, 16, 16)


def spot(cells: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A map of so many cells that is 1 inside of a box of the view, 0 elsewhere."""
    centres = (np.arange(cells) + 0.5) * SIDE / cells
    x0, y0, x1, y1 = box
    inside = [(low <= centres) & (centres < high) for low, high in ((y0, y1), (x0, x1))]
    return np.outer(*inside).astype(np.float32)


def said(count: int, several: bool) -> Said:
    """Two methods of one layer or of two: of `sca_cam` only the finer one finds the object."""
    maps = {(cells, box): np.tile(spot(cells, box), (count, 1, 1, 1))
            for cells in (4, 8) for box in (RIGHT, WRONG)}  # fmt: skip
    coarse = {"sca_cam": maps[4, WRONG], "grad_cam": maps[4, RIGHT]}
    fine = {"sca_cam": maps[8, RIGHT], "extent_cam": maps[8, RIGHT]}
    return Said(
        np.zeros((count, 1), int),
        np.full((count, 1), 0.9),
        coarse,
        ["ape"],
        (SIDE, SIDE),
        others={"_fine.0": fine} if several else {},
    )


def made(folder: Path, several: bool = True, count: int = 6) -> scacam.Run:
    photos = folder / "photos"
    photos.mkdir(parents=True)
    uris = [str(photos / f"{index}.png") for index in range(count)]
    for uri in uris:
        Image.new("RGB", (SIDE, SIDE), (90, 120, 30)).save(uri)
    images = Images(uris, [(SIDE, SIDE)] * count, np.zeros(count, int), ["gone.jpg"])
    networks = {"one": said(count, several), "two": said(count, several=False)}
    out = folder / "out"
    write_run(out, images, networks, shards=2)
    record = json.loads((out / "run.json").read_text())
    for network in record["networks"]:
        network["preprocessing"] = {"crop_size": [SIDE, SIDE]}
    (out / "run.json").write_text(json.dumps(record))
    return scacam.open_run(str(out))


@pytest.fixture
def run(tmp_path: Path) -> scacam.Run:
    return made(tmp_path)


@pytest.fixture
def boxes(tmp_path: Path) -> str:
    path = tmp_path / "boxes.csv"
    rows = [f"{index}.png,{','.join(map(str, RIGHT))}" for index in range(6)]
    path.write_text("\n".join(["file,x0,y0,x1,y1", *rows]))
    return str(path)


# --- Reading


def test_names_say_the_layer_only_where_there_are_several(run: scacam.Run) -> None:
    assert [(each.name, each.map_shape) for each in run.claimants("one")] == [
        ("sca_cam (features)", (4, 4)),
        ("grad_cam", (4, 4)),
        ("sca_cam (_fine.0)", (8, 8)),
        ("extent_cam", (8, 8)),
    ]
    assert [each.name for each in run.claimants("two")] == ["sca_cam", "grad_cam"]
    assert claimant_names([(None, "whole_image")]) == {(None, "whole_image"): "whole_image"}


def test_explanations_are_selected_by_layer(run: scacam.Run) -> None:
    assert run.explanations().count_rows() == 36
    assert run.explanations("one").count_rows() == 24
    assert run.explanations("one", layer="_fine.0").count_rows() == 12
    assert run.explanations(layer="features").count_rows() == 24
    assert run.explanations("one", "sca_cam").count_rows() == 12
    assert run.explanations("one", "sca_cam", layer="_fine.0").count_rows() == 6
    assert run.explanations("one", "grad_cam", layer="_fine.0").count_rows() == 0
    table = run.explanations(columns=["network", "layer"]).to_table()
    assert set(zip(*table.to_pydict().values(), strict=True)) == {
        ("one", "features"), ("one", "_fine.0"), ("two", "features"),
    }  # fmt: skip
    with pytest.raises(RunError, match="no layer 'layer4'; it has features, _fine"):
        run.explanations("one", layer="layer4")
    with pytest.raises(RunError, match=r"no layer '_fine\.0'; it has features"):
        run.explanations("two", layer="_fine.0")


def test_heatmaps_have_their_shape_whether_one_or_several_layers_are_read(run: scacam.Run) -> None:
    tensor = pa.fixed_shape_tensor(pa.float16(), (8, 8))
    for asked in ({"layer": "_fine.0"}, {"method": "extent_cam"}):
        assert run.explanations("one", **asked).to_table().schema.field("heatmap").type == tensor
    mixed = run.explanations("one", "sca_cam", image_ids=[3]).to_table()
    assert mixed.schema.field("heatmap").type == pa.list_(pa.float16())
    for row in (*mixed.to_pylist(), *mixed.to_pandas().to_dict("records")):
        expected = spot(4, WRONG) if row["layer"] == "features" else spot(8, RIGHT)
        np.testing.assert_array_equal(run.heatmap(row), expected)


def test_any_reader_opens_a_layer_with_its_shape_and_all_other_columns_across(
    run: scacam.Run,
) -> None:
    read_by_anyone(Path(run.path), {("one", "features"): 4, ("one", "_fine.0"): 8})


def read_by_anyone(out: Path, sides: dict[tuple[str, str], int]) -> None:
    """What pyarrow, pandas, DuckDB and Polars read of some layers, and across all of them."""
    folder, pattern = out / "explanations", f"{out}/explanations/**/*.parquet"
    counts = {}
    for (network, layer), side in sides.items():
        of_layer = folder / f"network={network}" / f"layer={layer}"
        table = ds.dataset(of_layer).to_table()
        counts[network, layer] = len(table)
        assert table["heatmap"].type.shape == [side, side]
        assert table["heatmap"].combine_chunks().to_numpy_ndarray().shape[1:] == (side, side)
        assert {len(cells) for cells in pd.read_parquet(of_layer)["heatmap"]} == {side**2}
        found = duckdb.sql(f"select distinct len(heatmap) from read_parquet('{of_layer}/*')")
        assert found.fetchall() == [(side**2,)]
        assert len(polars.read_parquet(f"{of_layer}/*.parquet")["heatmap"][0]) == side**2
    columns = ["network", "layer", "image_id", "method", "peak_x"]
    tables = [
        ds.dataset(folder, partitioning="hive").to_table(columns).to_pandas(),
        pd.read_parquet(folder, columns=columns),
        duckdb.sql(f"select {', '.join(columns)} from read_parquet('{pattern}')").df(),
        polars.scan_parquet(pattern, hive_partitioning=True).select(columns).collect().to_pandas(),
    ]
    for frame in tables:
        sizes = frame.groupby(["network", "layer"], observed=True).size().to_dict()
        assert counts.items() <= sizes.items()


# --- The proof


def test_the_proof_wants_every_layer_whole(run: scacam.Run) -> None:
    out, networks = Path(run.path), run.config["networks"]
    assert prove(run.path, networks, 7).explained == 6
    index = prove(run.path, networks, 7).index.to_pandas()
    rows = index.groupby(["network", "layer"])["rows"].sum()
    assert rows.to_dict() == {
        ("one", "features"): 12,
        ("one", "_fine.0"): 12,
        ("two", "features"): 12,
    }
    shard = out / "explanations/network=one/layer=_fine.0/1.parquet"
    whole = pq.ParquetFile(shard).read()

    def refused(message: str) -> None:
        with pytest.raises(RunError, match=message):
            prove(run.path, networks, 7)

    pq.write_table(whole.slice(1), shard)
    refused("has not every method once, of class 0 of image 3")
    pq.write_table(whole.slice(2), shard)
    refused("layer _fine.0 of one, 1 images are there neither .*, the first is image 3")
    pq.write_table(pa.concat_tables([whole, whole.slice(0, 1)]), shard)
    refused("_fine.0/1.parquet has not every method once, of class 0 of image 3")
    pq.write_table(pa.concat_tables([whole.slice(0, 1), whole.slice(0, 1), whole.slice(2)]), shard)
    refused("_fine.0/1.parquet has not every method once, of class 0 of image 3")
    shutil.copy(out / "explanations/network=one/layer=features/1.parquet", shard)
    refused("has rows of grad_cam, which this layer has not")
    shutil.rmtree(shard.parent)
    refused("layer _fine.0 of one, 6 images are there neither")


# --- The other jobs


def test_evaluation_tells_layers_apart(run: scacam.Run, boxes: str) -> None:
    result = evaluate.run(run=run.path, boxes=boxes)
    found = pd.read_parquet(Path(run.path) / "metrics/localization.parquet")
    found = found[(found["network"] == "one") & (found["metric"] == "max_box_acc")]
    values = {(row.method, row.layer or None): row.value for row in found.fillna("").itertuples()}
    assert values == {
        ("sca_cam", "features"): 0, ("grad_cam", "features"): 1,
        ("sca_cam", "_fine.0"): 1, ("extent_cam", "_fine.0"): 1,
        ("center_gaussian", None): 1, ("whole_image", None): 0,
    }  # fmt: skip
    pairs = pd.read_parquet(Path(run.path) / "metrics/differences.parquet")
    pairs = pairs[(pairs["network"] == "one") & (pairs["metric"] == "max_box_acc")]
    assert len(pairs) == 15
    same = pairs[(pairs["method"] == "sca_cam") & (pairs["other"] == "sca_cam")]
    assert same[["layer", "other_layer", "difference"]].values.tolist() == [
        ["features", "_fine.0", -1]
    ]
    images = pd.read_parquet(Path(run.path) / "metrics/localization_images")
    images = images[images["network"] == "one"]
    overlap = images.groupby(["method", "layer"], dropna=False)["iou_any"].agg(["size", "min"])
    assert (overlap["size"] == 6).all()
    assert overlap["min"]["sca_cam", "features"] < 0.5 < overlap["min"]["sca_cam", "_fine.0"]
    told = str(result)
    assert "sca_cam (features)" in told
    assert "\nextent_cam" in told
    page = Path(report.run(run=run.path).path).read_text()
    for name in ("sca_cam (_fine.0)", "sca_cam (features)", "extent_cam"):
        assert f"<code>{name}</code>" in page
    order = ["sca_cam (features)", "extent_cam", "grad_cam", "sca_cam (_fine.0)"]
    places = [page.index(f'alt="{name} of one') for name in order]
    assert places == sorted(places)


def test_masks_are_measured_layer_by_layer(run: scacam.Run, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for index in range(6):
        Image.fromarray(spot(SIDE, RIGHT).astype(np.uint8)).save(masks / f"{index}.png")
    result = evaluate.run(run=run.path, masks=str(masks))
    rows = {(row["network"], row["method"], row["layer"]): row["value"]
            for row in result.rows["localization"]}  # fmt: skip
    assert rows["one", "sca_cam", "_fine.0"] > 0.9 > 0.5 > rows["one", "sca_cam", "features"]
    assert rows["two", "grad_cam", "features"] > 0.9


def test_the_audit_is_judged_by_evidence_of_the_target_layer(run: scacam.Run) -> None:
    assert judge(run, "one").name == "sca_cam (features)"
    (answers, *_) = top_answers(run, run.image_ids, None)["one"]
    assert answers.shares.shape[1:] == (4, 4)
    alike, lie = Agreement.merge([Compare(Opening(run.path))(run.image_ids)]).tables(run)
    names = {("sca_cam", "features"), ("grad_cam", "features"), ("sca_cam", "_fine.0")}
    own = [row for row in lie.to_pylist() if row["network"] == "one"]
    assert {(row["method"], row["layer"]) for row in own} == names | {("extent_cam", "_fine.0")}
    found = {
        (row["method"], row["layer"], row["other_method"], row["other_layer"]): row
        for row in alike.to_pylist()
        if row["network"] == row["other_network"] == "one"
    }
    correlation = {pair: row["rank_correlation"] for pair, row in found.items()}
    assert correlation["sca_cam", "_fine.0", "extent_cam", "_fine.0"] == pytest.approx(1)
    # The same place, on grids of two sizes.
    assert 0.7 < correlation["grad_cam", "features", "sca_cam", "_fine.0"] < 1
    assert correlation["sca_cam", "features", "grad_cam", "features"] < 0
    (pair,) = (row for row in alike.to_pylist() if row["network"] != row["other_network"])
    assert (pair["method"], pair["images"], pair["moved"]) == ("sca_cam", 6, 0)


def test_runs_are_compared_layer_by_layer(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b")
    other = made(tmp_path / "c", several=False)
    named = lambda runs, names: [  # noqa: E731
        (one.name, each.name) for one, each in pair_claimants(*runs, names)
    ]
    every = ["sca_cam (features)", "grad_cam", "sca_cam (_fine.0)", "extent_cam"]
    assert named((first, second), ("one", "one")) == [(name, name) for name in every]
    expected = [("sca_cam (features)", "sca_cam"), ("grad_cam", "grad_cam")]
    assert named((first, other), ("one", "one")) == expected
    for place in ("target_layer", "layers"):  # another architecture calls its layers otherwise
        described = other.networks["one"]
        layers = {"norm": described["layers"]["features"]} if place == "layers" else "norm"
        described[place] = layers
    assert named((first, other), ("one", "one")) == expected
    for path in (first.path, second.path):
        photos = Path(path).parent / "photos"
        manifest = pq.read_table(f"{path}/manifest.parquet")
        uris = [f"{index}.png" for index in range(len(manifest))]
        pq.write_table(manifest.set_column(1, "uri", [uris]), f"{path}/manifest.parquet")
        assert photos.exists()
    runs = [scacam.open_run(path) for path in (first.path, second.path)]
    tables = [found.table for found in compare_runs(*runs)]
    assert sum(map(len, tables)) == 6 * (4 + 2)
    keys = [
        tuple(table[name][0].as_py() for name in ("network_a", "method", "layer_a", "layer_b"))
        for table in tables
    ]
    assert ("one", "sca_cam", "_fine.0", "_fine.0") in keys
    assert all(table["moved"].to_pylist() == [0] * 6 for table in tables)
    page = Path(compare.run(runs=[first.path, second.path]).page).read_text()
    assert "<code>sca_cam (_fine.0)</code>" in page


def test_pictures_show_every_layer(run: scacam.Run, tmp_path: Path) -> None:
    rows = dict(pictures.images(run))[2]
    assert [(row["layer"], row["method"]) for row in rows["one"]] == [
        ("features", "sca_cam"), ("features", "grad_cam"),
        ("_fine.0", "sca_cam"), ("_fine.0", "extent_cam"),
    ]  # fmt: skip
    assert pictures.run(run=run.path, limit=2).pictures == 2


# --- Schema version 1


def test_a_run_of_version_1_is_read_as_having_its_target_layer(tmp_path: Path, boxes: str) -> None:
    new, old = made(tmp_path / "new", several=False), made(tmp_path / "old", several=False)
    as_version_1(Path(old.path))
    assert (Path(old.path) / "explanations/network=one/0.parquet").exists()
    old = scacam.open_run(old.path)
    assert old.config["schema_version"] == 1
    assert old.claimants("one") == new.claimants("one")
    for asked in ({}, {"network": "two"}, {"network": "one", "layer": "features"},
                  {"method": "grad_cam", "image_ids": [0, 5]}):  # fmt: skip
        tables = [run.explanations(**asked).to_table().drop_columns("uri") for run in (old, new)]
        assert tables[0].equals(tables[1])
    maps = [top_maps(run, "one", np.arange(6)) for run in (old, new)]
    np.testing.assert_array_equal(*(found["sca_cam"].heatmaps for found in maps))
    results = [evaluate.run(run=run.path, boxes=boxes) for run in (old, new)]
    assert results[0].rows == results[1].rows
    assert {row["layer"] for row in results[0].rows["localization"]} == {"features", None}
    assert old.metrics("localization_images") is not None
    assert "sca_cam" in Path(report.run(run=old.path).path).read_text()
    assert pictures.run(run=old.path, limit=1).pictures == 1
    rows = pq.read_table(compare.run(runs=[old.path, old.path]).table)
    assert len(rows) == 6 * (2 + 2)
    assert set(rows["layer_a"].to_pylist()) == {"features"}


def test_metrics_that_an_older_scacam_left_are_shown(tmp_path: Path, boxes: str) -> None:
    run = made(tmp_path / "run", several=False)
    evaluate.run(run=run.path, boxes=boxes)
    for path in (Path(run.path) / "metrics").rglob("*.parquet"):
        table = pq.ParquetFile(path).read()
        layers = [name for name in table.column_names if name.endswith("layer")]
        pq.write_table(table.drop_columns(layers), path)
    page = Path(report.run(run=run.path).path).read_text()
    assert "the worst" in page
    assert "more than noise" in page


# --- The job


@pytest.mark.long
def test_a_job_over_two_networks_and_two_layers_each_killed_and_resumed(
    tmp_path: Path, module_photo
) -> None:
    methods = ("grad_cam", "sca_cam", "extent_cam")
    sides = {
        ("resnet18", "layer3"): 14, ("resnet18", "layer4"): 7,
        ("squeezenet1_1", "features.7"): 27, ("squeezenet1_1", "features"): 13,
    }  # fmt: skip
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for seed in range(96):
        module_photo(240, 230, seed).save(folder / f"{seed:04d}.jpg")
    command = [sys.executable, "jobs/explain.py", "--input", str(folder), "--output", str(out)]
    command += ["--networks", "resnet18=random", "squeezenet1_1=random", "--top-k", "2"]
    command += ["--methods", *methods, "--target-layer", *map("=".join, sides)]
    said = killed_and_begun_again(command, out)
    assert "96 of 96 images explained" in said
    read_by_anyone(out, sides)
    run = scacam.open_run(str(out))
    for name, described in run.networks.items():
        layers = {
            layer: {"methods": list(methods[:2]), "map_shape": [side, side]}
            for (network, layer), side in sides.items()
            if network == name
        }
        finer, target = layers
        layers[finer]["methods"] = list(methods)
        assert (described["finer_layer"], described["target_layer"]) == (finer, target)
        assert described["layers"] == layers
        network = scacam.load_network(name, "random", target_layer=list(layers))
        explainer = scacam.Explainer(network, methods, top_k=2)
        table = run.explanations(name, image_ids=[0, 95]).to_table().to_pylist()
        assert len(table) == 2 * 2 * 5
        for image_id in (0, 95):
            image = decode((folder / f"{image_id:04d}.jpg").read_bytes())
            view = view_of(*image.size, network.preprocessing, "center_crop")
            seen = torch.from_numpy(pixels(image, view, network.preprocessing).copy())[None]
            expected = explainer(network.normalize(seen)).layers
            for row in table:
                if row["image_id"] == image_id:
                    maps = expected[row["layer"]][row["method"]][0, row["rank"] - 1].numpy()
                    tolerance = 2e-3 * np.abs(maps).max()
                    np.testing.assert_allclose(run.heatmap(row), maps, rtol=0, atol=tolerance)
