import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from made_runs import Images, Said, write_run
from PIL import Image

import scacam
import scacam.runs.images
from scacam import RunError
from scacam.inputs.containers import Place
from scacam.runs.describe import package_version

RAMP = np.arange(4, dtype=np.float32).reshape(2, 2)


@pytest.fixture
def run(tmp_path: Path) -> scacam.Run:
    """Two images of 40 × 20, the second one gone; maps of 2 × 2 and of 3 × 4."""
    Image.new("RGB", (40, 20), (90, 120, 30)).save(tmp_path / "a.png")
    maps = np.stack([RAMP, -RAMP])[:, None].repeat(2, 1)
    wide = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    views = np.array([[10, 0, 30, 20], [0, 0, 40, 20]])
    ids, shares = np.array([[1, 0], [2, 1]]), np.array([[0.7, 0.2], [0.6, 0.3]])
    names = ["cat", "dog", "emu"]
    images = Images(
        [str(tmp_path / "a.png"), str(tmp_path / "gone.png")],
        [(40, 20)] * 2,
        np.array([1, -1]),
        failed=["bad.jpg"],
    )
    both = {"sca_cam": maps, "grad_cam": 3 * maps}
    networks = {
        "small": Said(ids, shares, both, names, views=views),
        "wide": Said(ids, shares, {"sca_cam": wide}, names),
    }
    return scacam.open_run(write_run(tmp_path / "out", images, networks))


def test_explanations_are_selected_by_network_method_column_and_condition(run: scacam.Run) -> None:
    assert run.explanations().count_rows() == 12
    assert run.explanations("small").count_rows() == 8
    assert run.explanations("small", "grad_cam").count_rows() == 4
    first = pc.field("rank") == 1
    table = run.explanations(method="sca_cam", columns=["uri", "network"], where=first).to_table()
    assert table.column_names == ["uri", "network"]
    assert sorted(table["network"].to_pylist()) == ["small", "small", "wide", "wide"]


def test_all_networks_together_come_without_heatmaps(run: scacam.Run) -> None:
    assert "heatmap" not in run.explanations().to_table().column_names
    assert "heatmap" in run.explanations("wide").to_table().column_names
    with pytest.raises(RunError, match="one at a time"):
        run.explanations(columns=["heatmap"])


def test_heatmaps_come_back_raw_from_arrow_and_from_pandas(run: scacam.Run) -> None:
    table = run.explanations("small", "grad_cam").to_table()
    for row in (table.to_pylist()[0], table.to_pandas().iloc[0]):
        np.testing.assert_allclose(run.heatmap(row), 3 * RAMP, rtol=1e-3)


def test_heatmap_on_the_image_is_where_the_view_is(run: scacam.Run) -> None:
    row = run.explanations("small", "sca_cam").to_table().to_pylist()[0]
    placed = run.heatmap(row, on_image=True)
    assert placed.shape == (20, 40)
    assert np.isnan(placed[:, :10]).all()
    assert np.isnan(placed[:, 30:]).all()
    # Cells are 10 pixels; their centres lie at 15 and 25 across, at 5 and 15 down.
    np.testing.assert_allclose(placed[0, [10, 14, 29]], [0, 0, 1], atol=1e-3)
    np.testing.assert_allclose(placed[0, 15:25], np.arange(0.05, 1, 0.1), atol=1e-3)
    np.testing.assert_allclose(placed[19, [10, 29]], [2, 3], atol=1e-3)


def test_overlay_is_brightest_at_the_peak_and_shows_the_box(run: scacam.Run) -> None:
    row = run.explanations("small", "sca_cam").to_table().to_pylist()[0]
    row["box_x0"] = None
    pixels = np.asarray(run.overlay(row)).astype(int).sum(-1)
    assert pixels.shape == (20, 40)
    assert pixels[:, 10:30].argmax() // 20 >= 15
    assert pixels[2, 11] < pixels[18, 28]
    boxed = run.overlay({**row, "box_x0": 12.0, "box_y0": 2.0, "box_x1": 28.0, "box_y1": 18.0})
    assert np.asarray(boxed)[10, 13].tolist() == [255, 255, 255]


def test_maps_on_one_scale_keep_their_order(run: scacam.Run) -> None:
    row = run.explanations("small", "sca_cam").to_table().to_pylist()[0]
    row["box_x0"] = None
    own, common = (np.asarray(run.overlay(row, maximum=top)).sum() for top in (None, 12.0))
    assert common < own


def test_a_photo_that_is_gone_leaves_the_heatmap_on_grey(run: scacam.Run) -> None:
    gone = run.explanations("wide").to_table().to_pylist()[-1]
    assert run.photo(gone) is None
    assert run.overlay(gone).size == (40, 20)


def test_a_photo_that_was_replaced_is_not_shown(run: scacam.Run) -> None:
    row = run.explanations("wide").to_table().to_pylist()[0]
    assert run.photo(row) is not None
    Image.new("RGB", (41, 20)).save(row["uri"])
    assert run.photo(row) is None


def test_a_map_without_a_positive_value_is_dark_everywhere(run: scacam.Run) -> None:
    negative = run.explanations("small", "sca_cam").to_table().to_pylist()[2]
    assert run.heatmap(negative).max() <= 0
    assert len(run.overlay(negative).getcolors()) == 1


