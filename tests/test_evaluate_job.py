"""The evaluate job, on a real embedded Ray, over runs whose metrics are known by hand."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_runs import Images, Said, write_run
from servers import BUCKET, ObjectStore

from scacam.evaluation import intervals
from scacam.evaluation.tables import CURVES, DIFFERENCES, IMAGE_SCORES, LOCALIZATION
from scacam.jobs.command import run_job

main = partial(run_job, "evaluate")

SIDE = 224
ACCURACIES = ("max_box_acc", "max_box_acc_v2", "box_acc_15", "box_acc_20")
POINTING = ("pointing_game", "pointing_game_0")
METHODS = ("feature_map", "grad_cam")


def block(x0: int, y0: int, x1: int, y1: int, below: float = 0.0) -> np.ndarray:
    """A map of the grid's own size: 1 in a block, `below` in all other cells."""
    cells = np.full((SIDE, SIDE), below)
    cells[y0:y1, x0:x1] = 1
    return cells


def described(folder: Path, **changes) -> None:
    """Say in `run.json` what the network's input is, and whatever else."""
    record = json.loads((folder / "run.json").read_text())
    for network in record["networks"]:
        network["preprocessing"] = {"crop_size": [SIDE, SIDE]}
    (folder / "run.json").write_text(json.dumps({**record, **changes}))


def made_run(folder: Path, labels, class_ids, feature_maps, grad_cams, views=None) -> str:
    """A run of two methods. Maps are given for the labelled class, others point nowhere near."""
    count, classes = np.shape(class_ids)
    heatmaps = {}
    for method, maps in zip(METHODS, (feature_maps, grad_cams), strict=True):
        heatmaps[method] = np.tile(block(0, 0, 3, 3), (count, classes, 1, 1))
        for image, label in enumerate(labels):
            at = np.flatnonzero(np.asarray(class_ids[image]) == label)
            heatmaps[method][image, at] = maps[image]
    said = Said(
        np.array(class_ids),
        np.full((count, classes), 0.5),
        heatmaps,
        ["ape", "bee", "cat"],
        (SIDE, SIDE),
        None if views is None else np.array(views),
    )
    uris = [f"/photos/{image} of {count}.jpg" for image in range(count)]
    images = Images(uris, [(SIDE, SIDE)] * count, np.array(labels), ["/photos/broken.jpg"])
    path = write_run(folder, images, {"net": said}, shards=2)
    described(folder)
    return path


