from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_runs import Images, Said, write_run
from torch import nn

import scacam
from scacam.audit.agreement import Agreement, Compare, pairs, sample
from scacam.audit.attention import (
    BORDER_AREA,
    CORNER_AREA,
    border_cells,
    corner_cells,
    coverage,
    fixed_place,
    outside,
)
from scacam.audit.maps import top_maps
from scacam.audit.passes import Judge, Judged, Look, Opening, Seen
from scacam.evaluation.truth import TrueBoxes

SIZE, MAPS = 48, 6
NAMES = ["square", "disc", "cross", "marked"]
MARKED = 3


def _draw(rng: np.random.Generator, label: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A shape of any colour anywhere, and its box. `marked` is any shape, with a corner mark."""
    image = rng.normal(0.5, 0.08, (SIZE, SIZE, 3))
    radius = rng.integers(7, 11)
    x, y = rng.integers(radius, SIZE - radius, 2)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    dy, dx = np.abs(rows - y), np.abs(columns - x)
    shapes = (
        (dy <= radius) & (dx <= radius),
        dy**2 + dx**2 <= radius**2,
        (np.minimum(dy, dx) <= radius // 3) & (np.maximum(dy, dx) <= radius),
    )
    image[shapes[rng.integers(3) if label == MARKED else label]] = rng.uniform(0, 1, 3)
    if label == MARKED:
        image[-8:-2, 2:8] = (1, 1, 0)
    return image.clip(0, 1), (x - radius, y - radius, x + radius + 1, y + radius + 1)


def _made(count: int, seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(NAMES), count)
    images, boxes = zip(*(_draw(rng, label) for label in labels), strict=True)
    pixels = torch.tensor(np.stack(images), dtype=torch.float32).permute(0, 3, 1, 2)
    return pixels, labels, np.array(boxes, dtype=np.float32)


class _Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 12, 2), (12, 16, 2), (16, 24, 2), (24, 24, 1)):
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(24, len(NAMES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.features(images)).flatten(1))


def _trained() -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels, _ = _made(600, seed=0)
    module = _Shapes()
    optimizer = torch.optim.Adam(module.parameters(), 6e-3)
    for _ in range(7):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            logits = module(images[batch])
            nn.functional.cross_entropy(logits, torch.tensor(labels)[batch]).backward()
            optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[scacam.Run, TrueBoxes]:
    """A network that has to look at the corner for one class, and its run on new images."""
    network = scacam.Network(
        _trained(),
        target_layer="features",
        preprocessing=scacam.Preprocessing((SIZE, SIZE), SIZE, mean=(0.0,) * 3, std=(1.0,) * 3),
        categories=NAMES,
    )
    pixels, labels, boxes = _made(300, seed=1)
    found = scacam.Explainer(network, methods=("grad_cam", "sca_cam"), top_k=1)(pixels)
    said = Said(
        found.class_ids.numpy(),
        found.logits.softmax(1).gather(1, found.class_ids).numpy(),
        {name: maps.numpy() for name, maps in found.heatmaps.items()},
        NAMES,
        (SIZE, SIZE),
    )
    images = Images([f"gone/{i}.png" for i in range(300)], [(SIZE, SIZE)] * 300, labels)
    folder = tmp_path_factory.mktemp("planted")
    run = scacam.open_run(write_run(folder, images, {"tiny": said}, shards=3))
    return run, TrueBoxes(np.arange(300), boxes)


def _judged(run: scacam.Run, objects: TrueBoxes | None) -> tuple[Seen, Judged]:
    """What the two passes come to, without Ray."""
    seen = Look(Opening(run.path), lambda: objects)(run.image_ids)
    learnt = {name: one.gathered.learn() for name, one in seen.items()}
    found = Judge(Opening(run.path), lambda: objects, lambda: learnt)(run.image_ids)
    return seen["tiny"], found["tiny"]


@pytest.mark.parametrize("kind", ["off_object", "corner", "fixed_place"])
def test_the_planted_class_is_the_strongest(
    planted: tuple[scacam.Run, TrueBoxes], kind: str
) -> None:
    run, objects = planted
    seen, found = _judged(run, objects)
    strengths = found.tally.strengths(kind)
    assert int(np.nanargmax(strengths.strength)) == MARKED
    others = np.delete(strengths.strength, MARKED)
    assert strengths.low[MARKED] > np.nanmax(others)
    assert not strengths.stands_out.any()  # of so few classes nobody is accused
    images, labelled, right, *_ = seen.answered
    assert images.sum() == labelled.sum() == 300
    assert right[MARKED] / labelled[MARKED] > 0.9
    # The mark lies in the lower left corner.
    mean = seen.gathered.totals[MARKED] / seen.gathered.mapped[MARKED]
    assert mean[MAPS // 2 :, : MAPS // 2].sum() > 0.5


def test_cells_of_the_border_and_of_the_corners_by_hand() -> None:
    np.testing.assert_allclose(
        border_cells(4, 4)[:2, :2], [[1 - 0.25, 0.5], [0.5, 0]]
    )  # a border of half a cell
    np.testing.assert_allclose(corner_cells(4, 4)[0], [1, 0, 0, 1])
    np.testing.assert_allclose(corner_cells(2, 2), np.full((2, 2), 0.25))
    for shape in ((7, 7), (13, 9), (1, 1)):
        assert border_cells(*shape).mean() == pytest.approx(BORDER_AREA)
        assert corner_cells(*shape).mean() == pytest.approx(CORNER_AREA)


def test_density_outside_of_the_object_by_hand() -> None:
    covered = np.zeros((4, 2, 2))
    covered[:, 0, 0] = 1
    shares = np.array(
        [
            [[0.25, 0.25], [0.25, 0.25]],  # even
            [[1, 0], [0, 0]],  # all on the object
            [[0, 0.5], [0.5, 0]],  # all off it
            [[0.5, 0.5], [0, 0]],  # 1/2 on a quarter, 1/2 on three quarters: 2/3 against 2
        ]
    )
    np.testing.assert_allclose(outside(shares, covered), [0.5, 0, 1, 0.25])
    for known in (np.ones((4, 2, 2)), np.zeros((4, 2, 2)), np.full((4, 2, 2), np.nan)):
        assert np.isnan(outside(shares, known)).all()
    assert np.isnan(outside(np.zeros((4, 2, 2)), covered)).all()


def test_coverage_of_cells_by_several_boxes_in_a_view(tmp_path: Path) -> None:
    said = Said(np.zeros((3, 1), int), np.ones((3, 1)), {"sca_cam": np.ones((3, 1, 2, 2))}, ["cat"])
    said.views = np.array([[10, 0, 30, 20]] * 3)
    images = Images(["a", "b", "c"], [(40, 20)] * 3, np.array([-1] * 3))
    run = scacam.open_run(write_run(tmp_path, images, {"net": said}))
    boxes = np.array([[0, 0, 15, 20], [10, 0, 20, 10], [90, 90, 99, 99]], dtype=np.float32)
    objects = TrueBoxes(np.array([0, 0, 2]), boxes)
    covered = coverage(objects, top_maps(run, "net", np.arange(3))["sca_cam"])
    assert covered[0].tolist() == [[1, 0], [0.5, 0]]
    assert np.isnan(covered[1]).all()
    assert covered[2].tolist() == [[0, 0], [0, 0]]


def test_fixed_place_is_one_for_one_map_and_about_zero_for_any_maps() -> None:
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(49), 400).reshape(-1, 7, 7)
    usual = np.full((7, 7), 1 / 49)

    def measure(chosen: np.ndarray) -> float:
        return fixed_place(chosen.sum(0), float((chosen**2).sum()), len(chosen), usual)

    assert measure(maps[:1].repeat(5, 0)) == pytest.approx(1)
    assert abs(measure(maps)) < 0.02
    few = maps[:6] - usual
    products = [(few[i] * few[j]).sum() for i in range(6) for j in range(6) if i != j]
    assert measure(maps[:6]) == pytest.approx(np.mean(products) / (few**2).sum((1, 2)).mean())
    assert np.isnan(measure(usual[None].repeat(3, 0)))


def _said(maps: np.ndarray, class_ids: list[int], **others: np.ndarray) -> Said:
    shares = np.full((len(maps), 1), 0.5)
    heatmaps = {"sca_cam": maps[:, None]} | {name: m[:, None] for name, m in others.items()}
    return Said(np.array(class_ids)[:, None], shares, heatmaps, NAMES)


def _agreement(
    folder: Path, networks: dict[str, Said]
) -> tuple[dict[tuple[str, ...], dict[str, Any]], dict[str, dict[str, Any]]]:
    """Of eight images in two parts: the rows of pairs by what is paired, and those of methods."""
    count = len(next(iter(networks.values())).class_ids)
    images = Images([f"{i}" for i in range(count)], [(64, 64)] * count, np.full(count, -1))
    run = scacam.open_run(write_run(folder, images, networks, shards=2))
    compare = Compare(Opening(run.path))
    parts = [compare(ids) for ids in np.array_split(run.image_ids, 2)]
    alike, lie = Agreement.merge(parts).tables(run)
    assert len(alike) == len(pairs(run))
    by_names = {}
    for row in alike.to_pylist():
        methods = row["network"] == row["other_network"]
        names = ("method", "other_method") if methods else ("network", "other_network")
        by_names[(row["network"],) * methods + tuple(row[name] for name in names)] = row
    return by_names, {f"{row['network']} {row['method']}": row for row in lie.to_pylist()}


def test_agreement_of_methods_and_of_networks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps, others = rng.random((2, 8, 7, 7)).astype(np.float32)
    first = _said(maps, [0] * 8, grad_cam=maps**3, gap_cam=-maps)
    second = _said(np.concatenate([maps[:4], others[4:]]), [0] * 7 + [1])
    alike, lie = _agreement(tmp_path, {"one": first, "two": second})
    same, against = alike["one", "sca_cam", "grad_cam"], alike["one", "sca_cam", "gap_cam"]
    assert same["rank_correlation"] == pytest.approx(1, abs=5e-3)
    assert 0 < same["box_iou"] < 1
    assert against["rank_correlation"] == pytest.approx(-1, abs=5e-3)
    assert against["box_iou"] is None  # a map without a positive value has no box
    assert same["same"] is same["moved"] is None
    assert sorted(against["furthest"]) == list(range(8))
    pair = alike["one", "two"]
    assert (pair["images"], pair["same"]) == (8, 7 / 8)
    assert sorted(pair["furthest"][:3]) == [4, 5, 6]
    assert len(pair["furthest"]) == 7  # of images with the same top class alone
    pieces = [each / each.sum((1, 2), keepdims=True) for each in (maps[4:], others[4:])]
    apart = np.abs(pieces[0] - pieces[1]).sum((1, 2)) / 2
    assert 0.5 * np.mean(apart) < 2 * pair["moved"] < 1.5 * np.mean(apart)
    shares = maps / maps.sum((1, 2), keepdims=True)
    expected = (shares * border_cells(7, 7)).sum((1, 2)).mean()
    assert lie["one sca_cam"]["border"] == pytest.approx(expected, abs=1e-3)
    assert (lie["one gap_cam"]["images"], lie["one gap_cam"]["border"]) == (0, None)


@pytest.mark.parametrize(("class_id", "classes", "same"), [(0, 4, 1.0), (1, 4, 0.0), (0, 5, None)])
def test_networks_agree_by_class_id_whatever_its_name(
    tmp_path: Path, class_id: int, classes: int, same: float | None
) -> None:
    maps = np.random.default_rng(0).random((6, 7, 7)).astype(np.float32)
    first, second = _said(maps, [0] * 6), _said(maps, [class_id] * 6)
    second.class_names = [None] * classes
    alike, _ = _agreement(tmp_path, {"one": first, "two": second})
    assert alike["one", "two"]["same"] == same
    assert len(alike["one", "two"]["furthest"]) == (6 if same == 1 else 0)


def test_a_sample_is_spread_evenly_and_small_runs_are_taken_whole() -> None:
    images = 1_000_003
    parts = sample(images)
    every = np.concatenate(parts)
    assert len(parts) == 16
    assert 4000 < len(np.unique(every)) == len(every) <= 4096
    assert (every.min(), every.max()) == (0, images - 1)
    assert all((np.diff(part) == 1).all() for part in parts)
    np.testing.assert_array_equal(np.concatenate(sample(4000)), np.arange(4000))
    assert [part.tolist() for part in sample(3)] == [[0, 1, 2]]
