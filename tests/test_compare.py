import re
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_runs import Images, Said, write_run
from scipy.stats import spearmanr

import scacam
from scacam import RunError
from scacam.audit.compare import COMPARISON, compare_runs
from scacam.audit.likeness import energy, likeness, standard_ranks
from scacam.audit.maps import Ranking, top_maps
from scacam.audit.shifts import SHIFTS, Class, Shifts
from scacam.evaluation.sweep import iou
from scacam.jobs.command import run_job

main = partial(run_job, "compare")

NAMES = ["cat", "dog", "emu"]


def _spot(*cells: tuple[int, int], size: int = 4) -> np.ndarray:
    """A map that is 1 in some cells and 0 elsewhere."""
    heatmap = np.zeros((size, size), dtype=np.float32)
    for cell in cells:
        heatmap[cell] = 1
    return heatmap


def _said(classes: list[int], maps: list[np.ndarray]) -> Said:
    count = len(classes)
    return Said(
        np.array(classes)[:, None], np.full((count, 1), 0.75), {"sca_cam": np.stack(maps)[:, None]},
        NAMES,
    )  # fmt: skip


def _run(folder: Path, names: list[str], said: Said, network: str = "net") -> scacam.Run:
    labels = np.zeros(len(names), dtype=int)
    images = Images([f"gone/{name}.jpg" for name in names], [(64, 64)] * len(names), labels)
    return scacam.open_run(write_run(folder, images, {network: said}))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[scacam.Run, scacam.Run]:
    """A sees x, y, z; B sees z, y, w. y stays, z moves by half and changes its class."""
    near, far = _spot((1, 1), (1, 2)), _spot((1, 2), (1, 3))
    before = _run(tmp_path / "a", ["x", "y", "z"], _said([0, 1, 0], [near, near, near]))
    after = _run(tmp_path / "b", ["z", "y", "w"], _said([2, 1, 0], [far, near, near]))
    return before, after


def test_energy_is_the_positive_share() -> None:
    shares = energy(np.array([[[-2.0, 1.0], [3.0, 0.0]], [[-1.0, 0.0], [0.0, -1.0]]]))
    assert shares.tolist() == [[[0, 0.25], [0.75, 0]], [[0, 0], [0, 0]]]


