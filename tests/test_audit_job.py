"""The audit job on runs made of arrays, with a planted shortcut and without."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_runs import Images, Said, write_run
from scipy.special import expit

import scacam
from scacam.audit.kinds import FINDING_IMAGES, FINDINGS, KINDS, SUSPECTS
from scacam.audit.passes import LISTED, Best
from scacam.errors import RunError
from scacam.evaluation.tables import TRUE_BOXES
from scacam.jobs import audit
from scacam.jobs import report as reporting
from scacam.pipeline.tasks import added_in_tasks
from scacam.storage.parquet import write_table
from scacam.tables import predictions_folder

CLASSES, PER_CLASS, SIDE, CHANNELS = 40, 30, 6, 12
COUNT = CLASSES * PER_CLASS
PLANTED = 7
MIDDLE = [14, 15, 20, 21]


def write_predictions(out: Path, network: str, channels: np.ndarray, contributions, cells) -> None:
    """As the explain job keeps them, of the top class alone."""
    count = len(channels)
    for shard, rows in enumerate(np.array_split(np.arange(count), 3)):
        table = pa.table(
            {
                "image_id": rows,
                "rank": pa.array([1] * len(rows), pa.int16()),
                "channel_ids": list(channels[rows].astype(np.int16)),
                "channel_contributions": list(contributions[rows].astype(np.float16)),
                "channel_cells": list(cells[rows].astype(np.int16)),
            }
        )
        write_table(str(out / predictions_folder(network) / f"{shard}.parquet"), table)


def made(out: Path, planted: bool, kept: bool = True) -> Path:
    """Two networks; with a shortcut, half of the images of a class hang on channels in a corner."""
    rng = np.random.default_rng(0)
    class_ids = np.arange(COUNT) % CLASSES
    values = rng.gamma(2, 0.15, (COUNT, 30))
    cells = rng.choice(MIDDLE, (COUNT, 30))
    maps = rng.random((COUNT, SIDE * SIDE)) * 0.1
    maps[:, MIDDLE] += rng.random((COUNT, 4))
    marked = (class_ids == PLANTED) & (np.arange(COUNT) % 80 < 40) & planted
    values[marked, 3:6] += 0.8
    cells[marked, 3:6] = 5
    maps[marked, 5] += 4
    probabilities = expit(values.sum(1) - 8.5)
    others = np.where(rng.random(COUNT) < 0.1, (class_ids + 1) % CLASSES, class_ids)
    labels = np.where(rng.random(COUNT) < 0.1, (class_ids + 2) % CLASSES, class_ids)
    names = [f"class <{i}>" for i in range(CLASSES)]
    networks = {
        name: Said(
            said[:, None],
            probabilities[:, None],
            {"sca_cam": maps.reshape(COUNT, 1, SIDE, SIDE)},
            names,
        )
        for name, said in (("one", class_ids), ("two", others))
    }
    failed = [f"failed {i}.jpg" for i in range(300)]  # more neighbours than a task has images
    images = Images([f"{i}.jpg" for i in range(COUNT)], [(64, 64)] * COUNT, labels, failed)
    write_run(out, images, networks, shards=4)
    if kept:
        order = np.argsort(-values, axis=1)[:, :CHANNELS]
        columns = (np.take_along_axis(part, order, 1) for part in (values, cells))
        write_predictions(out, "one", order, *columns)
    boxes = [np.arange(COUNT), *np.tile([[16.0], [16], [48], [48]], COUNT)]
    write_table(str(out / "metrics/localization_boxes.parquet"), pa.table(boxes, TRUE_BOXES))
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = made(tmp_path_factory.mktemp("audit") / "out", planted=True)
    audit._AT_ONCE, before = 256, audit._AT_ONCE  # several tasks
    (folder / "metrics/findings_images").mkdir()
    (folder / "metrics/findings_images/old.parquet").write_bytes(b"of an earlier audit")
    told = str(audit.run(run=str(folder)))
    audit._AT_ONCE = before
    (folder / "told").write_text(told)
    return folder


@pytest.fixture
def without_manifest(monkeypatch):
    """Nothing in this process may hold what a run knows of every image."""
    for name in ("manifest", "image_ids"):
        monkeypatch.delattr(scacam.Run, name)


def table(out: Path, name: str):
    return pq.ParquetDataset(out / "metrics" / name).read().to_pandas()


def test_the_tables_are_as_promised(out):
    for name, schema in (("suspects.parquet", SUSPECTS), ("findings.parquet", FINDINGS)):
        assert pq.read_schema(out / "metrics" / name).equals(schema)
    shards = sorted(path.name for path in (out / "metrics/findings_images").iterdir())
    assert shards == ["one.parquet", "two.parquet"]
    for shard in shards:
        found = pq.read_schema(out / "metrics/findings_images" / shard)
        assert found.equals(FINDING_IMAGES)


def test_the_planted_class_stands_out_first(out):
    found = table(out, "findings.parquet")
    assert (found["finding"] == np.arange(len(found))).all()
    accused = found[found["stands_out"]]
    assert set(accused["class_id"]) == {PLANTED}
    assert "component" in set(accused["kind"])
    assert {"corner", "border", "off_object"} & set(accused["kind"])
    assert (accused["class_name"] == f"class <{PLANTED}>").all()
    rest = found[~found["stands_out"]]["strength"]
    assert (rest.diff().dropna() <= 0).all()
    assert (found["ci_low"] <= found["strength"]).all()
    assert found["share"].between(0, 1).all()
    one = found[(found["network"] == "one") & (found["kind"] == "disagreement")]
    assert one["images"].sum() == COUNT
    # Of the second network no predictions are kept.
    kinds = set(found[found["network"] == "two"]["kind"])
    assert kinds >= set(KINDS) - {"component", "map_cluster", "fixed_place"}
    assert "component" not in kinds


def test_suspects_are_the_images_that_hang_on_it(out):
    found = table(out, "suspects.parquet")
    assert set(found["network"]) == {"one"}
    assert (found["score"].diff().dropna() <= 0).all()
    np.testing.assert_allclose(found["score"], found["fall"] * found["place"], rtol=1e-5)
    assert (found["probability"] >= 0.5).all()
    first = found.head(8)
    assert (first["class_id"] == PLANTED).all()
    assert (first["image_id"] % 80 < 40).all()
    assert (first["uri"] == [f"{i}.jpg" for i in first["image_id"]]).all()
    # Answers that the labels deny are none.
    manifest = pq.read_table(out / "manifest.parquet").to_pandas()
    labels = manifest.set_index("image_id")["label"]
    assert (labels.loc[found["image_id"]].to_numpy() == found["class_id"]).all()


def test_each_finding_has_its_images(out):
    findings, images = table(out, "findings.parquet"), table(out, "findings_images")
    assert images.groupby("finding").size().max() <= LISTED
    assert not images.duplicated(["finding", "image_id"]).any()
    corner = findings[(findings["kind"] == "corner") & findings["stands_out"]]
    for finding in corner["finding"]:
        listed = images[images["finding"] == finding]
        assert (listed["score"].diff().dropna() <= 0).all()
        assert (listed["image_id"] % CLASSES == PLANTED).all()
        assert (listed["image_id"] % 80 < 40).mean() > 0.9


def test_it_says_who_stands_out(out):
    told = (out / "told").read_text()
    assert f"class <{PLANTED}> rests on what lies elsewhere" in told
    assert "tables:" in told


def test_nothing_depends_on_the_tasks(out, tmp_path, without_manifest):
    """All in one task comes to the same."""
    whole = tmp_path / "out"
    shutil.copytree(out, whole)
    audit.run(run=str(whole))
    for name in ("findings.parquet", "suspects.parquet"):
        one, other = (table(folder, name) for folder in (out, whole))
        keys = ["network", "class_id", "kind" if "kind" in one else "image_id"]
        one, other = (each.sort_values(keys, ignore_index=True) for each in (one, other))
        numbers = [column for column in one if one[column].dtype.kind == "f"]
        np.testing.assert_allclose(one[numbers], other[numbers], rtol=1e-4, atol=1e-5)
        assert (one[keys] == other[keys]).all().all()


def test_nobody_is_accused_in_the_clean_twin_of_an_older_run(tmp_path):
    """Which has kept no predictions."""
    folder = made(tmp_path / "out", planted=False, kept=False)
    told = str(audit.run(run=str(folder)))
    assert told.count("no class stands out") == 2
    found = table(folder, "findings.parquet")
    assert not found["stands_out"].any()
    assert "component" not in set(found["kind"])
    assert not len(table(folder, "suspects.parquet"))


def test_nothing_is_said_of_answers_that_are_all_unsure(tmp_path):
    folder, count = tmp_path / "out", 8
    images = Images([f"{i}.jpg" for i in range(count)], [(64, 64)] * count, np.zeros(count, int))
    maps = np.random.default_rng(0).random((count, 1, SIDE, SIDE))
    unsure = Said(np.zeros((count, 1), int), np.full((count, 1), 0.2), {"sca_cam": maps}, ["a"])
    write_run(folder, images, {"one": unsure})
    channels = np.tile(np.arange(CHANNELS), (count, 1))
    write_predictions(folder, "one", channels, np.ones(channels.shape), np.zeros_like(channels))
    told = str(audit.run(run=str(folder)))
    assert "one: 0 suspects" in told
    assert "of a class with 5 confident ones" in told
    assert (
        "of a class with 5 confident ones" in Path(reporting.run(run=str(folder)).path).read_text()
    )


def test_sums_are_made_in_tasks_in_the_order_of_the_items():
    def refusing(*parts: int) -> int:
        raise TypeError("too few")

    get = added_in_tasks(lambda n: str(n), lambda *parts: " ".join(parts), range(40))
    assert get() == " ".join(map(str, range(40)))
    with pytest.raises(ZeroDivisionError):
        added_in_tasks(lambda n: 1 // n, max, [1, 0, 2])
    with pytest.raises(TypeError, match="too few"):
        added_in_tasks(lambda n: n, refusing, range(3))


def test_what_cannot_be_audited_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run"):
        audit.run(run=str(tmp_path))
    folder = tmp_path / "out"
    images = Images(["0.jpg"], [(64, 64)], np.array([0]))
    said = Said(np.zeros((1, 1), int), np.ones((1, 1)), {"sca_cam": np.ones((1, 1, 3, 3))}, ["a"])
    write_run(folder, images, {"one": said}, status="running")
    with pytest.raises(RunError, match="not complete"):
        audit.run(run=str(folder))


def test_predictions_are_read_of_the_images_asked_for(out):
    run = scacam.open_run(str(out))
    found = run.predictions("one", ["image_id"], image_ids=[3, 700])
    assert found is not None
    assert sorted(found.to_table()["image_id"].to_pylist()) == [3, 700]
    assert run.predictions("two") is None
    with pytest.raises(RunError, match="no network"):
        run.predictions("three")


def test_the_best_of_parts_are_the_best_of_all():
    rng = np.random.default_rng(0)
    every = Best(rng.integers(0, 5, 300), np.arange(300), rng.random((300, 2)))
    parts = [Best(*(part[rows] for part in every)) for rows in np.array_split(np.arange(300), 4)]
    merged = Best.joined([part.first(6) for part in parts], 6)
    for one, other in zip(merged, every.first(6), strict=True):
        np.testing.assert_array_equal(one, other)
    for group in range(5):
        scores = np.sort(every.values[every.groups == group, 0])[::-1][:6]
        np.testing.assert_array_equal(merged.values[merged.groups == group, 0], scores)


def test_the_report_shows_what_the_audit_found(out, without_manifest):
    page = Path(reporting.run(run=str(out)).path).read_text()
    assert "Right for the wrong reason" in page
    assert "fall below one half" in page
    assert f"class &lt;{PLANTED}&gt;" in page
    assert f"class <{PLANTED}>" not in page
