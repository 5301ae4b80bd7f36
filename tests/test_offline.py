"""The offline jobs on runs that the explain job wrote, not on runs made by hand.

Two networks look at the same photos, one of them without names for its classes.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

import scacam
from scacam.audit.agreement import Agreement, Compare
from scacam.audit.passes import Opening
from scacam.jobs import audit, caw, compare, evaluate, explain, pictures, report
from scacam.jobs.pictures import images, label_note, top_classes

COLOURS = ((220, 40, 30), (30, 200, 50), (40, 60, 230))
NAMED, NAMELESS = "tests.tiny_networks:colours", "tests.tiny_networks:nameless"


def _photo(path: Path, colour: tuple[int, int, int], seed: int) -> tuple[int, int, int, int]:
    """A rectangle of one colour on gray noise; returns where it is."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(100, 140, (96, 128, 3), dtype=np.uint8)
    x, y = int(rng.integers(0, 80)), int(rng.integers(0, 60))
    pixels[y : y + 36, x : x + 44] = colour
    Image.fromarray(pixels).save(path)
    return x, y, x + 44, y + 36


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen photos and their boxes; a run of them with labels and an image that is none, and one
    without labels and without errors."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "photos").mkdir()
    rows = []
    for seed in range(15):
        path = folder / f"photos/{seed:02d}.png"
        box = _photo(path, COLOURS[seed % 3], seed)
        rows.append({"uri": str(path), "label": seed % 3, **dict(zip(CORNERS, box, strict=True))})
    table = pd.DataFrame(rows)
    table[["uri", *CORNERS]].to_csv(folder / "boxes.csv", index=False)
    (folder / "broken.jpg").write_bytes(b"nothing")
    bad = pd.DataFrame({"uri": [str(folder / "broken.jpg")], "label": [0]})
    pd.concat([table[["uri", "label"]], bad]).to_csv(folder / "labelled.csv", index=False)
    options: dict[str, Any] = {"networks": [NAMED, NAMELESS], "top_k": 2, "view": "whole_image"}
    options["methods"] = ["grad_cam", "sca_cam"]
    explain.run(
        input=str(folder / "labelled.csv"),
        output=str(folder / "labelled"),
        explain_label=True,
        **options,
    )
    explain.run(input=str(folder / "photos"), output=str(folder / "plain"), **options)
    return folder


CORNERS = ("x0", "y0", "x1", "y1")


@pytest.fixture
def labelled(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "labelled", tmp_path / "labelled"))


@pytest.fixture
def plain(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "plain", tmp_path / "plain"))


def test_classes_have_names_from_the_start(labelled: Path) -> None:
    run = scacam.open_run(str(labelled))
    first = run.explanations(NAMELESS, "grad_cam").to_table().to_pandas()
    assert (first["class_name"] == "class " + first["class_id"].astype(str)).all()
    second = run.explanations(NAMED, "grad_cam").to_table().to_pandas()
    names = np.array(["red", "green", "blue", "gray"])
    assert (second["class_name"] == names[second["class_id"]]).all()


def test_a_run_of_before_is_read_with_names(labelled: Path) -> None:
    """Names were null, and labels of test splits −1."""
    for path in (labelled / f"explanations/network={NAMELESS}").glob("*/*.parquet"):
        table = pq.ParquetFile(path).read()
        for name, value in (("class_name", None), ("label", -1)):
            place = table.schema.get_field_index(name)
            values = pa.array([value] * len(table), table.schema.field(place).type)
            table = table.set_column(place, table.schema.field(place), values)
        pq.write_table(table, path)
    run = scacam.open_run(str(labelled))
    rows = run.explanations(NAMELESS, columns=["class_id", "class_name", "label"]).to_table()
    assert all(row["class_name"] == f"class {row['class_id']}" for row in rows.to_pylist())
    assert rows["label"].null_count == len(rows)
    page = Path(report.run(run=str(labelled)).path).read_text()
    assert "class -1" not in page
    assert not re.search(r"\bNone\b", page)


def test_the_errors_table_is_there_without_errors(plain: Path, labelled: Path) -> None:
    assert pd.read_parquet(plain / "errors").empty
    assert set(pd.read_parquet(plain / "errors").columns) >= {"image_id", "stage", "message"}
    assert scacam.open_run(str(plain)).errors.num_rows == 0
    assert pd.read_parquet(labelled / "errors")["uri"].str.endswith("broken.jpg").tolist() == [True]


@pytest.mark.long
def test_nothing_is_tried_again_where_nothing_failed(plain: Path) -> None:
    again = {"networks": [NAMED, NAMELESS], "top_k": 2, "view": "whole_image"}
    result = explain.run(
        input=json.loads((plain / "run.json").read_text())["input"],
        output=str(plain),
        methods=["grad_cam", "sca_cam"],
        retry_errors=True,
        **again,
    )
    assert (result.explained, result.errors) == (15, {})
    assert pd.read_parquet(plain / "errors").empty