def test_rank_correlation_equals_scipys_with_ties() -> None:
    values = np.random.default_rng(0).integers(0, 4, (2, 9, 20)).astype(float)
    ours = (standard_ranks(values[0]) * standard_ranks(values[1])).sum(-1)
    theirs = [spearmanr(*pair).statistic for pair in zip(*values, strict=True)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert np.isnan(standard_ranks(np.ones(5))).all()


def test_overlap_of_boxes_by_hand() -> None:
    first = np.array([[0, 0, 4, 4], [0, 0, 2, 2], [0, 0, 2, 2], [np.nan] * 4])
    second = np.array([[2, 2, 6, 6], [5, 5, 6, 6], [0, 0, 2, 2], [0, 0, 1, 1]])
    np.testing.assert_allclose(iou(first, second), [4 / 28, 0, 1, np.nan])


def test_maps_are_read_by_rising_image_id(runs: tuple[scacam.Run, scacam.Run]) -> None:
    maps = top_maps(runs[0], "net", np.array([2, 0]))["sca_cam"]
    assert maps.column("image_id").tolist() == [0, 2]
    assert maps.of(np.array([2])).rows["uri"].to_pylist() == ["gone/z.jpg"]
    np.testing.assert_array_equal(maps.heatmaps[1], _spot((1, 1), (1, 2)))
    assert not len(top_maps(runs[0], "net", np.array([99]))["sca_cam"].rows)


def test_the_same_map_has_not_moved_and_another_one_has(
    runs: tuple[scacam.Run, scacam.Run],
) -> None:
    first = top_maps(runs[0], "net", np.arange(3))["sca_cam"]
    alike = likeness(first, first)
    np.testing.assert_allclose(alike.moved, 0, atol=1e-9)
    np.testing.assert_allclose(alike.rank_correlation, 1)
    np.testing.assert_allclose(alike.box_iou, 1)
    apart = likeness(first.of(np.array([0])), top_maps(runs[1], "net", np.array([0]))["sca_cam"])
    # Two cells side by side, shifted by one: after interpolation a little less than half moved.
    assert 0.35 < apart.moved[0] <= 0.5
    assert 0 < apart.box_iou[0] < 1


def test_maps_of_different_sizes_and_views_meet_on_the_image(tmp_path: Path) -> None:
    """The same blob, once on 4 × 4 cells of the image, once on 8 × 8 cells of its left half."""
    whole = np.zeros((4, 4), dtype=np.float32)
    whole[1, 0] = 1
    half = whole.repeat(2, 0).repeat(4, 1)[:, :8]
    coarse, fine = _said([0], [whole]), _said([0], [half])
    fine.views = np.array([[0, 0, 32, 64]])
    maps = [
        top_maps(_run(tmp_path / name, ["x"], said), "net", np.array([0]))["sca_cam"]
        for name, said in (("a", coarse), ("b", fine))
    ]
    together = likeness(*maps).moved[0]
    fine.views = np.array([[0, 0, 64, 64]])
    other = top_maps(_run(tmp_path / "c", ["x"], fine), "net", np.array([0]))["sca_cam"]
    apart = likeness(maps[0], other).moved[0]
    assert together < 0.25
    assert apart > 0.35


def test_a_map_without_a_positive_value_cannot_have_moved(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", ["x", "y"], _said([0, 0], [-_spot((1, 1)), _spot((1, 1))]))
    maps = top_maps(run, "net", np.arange(2))["sca_cam"]
    assert np.isnan(likeness(maps, maps).moved).tolist() == [True, False]


def test_ranking_keeps_the_largest_whatever_the_order() -> None:
    scores = np.random.default_rng(0).permutation(100).astype(float)
    scores[scores == 99] = np.nan
    ranking = Ranking(5)
    for start in range(0, 100, 7):
        part = scores[start : start + 7]
        rows = pa.table({"image_id": np.arange(start, start + len(part))})
        ranking.add(part, rows, twice=2 * part)
    assert [entry["score"] for entry in ranking.entries] == [98, 97, 96, 95, 94]
    assert [scores[entry["image_id"]] for entry in ranking.entries] == [98, 97, 96, 95, 94]
    assert ranking.entries[0]["twice"] == 196


def test_runs_are_matched_by_uri(runs: tuple[scacam.Run, scacam.Run]) -> None:
    table = pa.concat_tables(found.table for found in compare_runs(*runs))
    assert table.schema == COMPARISON
    rows = {row["uri"]: row for row in table.to_pylist()}
    assert sorted(rows) == ["gone/y.jpg", "gone/z.jpg"]
    y, z = rows["gone/y.jpg"], rows["gone/z.jpg"]
    assert (y["image_id_a"], y["image_id_b"], y["changed"], y["moved"]) == (1, 1, False, 0)
    assert (z["image_id_a"], z["image_id_b"], z["changed"]) == (2, 0, True)
    assert (z["class_name_a"], z["class_name_b"]) == ("cat", "emu")
    assert z["moved"] > 0.35


def test_the_only_networks_are_compared_whatever_their_names(tmp_path: Path) -> None:
    said = _said([0], [_spot((1, 1))])
    first = _run(tmp_path / "a", ["x"], said, "resnet")
    second = _run(tmp_path / "b", ["x"], said, "densenet")
    (row,) = next(compare_runs(first, second)).table.to_pylist()
    assert (row["network_a"], row["network_b"]) == ("resnet", "densenet")


def test_runs_without_anything_in_common_are_refused(tmp_path: Path) -> None:
    said = _said([0], [_spot((1, 1))])
    first, second = _run(tmp_path / "a", ["x"], said), _run(tmp_path / "b", ["y"], said)
    with pytest.raises(RunError, match="no uri is in both"):
        compare_runs(first, second)
    other = Said(said.class_ids, said.probabilities, {"gap_cam": said.heatmaps["sca_cam"]}, NAMES)
    with pytest.raises(RunError, match="no method is in both"):
        compare_runs(first, _run(tmp_path / "c", ["x"], other))
    images = Images(["gone/x.jpg"], [(64, 64)], np.array([0]))
    two = write_run(tmp_path / "d", images, {"one": said, "two": said})
    with pytest.raises(RunError, match="no network is in both"):
        compare_runs(first, scacam.open_run(two))


def test_the_job_writes_its_table_and_its_page(
    runs: tuple[scacam.Run, scacam.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--runs", runs[0].path, runs[1].path]) == 0
    said = capsys.readouterr().out
    assert "net: 2 images, 50.0% say something else, right 50.0% before, 0.0% after" in said
    assert "25.0% of the map of sca_cam lies elsewhere" in said
    table = pq.read_table(Path(runs[1].path) / "metrics/comparison.parquet")
    assert len(table) == 2
    assert table.schema.metadata[b"run_a"].decode() == runs[0].path
    assert not len(pq.read_table(Path(runs[1].path) / "metrics/comparison_classes.parquet"))
    page = (Path(runs[1].path) / "comparison.html").read_text()
    assert "Same answer, another place" in page
    assert "gone/z.jpg" in page
    assert "://" not in page


def test_the_job_says_what_is_wrong(
    runs: tuple[scacam.Run, scacam.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--runs", runs[0].path, str(tmp_path / "none")]) == 2
    assert "no run.json" in capsys.readouterr().err


def test_classes_without_names_are_kept_apart_and_other_classes_are_not_compared(
    tmp_path: Path,
) -> None:
    names, maps = [f"{i}" for i in range(20)], [_spot((1, 1), (1, 2))] * 20
    before = _said([0, 1] * 10, maps)
    before.class_names = [None] * 3
    first = _run(tmp_path / "a", names, before)
    second = _run(tmp_path / "b", names, _said([0, 2] * 10, maps))
    assert main(["--runs", first.path, second.path]) == 0
    page = (tmp_path / "b/comparison.html").read_text()
    rows = re.findall(r"<td>(class \d)</td><td class=.n.>10</td><td class=.n.>(.*?)</td>", page)
    assert sorted(rows) == [("class 0", "100%"), ("class 1", "0%")]
    assert "other classes" not in page

    more = _said([0, 2] * 10, maps)
    more.class_names = [*NAMES, "fox"]
    third = _run(tmp_path / "c", names, more)
    assert main(["--runs", first.path, third.path]) == 0
    page = (tmp_path / "c/comparison.html").read_text()
    rows = re.findall(r"<td>(class \d)</td><td class=.n.>10</td><td class=.n.>(.*?)</td>", page)
    assert sorted(rows) == [("class 0", "–"), ("class 1", "–")]
    assert page.count("other classes") == 3
    assert "Against the labels" not in page
    assert pq.read_table(tmp_path / "c/metrics/comparison.parquet")["changed"].null_count == 20


def _spots(rng: np.random.Generator, count: int, left: float) -> list[np.ndarray]:
    """Each map has a spot: at random in the left half with a probability, else in the right."""
    sides = np.where(rng.random(count) < left, 0, 4)
    return [_spot((3, side + rng.integers(4)), size=8) for side in sides]


def test_what_is_seen_elsewhere_is_found_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three classes the maps of one go to the left; those of the others are drawn anew."""
    rng = np.random.default_rng(0)
    classes = [0, 1, 2] * 120
    before = _spots(rng, 360, 0.5)
    after = [
        _spots(rng, 1, 0.9)[0] if class_id == 1 else _spots(rng, 1, 0.5)[0] for class_id in classes
    ]
    names = [f"{i}" for i in range(360)]
    first = _run(tmp_path / "a", names, _said(classes, before))
    second = _run(tmp_path / "b", names, _said(classes, after))
    assert main(["--runs", first.path, second.path]) == 0
    assert "seen elsewhere: 1 of 3 classes (dog)" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "b/metrics/comparison_classes.parquet")
    assert table.schema == SHIFTS
    rows = table.to_pylist()
    assert [row["class_name"] for row in rows if row["elsewhere"]] == ["dog"]
    assert rows[0]["shift"] > rows[0]["chance"]
    assert all(row["ci_low"] < row["moved"] < row["ci_high"] for row in rows)
    page = (tmp_path / "b/comparison.html").read_text()
    assert "B looks elsewhere for 1 of 3 classes" in page
    assert "<b>dog</b>" in page
    assert main(["--runs", first.path, first.path]) == 0
    assert "seen elsewhere: 0 of 3 classes\n" in capsys.readouterr().out


def test_chance_is_what_halves_of_one_run_differ_by() -> None:
    """The normal approximation against random halves, for maps that are anything but normal."""
    rng = np.random.default_rng(1)
    spots = np.stack(_spots(rng, 200, 0.7))
    shares = spots.repeat(2, 1).repeat(2, 2) / 4
    shifts = Shifts()
    each = Class(("net", "net"), "sca_cam", 0, "cat")
    same, moved = np.ones(200), np.zeros(200)
    for part in np.array_split(np.arange(200), 3):  # sums merge
        chosen = np.stack([shares[part]] * 2)
        shifts.add([each] * len(part), same[part], moved[part], chosen)
    (row,) = shifts.table().to_pylist()
    flat = spots.reshape(200, -1)
    orders = [rng.permutation(200) for _ in range(2000)]
    halves = [np.abs(flat[o[:100]].mean(0) - flat[o[100:]].mean(0)).sum() / 2 for o in orders]
    assert row["chance"] == pytest.approx(np.quantile(halves, 0.95), rel=0.08)
    assert (row["shift"], row["p_value"], row["elsewhere"]) == (0, 1, False)


def test_two_halves_of_one_run_are_rarely_a_finding() -> None:
    rng = np.random.default_rng(2)
    found = []
    for class_id in range(200):
        shares = np.stack([np.stack(_spots(rng, 12, 0.5)) for _ in range(2)])
        shifts = Shifts()
        each = Class(("net", "net"), "sca_cam", class_id, "cat")
        shares = shares.repeat(2, 2).repeat(2, 3) / 4
        shifts.add([each] * 12, np.ones(12), np.ones(12), shares)
        found.append(shifts.table()["p_value"][0].as_py() <= 0.05)
    assert np.mean(found) <= 0.08