def test_errors_and_configuration(run: scacam.Run) -> None:
    assert run.errors["uri"].to_pylist() == ["bad.jpg"]
    assert list(run.networks) == ["small", "wide"]
    assert list(run.methods) == ["sca_cam", "grad_cam"]
    assert len(run.manifest) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet50"}, "no network 'resnet50'; it has small, wide"),
        ({"method": "cam"}, "no method 'cam'; it has sca_cam, grad_cam"),
        ({"columns": ["proba"]}, "no column 'proba'"),
    ],
)
def test_what_is_not_there_is_named(run: scacam.Run, arguments: dict, message: str) -> None:
    with pytest.raises(RunError, match=message):
        run.explanations(**arguments)


def test_a_row_without_its_heatmap_says_how_to_get_it(run: scacam.Run) -> None:
    row = run.explanations().to_table().to_pylist()[0]
    with pytest.raises(RunError, match=r"run\.explanations"):
        run.heatmap(row)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run\.json"):
        scacam.open_run(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema_version": "1"}'])
def test_a_broken_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        scacam.open_run(str(tmp_path))


def test_a_newer_schema_version_is_refused(run: scacam.Run) -> None:
    record = Path(run.path) / "run.json"
    record.write_text(json.dumps({**run.config, "schema_version": 99}))
    with pytest.raises(RunError, match=r"schema version 99.*newer scacam"):
        scacam.open_run(run.path)


def test_a_run_without_explanations_says_so(run: scacam.Run) -> None:
    for shard in Path(run.path).glob("explanations/*/*/*.parquet"):
        shard.unlink()
    with pytest.raises(RunError, match="has no explanations"):
        run.explanations("small")


def test_a_truncated_shard_is_named(run: scacam.Run) -> None:
    shard = next(Path(run.path).glob("explanations/network=small/*/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(RunError, match="network=small"):
        run.explanations("small").to_table()


def test_reading_needs_neither_torch_nor_ray() -> None:
    script = (
        "import sys, scacam; scacam.open_run;"
        "print(sorted({'torch', 'ray', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_shards_stay_plain_parquet(run: scacam.Run) -> None:
    shard = next(Path(run.path).glob("explanations/network=wide/*/*.parquet"))
    assert pq.read_schema(shard).field("heatmap").type.shape == [3, 4]


@pytest.mark.parametrize("indexed", [True, False])
def test_images_are_found_by_their_ids_with_and_without_an_index(
    tmp_path: Path, indexed: bool
) -> None:
    maps = np.random.default_rng(0).random((9, 1, 2, 2), dtype=np.float32)
    said = Said(np.zeros((9, 1), int), np.ones((9, 1)), {"sca_cam": maps}, ["cat"])
    images = Images([f"{i}" for i in range(9)], [(64, 64)] * 9, np.zeros(9, int))
    out = tmp_path / "network=other" / "out"  # folders above the output are no partitions
    write_run(out, images, {"net": said, "two": said}, shards=3)
    if not indexed:
        (out / "index.parquet").unlink()
    run = scacam.open_run(str(out))
    for asked in ([7, 0, 7], [4], [], [99], list(range(9))):
        found = run.explanations("net", image_ids=asked).to_table()
        assert found["image_id"].to_pylist() == sorted(set(asked) & set(range(9)))
        assert set(found["network"].to_pylist()) <= {"net"}
    both = run.explanations(image_ids=np.array([3, 8])).to_table().to_pylist()
    found = sorted((row["network"], row["image_id"]) for row in both)
    assert found == [("net", 3), ("net", 8), ("two", 3), ("two", 8)]


def test_shards_of_other_images_are_not_opened(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((9, 1, 2, 2), dtype=np.float32)
    said = Said(np.zeros((9, 1), int), np.ones((9, 1)), {"sca_cam": maps}, ["cat"])
    images = Images([f"{i}" for i in range(9)], [(64, 64)] * 9, np.zeros(9, int))
    run = scacam.open_run(write_run(tmp_path, images, {"net": said}, shards=3))
    for shard in (1, 2):
        (tmp_path / f"explanations/network=net/layer=features/{shard}.parquet").write_bytes(
            b"broken"
        )
    found = run.explanations("net", image_ids=[0, 2]).to_table()
    assert found["image_id"].to_pylist() == [0, 2]
    with pytest.raises(pa.ArrowInvalid):
        run.explanations("net", image_ids=[3]).to_table()


def test_images_are_looked_up_piece_by_piece(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scacam.runs.images, "_AT_ONCE", 64)
    columns = {"image_id": range(1000), "uri": [f"{i}.jpg" for i in range(1000)]}
    manifest = pa.table(columns | {"label": pa.array([None] * 999 + [3], pa.int32())})
    pq.write_table(manifest, tmp_path / "manifest.parquet", row_group_size=300)
    looked = scacam.runs.images.Images(str(tmp_path))
    assert (looked.count, looked.labelled) == (1000, True)
    for asked in ([], [999, 0], [301, 299, 300, 300], [-1, 1000], range(50, 700)):
        expected = sorted(set(asked) & set(range(1000)))
        rows = looked.rows(asked, ["image_id", "uri", "offset"])
        assert rows.column_names == ["image_id", "uri"]
        assert rows["image_id"].to_pylist() == expected
        assert looked.places(asked) == {i: Place(f"{i}.jpg", None, None) for i in expected}
    with pytest.raises(RunError, match="cannot read"):
        scacam.runs.images.Images(str(tmp_path / "none")).rows([0], ["uri"])


def test_a_package_that_another_stands_in_for_has_no_version():
    assert package_version("numpy") == np.__version__
    assert package_version("opencv of conda") is None