TRUTH = (40, 60, 120, 160)
NEAR = (131, 60, 200, 160)  # its peak, its first pixel, is 11.5 pixels from the truth


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Four images that count, three that do not."""
    folder = tmp_path_factory.mktemp("evaluate")
    right, wrong = block(*TRUTH), block(*NEAR)
    # The last is right with the ReLU that belongs to Grad-CAM alone.
    relu = np.where(right > 0, 0.6, -0.4)
    relu[0, :] = -1.4
    maps = [right, right, wrong, right, right, right, relu]
    labels = [0, 1, 0, 0, 0, -1, 0]
    class_ids = [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]]
    path = made_run(folder / "out", labels, class_ids, maps, maps)
    # The image that failed has a label.
    manifest = pq.read_table(folder / "out/manifest.parquet").to_pylist()
    manifest[-1]["label"] = 2
    schema = pq.read_schema(folder / "out/manifest.parquet")
    pq.write_table(pa.Table.from_pylist(manifest, schema), folder / "out/manifest.parquet")
    rows = [
        *(("0 of 7.jpg", *TRUTH, 0), ("1 of 7.jpg", *TRUTH, 1), ("2 of 7.jpg", *TRUTH, 0)),
        # Two objects, of which the second is the one, and one of another class.
        *(("3 of 7.jpg", 0, 0, 20, 20, 0), ("3 of 7.jpg", *TRUTH, 0), ("3 of 7.jpg", *NEAR, 2)),
        # Image 4 has no box, image 5 no label.
        *(("5 of 7.jpg", *TRUTH, 0), ("6 of 7.jpg", *TRUTH, 0)),
        *(("broken.jpg", *TRUTH, 2), ("elsewhere.jpg", *TRUTH, 0), ("nowhere.jpg", *TRUTH, 0)),
    ]
    boxes = pd.DataFrame(rows, columns=["file", "x0", "y0", "x1", "y1", "class_id"])
    boxes.to_csv(folder / "boxes.csv", index=False)
    assert main(["--run", path, "--boxes", str(folder / "boxes.csv")]) == 0
    return folder / "out"


def values(output: Path) -> pd.Series:
    rows = pd.read_parquet(output / "metrics/localization.parquet")
    assert not rows.duplicated(["network", "method", "metric"]).any()
    return rows.set_index(["method", "metric"]).value


def test_tables_have_their_schemas(evaluated):
    metrics = evaluated / "metrics"
    assert pq.read_schema(metrics / "localization.parquet") == LOCALIZATION
    assert pq.read_schema(metrics / "differences.parquet") == DIFFERENCES
    assert pq.read_schema(metrics / "localization_curves.parquet") == CURVES
    (first, *_) = (metrics / "localization_images/network=net").glob("*.parquet")
    assert pq.read_schema(first).remove_metadata() == IMAGE_SCORES


def test_metrics_by_hand(evaluated):
    found = values(evaluated)
    # Five images count. All are right but the one whose block is elsewhere, and in one of these
    # the label is not the top class.
    for metric in ACCURACIES:
        assert found["grad_cam", metric] == pytest.approx(4 / 5), metric
        assert found["grad_cam", f"top1_{metric}"] == pytest.approx(3 / 5), metric
    assert found["grad_cam", "pointing_game"] == 1
    assert found["grad_cam", "pointing_game_0"] == pytest.approx(4 / 5)
    assert found["grad_cam", "top1_pointing_game"] == pytest.approx(4 / 5)
    assert found["grad_cam", "energy_pointing_game"] == pytest.approx(4 / 5, abs=1e-6)
    rows = pd.read_parquet(evaluated / "metrics/localization.parquet")
    assert set(rows.images) == {5}
    assert set(rows.network) == {"net"}
    assert set(rows.method) == {*METHODS, "center_gaussian", "whole_image"}
    tops = {f"top1_{metric}" for metric in (*ACCURACIES, *POINTING)}
    assert set(rows.metric) == {*ACCURACIES, *POINTING, "energy_pointing_game", *tops}
    assert ((rows.ci_low <= rows.value) & (rows.value <= rows.ci_high)).all()


def test_the_whole_image_by_hand(evaluated):
    found = values(evaluated)
    # 81 × 101 of 224 × 224 pixels are less than 0.3.
    assert found["whole_image", "max_box_acc_v2"] == 0
    share = 80 * 100 / SIDE**2
    both = share + 20 * 20 / SIDE**2
    assert found["whole_image", "energy_pointing_game"] == pytest.approx((4 * share + both) / 5)
    # The centre, at 112, 112, is in the box.
    assert found["whole_image", "pointing_game_0"] == 1


def test_rows_of_images(evaluated):
    rows = pd.read_parquet(evaluated / "metrics/localization_images/network=net")
    assert len(rows) == 5 * 4
    mine = rows[rows.method == "grad_cam"].set_index("image_id").sort_index()
    assert mine.index.tolist() == [0, 1, 2, 3, 6]
    assert mine.top1.tolist() == [True, False, True, True, True]
    assert mine.uri[3] == "/photos/3 of 7.jpg"
    assert mine.iou[[0, 1, 3, 6]].tolist() == [1.0] * 4  # both boxes end one pixel late
    assert mine.iou[2] == mine.iou_any[2] == 0
    assert mine.iou_20.tolist() == [1, 1, 0, 1, 1]
    assert mine.peak_distance.tolist() == [0, 0, 11.5, 0, 0]
    np.testing.assert_allclose(mine.energy, [1, 1, 0, 1, 1], atol=1e-6)


def test_curves(evaluated):
    rows = pd.read_parquet(evaluated / "metrics/localization_curves.parquet")
    curve = rows[(rows.method == "feature_map") & (rows.metric == "max_box_acc")]
    assert len(curve) == 255
    # Without the ReLU the last map is right above its background alone: 1 / 2 of its range.
    low, high = curve[curve.threshold < 0.49].accuracy, curve[curve.threshold > 0.51].accuracy
    assert set(low) == {3 / 5}
    assert set(high) == {4 / 5}
    assert set(rows[rows.metric == "max_box_acc_v2"].iou) == {0.3, 0.5, 0.7}


def test_differences(evaluated):
    rows = pd.read_parquet(evaluated / "metrics/differences.parquet")
    rows = rows.set_index(["metric", "method", "other"])
    assert rows.difference["box_acc_20", "feature_map", "grad_cam"] == 0
    pair = rows.loc[("max_box_acc", "grad_cam", "whole_image")]
    assert pair.difference == pytest.approx(4 / 5)
    assert pair.ci_low > 0
    assert len(rows) == 13 * 4 * 3 / 2


def test_everything_left_out_is_counted(evaluated, capsys):
    boxes = evaluated.parent / "boxes.csv"
    assert main(["--run", str(evaluated), "--boxes", str(boxes)]) == 0
    told = capsys.readouterr().out
    assert "2 boxes of images that are not in the run" in told
    assert "1 boxes of images without a label" in told
    assert "1 boxes of other classes than the label" in told
    assert "1 images without a label" in told
    assert "1 labelled images without a box" in told
    assert "net: 5 images evaluated; left out: 1 images that failed" in told
    assert "MaxBoxAccV2 of feature_map minus that of" in told
    # A second evaluation replaces the first.
    assert len(pd.read_parquet(evaluated / "metrics/localization_images/network=net")) == 20


def test_a_centre_crop_and_what_lies_outside(tmp_path, capsys):
    # The view is the right half, stretched to the grid. Of the first image one object is in it,
    # of the second a part of one, of the third none.
    views = [[112, 0, 224, 224]] * 3
    maps = [block(56, 0, 112, 224), block(0, 0, 56, 112), block(0, 0, 9, 9)]
    path = made_run(tmp_path / "out", [0, 0, 0], [[0, 1]] * 3, maps, maps, views)
    boxes = pd.DataFrame(
        [
            *(("0 of 3.jpg", 140, 0, 168, 224), ("0 of 3.jpg", 0, 0, 50, 50)),
            *(("1 of 3.jpg", 0, 0, 140, 112), ("2 of 3.jpg", 0, 0, 112, 9)),
        ],
        columns=["file", "x0", "y0", "x1", "y1"],
    )
    boxes.to_parquet(tmp_path / "boxes.parquet")
    assert main(["--run", path, "--boxes", str(tmp_path / "boxes.parquet")]) == 0
    told = capsys.readouterr().out
    assert "2 images evaluated; left out: 1 images without an object inside the view" in told
    assert "2 objects outside of the view" in told
    found = values(tmp_path / "out")
    for metric in (*ACCURACIES, *POINTING):
        assert found["feature_map", metric] == 1, metric
    assert found["feature_map", "energy_pointing_game"] == pytest.approx(1)


def test_without_maps_of_the_label_there_is_the_top_class_alone(tmp_path, capsys):
    maps = [block(*TRUTH)] * 4
    path = made_run(tmp_path / "out", [0, 1, 2, 0], [[0], [0], [0], [0]], maps, maps)
    boxes = pd.DataFrame(
        [(f"/photos/{image} of 4.jpg", *TRUTH) for image in range(4)],
        columns=["uri", "x0", "y0", "x1", "y1"],
    )
    boxes.to_csv(tmp_path / "boxes.csv", index=False)
    assert main(["--run", path, "--boxes", str(tmp_path / "boxes.csv")]) == 0
    told = capsys.readouterr().out
    assert "2 images have no map of their labelled class" in told
    assert "--explain-label" in told
    found = values(tmp_path / "out")
    assert all(metric.startswith("top1_") for _, metric in found.index)
    # Two of four are recognised, and these are right.
    assert found["feature_map", "top1_max_box_acc"] == 0.5
    rows = pd.read_parquet(tmp_path / "out/metrics/localization_images/network=net")
    assert set(rows.image_id) == {0, 3}


def test_masks(tmp_path, capsys):
    right, wrong = block(*TRUTH), block(*NEAR)
    path = made_run(
        tmp_path / "out", [0] * 4, [[0, 1]] * 4, [right] * 4, [right, wrong, right, right]
    )
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = right.astype(np.uint8)
    mask[0, :] = 255
    for image in range(2):
        cv2.imwrite(str(masks / f"{image} of 4.png"), mask)
    cv2.imwrite(str(masks / "2 of 4.png"), np.zeros((9, 9, 3), np.uint8))
    cv2.imwrite(str(masks / "stray.png"), mask)
    assert main(["--run", path, "--masks", str(masks)]) == 0
    told = capsys.readouterr().out
    assert "1 masks of images that are not in the run" in told
    assert "1 labelled images without a mask" in told
    assert "2 images evaluated; left out: 1 images whose mask is no gray PNG" in told
    found = values(tmp_path / "out")
    inside = mask == 1
    rest = 2 * (mask != 255).sum()
    assert found["feature_map", "pxap"] == pytest.approx(1)
    # A constant map finds as much as chance does.
    assert found["whole_image", "pxap"] == pytest.approx(2 * inside.sum() / rest)
    # Half of the object's pixels at precision n / (n + m), the other half at that of chance.
    first = inside.sum() / (inside.sum() + ((wrong > 0) & (mask == 0)).sum())
    expected = (first + 2 * inside.sum() / rest) / 2
    assert found["grad_cam", "pxap"] == pytest.approx(expected)
    assert pd.read_parquet(tmp_path / "out/metrics/localization.parquet").images.eq(2).all()


@pytest.fixture
def small_run(tmp_path) -> str:
    maps = [block(*TRUTH)] * 2
    return made_run(tmp_path / "out", [0, 0], [[0, 1]] * 2, maps, maps)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,x0,y0,x1\n0 of 2.jpg,1,2,3\n", "no column y1"),
        ("name,x0,y0,x1,y1\n0 of 2.jpg,1,2,3,4\n", "no column file"),
        ("file,x0,y0,x1,y1\n0 of 2.jpg,5,2,3,4\n", "1 rows are no boxes"),
        ("file,x0,y0,x1,y1\n0 of 2.jpg,a,2,3,4\n", "1 rows are no boxes"),
        ("file,x0,y0,x1,y1\nother.jpg,1,2,3,4\n", "1 boxes of images that are not in the run"),
        ("", "cannot read boxes"),
    ],
)
def test_boxes_that_cannot_be_used_are_refused(small_run, tmp_path, capsys, content, message):
    (tmp_path / "boxes.csv").write_text(content)
    assert main(["--run", small_run, "--boxes", str(tmp_path / "boxes.csv")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("evaluate: ")
    assert message in told
    assert told.count("\n") == 1


def test_runs_that_cannot_be_evaluated_are_refused(small_run, tmp_path, capsys):
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("file,x0,y0,x1,y1\n0 of 2.jpg,1,2,3,4\n")
    assert main(["--run", str(tmp_path / "no"), "--boxes", str(boxes)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["--run", small_run, "--boxes", str(tmp_path / "no.csv")]) == 2
    assert "cannot read boxes" in capsys.readouterr().err
    assert main(["--run", small_run, "--masks", str(tmp_path / "no")]) == 2
    assert "cannot list masks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--run", small_run])
    described(Path(small_run), status="running")
    assert main(["--run", small_run, "--boxes", str(boxes)]) == 2
    assert "not complete" in capsys.readouterr().err


def test_zero_images_are_refused(small_run, tmp_path, capsys):
    # There is a box, but the image that it belongs to is explained nowhere.
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("file,x0,y0,x1,y1\n0 of 2.jpg,500,2,600,4\n")
    assert main(["--run", small_run, "--boxes", str(boxes)]) == 2
    assert "zero images" in capsys.readouterr().err


def test_images_beyond_the_number_of_groups_share_them(tmp_path, monkeypatch):
    monkeypatch.setattr(intervals, "GROUPS", 2)
    drawn = []

    def draws(images: np.ndarray) -> np.ndarray:
        drawn.append(images)
        return plain_draws(images)

    plain_draws = intervals.draws
    monkeypatch.setattr(intervals, "draws", draws)
    maps = [block(*TRUTH)] * 5
    path = made_run(tmp_path / "out", [0] * 5, [[0, 1]] * 5, maps, maps)
    rows = [(f"{image} of 5.jpg", *TRUTH) for image in range(5)]
    boxes = pd.DataFrame(rows, columns=["file", "x0", "y0", "x1", "y1"])
    boxes.to_csv(tmp_path / "boxes.csv", index=False)
    assert main(["--run", path, "--boxes", str(tmp_path / "boxes.csv")]) == 0
    (images,) = drawn
    assert len(images) == 2
    assert images.sum() == 5


def test_files_of_one_name_are_refused(tmp_path, capsys):
    maps = [block(*TRUTH)] * 2
    path = Path(made_run(tmp_path / "out", [0, 0], [[0, 1]] * 2, maps, maps))
    manifest = pq.read_table(path / "manifest.parquet").to_pylist()
    manifest[0]["uri"], manifest[1]["uri"] = "/a/x.jpg", "/b/x.jpg"
    schema = pq.read_schema(path / "manifest.parquet")
    pq.write_table(pa.Table.from_pylist(manifest, schema), path / "manifest.parquet")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("file,x0,y0,x1,y1\nx.jpg,1,2,3,4\n")
    assert main(["--run", str(path), "--boxes", str(boxes)]) == 2
    told = capsys.readouterr().err
    assert "/a/x.jpg and /b/x.jpg" in told
    assert "name them by uri" in told


def test_masks_without_an_inside_are_refused(small_run, tmp_path, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    cv2.imwrite(str(masks / "0 of 2.png"), 255 * block(*TRUTH).astype(np.uint8))
    assert main(["--run", small_run, "--masks", str(masks)]) == 2
    assert "no mask has a pixel of value 1" in capsys.readouterr().err


@pytest.mark.long
def test_on_object_storage(small_run, tmp_path):
    (tmp_path / "store").mkdir()
    store = ObjectStore(tmp_path / "store")
    try:
        (tmp_path / "out/boxes.csv").write_text("file,x0,y0,x1,y1\n0 of 2.jpg,40,60,120,160\n")
        for file in sorted(Path(small_run).rglob("*.*")):
            with store.filesystem().open_output_stream(
                f"{BUCKET}/{file.relative_to(tmp_path)}"
            ) as stream:
                stream.write(file.read_bytes())
        shutil.rmtree(small_run)
        script = Path(__file__).parent.parent / "jobs/evaluate.py"
        options = ["--run", f"s3://{BUCKET}/out", "--boxes", f"s3://{BUCKET}/out/boxes.csv"]
        for _ in range(2):  # the second replaces the first
            subprocess.run([sys.executable, script, *options], env=store.environment, check=True)
        filesystem = store.filesystem()
        with filesystem.open_input_file(f"{BUCKET}/out/metrics/localization.parquet") as file:
            found = pd.read_parquet(file).set_index(["method", "metric"]).value
        assert found["grad_cam", "max_box_acc"] == 1
        folder = f"{BUCKET}/out/metrics/localization_images/network=net"
        assert len(pq.read_table(folder, filesystem=filesystem)) == 4
    finally:
        store.stop()