@pytest.mark.long
def test_relative_paths_when_ray_has_started_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's processes keep the working folder in which it started."""
    assert ray.is_initialized()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "photos", "photos")
    (tmp_path / "masks").mkdir()
    for path in Path("photos").iterdir():
        Image.new("L", (128, 96), 1).save(f"masks/{path.name}")
    table = pd.read_csv(folder / "labelled.csv")[:15]
    table.assign(uri="photos/" + table["uri"].str.rpartition("/")[2]).to_csv("l.csv", index=False)
    result = explain.run(input="l.csv", output="out", networks=[NAMED], methods=["sca_cam"])
    assert (result.explained, result.output) == (15, "out")
    assert evaluate.run(run="out", masks="masks").images == {NAMED: 15}
    result = caw.run(input="photos", output="caw", networks=[NAMED])
    assert Path("caw/metrics/caw.parquet").exists()
    assert not result.errors


def test_evaluate(labelled: Path, folder: Path) -> None:
    result = evaluate.run(run=str(labelled), boxes=str(folder / "boxes.csv"))
    assert "15 images evaluated" in str(result)
    table = pd.read_parquet(labelled / "metrics/localization.parquet")
    assert set(table["network"]) == {NAMED, NAMELESS}
    assert (table["images"] == 15).all()
    by_method = table[table["metric"] == "pointing_game"].set_index(["network", "method"])["value"]
    assert by_method[NAMED, "grad_cam"] == by_method[NAMELESS, "grad_cam"] == 1


def _pair(run: scacam.Run) -> dict[str, Any]:
    """How the two networks of a run agree."""
    alike, _ = Agreement.merge([Compare(Opening(run.path))(run.image_ids)]).tables(run)
    (pair,) = (row for row in alike.to_pylist() if row["network"] != row["other_network"])
    return pair


def test_networks_are_compared_by_class_id(labelled: Path) -> None:
    pair = _pair(scacam.open_run(str(labelled)))
    assert (pair["images"], pair["same"]) == (15, 1.0)  # the same weights
    assert pair["moved"] == pytest.approx(0, abs=1e-6)


def test_networks_of_different_classes_are_not_compared_by_class(plain: Path) -> None:
    record = json.loads((plain / "run.json").read_text())
    record["networks"][1]["categories_sha256"] = "other names"
    (plain / "run.json").write_text(json.dumps(record))
    assert _pair(scacam.open_run(str(plain)))["same"] is None


@pytest.mark.parametrize("evaluated", [False, True])
def test_report(labelled: Path, folder: Path, evaluated: bool) -> None:
    if evaluated:
        evaluate.run(run=str(labelled), boxes=str(folder / "boxes.csv"))
    audit.run(run=str(labelled))
    page = Path(report.run(run=str(labelled)).path).read_text()
    assert not re.search(r"\bNone\b", page)
    assert not re.search(r"\bnan\b", page)
    assert "class 0" in page
    assert "red" in page
    assert "broken.jpg" in page
    assert ("MaxBoxAccV2" in page) == evaluated
    assert page.count("data:image/webp") > 20


def test_report_without_labels_and_errors(plain: Path) -> None:
    page = Path(report.run(run=str(plain)).path).read_text()
    assert not re.search(r"\bNone\b", page)
    assert "✗ label" not in page


def test_pictures(labelled: Path) -> None:
    result = pictures.run(run=str(labelled))
    drawn = sorted(Path(result.folder).iterdir())
    assert (result.pictures, len(drawn)) == (15, 15)
    assert len({path.read_bytes() for path in drawn}) == 15
    _, rows = next(images(scacam.open_run(str(labelled))))
    names = {network: top_classes(found)[0][0] for network, found in rows.items()}
    assert names == {NAMED: "red", NAMELESS: "class 0"}
    assert label_note(rows[NAMELESS]) == "label: class 0"


def test_compare(labelled: Path, plain: Path) -> None:
    result = compare.run(runs=[str(labelled), str(plain)])
    table = pd.read_parquet(result.table)
    assert len(table) == 15 * 2 * 2  # images, networks, methods
    assert not table["changed"].any()
    assert table["moved"].max() < 1e-6
    nameless = table[table["network_a"] == NAMELESS]
    assert set(nameless["class_name_a"]) == {"class 0", "class 1", "class 2"}
    named = table[table["network_a"] == NAMED]
    assert set(named["class_name_b"]) == {"red", "green", "blue"}
    page = Path(result.page).read_text()
    assert not re.search(r"\bNone\b", page)
    assert len(pd.read_parquet(result.classes)) == 0  # five images a class are too few to judge
