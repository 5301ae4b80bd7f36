from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import Images, Said, write_run
from torch import nn

import scacam
from scacam.audit.attention import (
    BORDER_AREA,
    CORNER_AREA,
    border_cells,
    corner_cells,
    coverage,
    fixed_place,
    outside,
)
from scacam.audit.audit import Audit, audit
from scacam.audit.maps import top_maps
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


def _by_chance(labels: np.ndarray, listed: int, repeats: int = 1000) -> np.ndarray:
    """How many marked images a random ranking has among the first."""
    rng = np.random.default_rng(0)
    return np.array([(rng.permutation(labels)[:listed] == MARKED).sum() for _ in range(repeats)])


@pytest.mark.parametrize("boxes_known", [False, True])
def test_the_audit_ranks_images_with_a_planted_mark_first(
    planted: tuple[scacam.Run, TrueBoxes], boxes_known: bool
) -> None:
    run, objects = planted
    found = audit(run, objects if boxes_known else None).networks["tiny"]
    listed = [entry["label"] for entry in found.suspects]
    chance = _by_chance(run.manifest["label"].to_numpy(), len(listed))
    assert len(listed) == 24
    assert chance.mean() < 8
    assert listed.count(MARKED) > chance.max()
    assert listed.count(MARKED) >= 22


def test_the_audit_puts_the_planted_class_first_and_says_why(
    planted: tuple[scacam.Run, TrueBoxes],
) -> None:
    run, objects = planted
    first, *others = audit(run, objects).networks["tiny"].classes
    assert first.class_name == "marked"
    assert first.right > 0.9
    assert {"fixed", "corner"} <= first.worries.keys()
    assert first.fixed > 0.8
    assert all(entry.fixed < 0.4 for entry in others)
    assert all(entry.outside < first.outside for entry in others)
    # The mark lies in the lower left corner.
    assert first.mean_map[MAPS // 2 :, : MAPS // 2].sum() > 0.5


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


def _audit(folder: Path, networks: dict[str, Said], labels: list[int], **config: str) -> Audit:
    images = Images(
        [f"{i}" for i in range(len(labels))], [(64, 64)] * len(labels), np.array(labels)
    )
    return audit(scacam.open_run(write_run(folder, images, networks, shards=2, **config)))


def test_agreement_of_methods_and_of_networks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps, others = rng.random((2, 8, 7, 7)).astype(np.float32)
    first = _said(maps, [0] * 8, grad_cam=maps**3, gap_cam=-maps)
    second = _said(np.concatenate([maps[:4], others[4:]]), [0] * 7 + [1])
    found = _audit(tmp_path, {"one": first, "two": second}, [-1] * 8)
    one = found.networks["one"]
    expected = [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    np.testing.assert_allclose(one.correlation, expected, atol=5e-3)
    assert one.iou[0, 0] == 1
    assert 0 < one.iou[0, 1] < 1
    assert np.isnan(one.iou[0, 2])  # a map without a positive value has no box
    (pair,) = found.pairs
    assert pair.networks == ("one", "two")
    assert (pair.images, pair.same) == (8, 7 / 8)
    assert sorted(entry["image_id"] for entry in pair.apart[:3]) == [4, 5, 6]
    assert pair.apart[3]["moved"] == pytest.approx(0, abs=1e-6)


def test_only_right_predictions_can_be_right_for_the_wrong_reason(tmp_path: Path) -> None:
    corner = np.zeros((7, 7, 7), dtype=np.float32)
    corner[:, 0, 0] = 1
    corner[3] = 0  # looks nowhere
    found = _audit(tmp_path, {"net": _said(corner, [0, 1] * 3 + [0])}, [0, 0, -1, 0, 0, 1, 1])
    network = found.networks["net"]
    assert sorted(entry["image_id"] for entry in network.suspects) == [0, 2, 4, 5]
    assert network.images == 7
    assert [entry.class_name for entry in network.classes] == []
    assert network.largest is not None
    assert (network.largest.class_name, network.largest.images) == ("square", 4)
    assert network.largest.right == pytest.approx(2 / 3)
    assert network.largest.corner == pytest.approx(1)


@pytest.mark.parametrize(
    ("class_id", "classes", "same"), [(0, 4, 1.0), (1, 4, 0.0), (0, 5, float("nan"))]
)
def test_networks_agree_by_class_id_whatever_its_name(
    tmp_path: Path, class_id: int, classes: int, same: float
) -> None:
    maps = np.random.default_rng(0).random((6, 7, 7)).astype(np.float32)
    first, second = _said(maps, [0] * 6), _said(maps, [class_id] * 6)
    second.class_names = [None] * classes
    found = _audit(tmp_path, {"one": first, "two": second}, [-1] * 6)
    (pair,) = found.pairs
    assert pair.same == pytest.approx(same, nan_ok=True)
    assert len(pair.apart) == (6 if same == 1 else 0)
    names = [[entry.class_name for entry in found.networks[n].classes] for n in ("one", "two")]
    assert names == [["square"], [f"class {class_id}"]]
