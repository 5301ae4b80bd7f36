"""Boxes at all thresholds, measures of one image, their means: against plain loops and by hand."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scacam.evaluation import bounds
from scacam.evaluation.bounds import reached
from scacam.evaluation.intervals import GROUPS, best_levels, curves, dealt, draws, summarise
from scacam.evaluation.measures import (
    BASELINES,
    MEASURES,
    baseline,
    baseline_sweep,
    energy_inside,
    fixed_iou,
    in_view,
    mask_in_view,
    peak_distance,
    positive_part,
    score_histograms,
)
from scacam.evaluation.metrics import METRICS, State, hits, names_of, swept, titles, values
from scacam.evaluation.sweep import (
    GRID,
    IOU_THRESHOLDS,
    LEVELS,
    THRESHOLDS,
    best_ious,
    iou,
    quantise,
    score_map,
    search,
)

WHOLE = np.array([0, 0, GRID, GRID], dtype=np.float32)


def searched(gray: np.ndarray, level: int) -> tuple[list[list[int]], int]:
    """The reference's loop body: threshold, search contours, box each, note the largest."""
    height, width = gray.shape
    _, mask = cv2.threshold(gray[:, :, None], level, 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    boxes, areas = [], []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
        areas.append(cv2.contourArea(contour))
    if not boxes:
        return [[0, 0, 0, 0]], 0
    return boxes, max(range(len(areas)), key=areas.__getitem__)


def at(gray: np.ndarray, level: int) -> tuple[list[list[int]], int]:
    """What a search says of one level."""
    boxes, starts, largest = search(gray)
    stop = starts[level + 1] if level + 1 < LEVELS else len(boxes)
    return boxes[starts[level] : stop].tolist(), int(largest[level] - starts[level])


def assert_reached(gray: np.ndarray, truth: np.ndarray, limits=IOU_THRESHOLDS) -> None:
    """The same limits are reached at each level as by the reference's boxes."""
    every = best_ious(search(gray), truth)
    for some, all_of_them in zip(reached(gray, truth, limits), every, strict=True):
        for limit in limits:
            assert ((some >= limit) == (all_of_them >= limit)).all()


UNIMODAL = np.array(
    [
        [0, 0, 0, 0, 0],
        [0, 100, 100, 100, 150],
        [0, 100, 255, 200, 150],
        [0, 100, 100, 100, 150],
    ],
    dtype=np.uint8,
)


@pytest.mark.parametrize(
    ("level", "box"),
    [
        (0, [1, 1, 4, 3]),
        (99, [1, 1, 4, 3]),
        (100, [2, 1, 4, 3]),  # a value equal to the level is not above it
        (150, [2, 2, 4, 3]),
        (200, [2, 2, 3, 3]),
        (254, [2, 2, 3, 3]),
    ],
)
def test_boxes_of_a_unimodal_map(level, box):
    assert at(UNIMODAL, level) == ([box], 0)
    assert search(UNIMODAL, [level]).boxes.tolist() == [box]


def test_boxes_of_a_multimodal_map():
    gray = np.zeros((8, 10), dtype=np.uint8)
    gray[0:2, 0:2] = 255  # two by two pixels: a contour of area 1
    gray[4:8, 5:9] = 128  # four by four: area 9
    assert at(gray, 127) == ([[5, 4, 9, 7], [0, 0, 2, 2]], 0)
    assert at(gray, 128) == ([[0, 0, 2, 2]], 0)


def test_an_inner_contour_has_a_box_of_its_own():
    gray = np.full((9, 9), 255, dtype=np.uint8)
    gray[3:5, 2:6] = 0
    # The pixels around the hole run from x 1 to 6 and y 2 to 5.
    assert at(gray, 10) == ([[0, 0, 8, 8], [1, 2, 7, 6]], 0)


@pytest.mark.parametrize(("x", "y", "box"), [(3, 2, [3, 2, 4, 3]), (7, 5, [7, 5, 7, 5])])
def test_boxes_of_a_single_pixel(x, y, box):
    gray = np.zeros((6, 8), dtype=np.uint8)
    gray[y, x] = 255
    for level in (0, 100, 254):
        assert at(gray, level) == ([box], 0)


def test_boxes_of_constant_maps():
    for value in (0.0, 3.0, -1.0, 0.1):  # 0.1 resized differs from itself in its last digits
        gray = quantise(score_map(np.full((7, 7), value)))
        assert not gray.any()
        assert at(gray, 0) == at(gray, 254) == ([[0, 0, 0, 0]], 0)
    assert at(np.full((5, 6), 255, np.uint8), 254) == ([[0, 0, 5, 4]], 0)


def test_score_maps_span_zero_to_one():
    score = score_map(np.array([[-3.0, 2.0], [1.0, 0.5]]))
    assert (score.shape, score.min(), score.max()) == ((GRID, GRID), 0, 1)
    assert quantise(score).max() == 255


def test_levels_are_those_of_the_references_thresholds():
    grid = np.arange(0, 1, 0.001)
    levels = np.array([int(threshold * np.uint8(255)) for threshold in grid])
    assert sorted(set(levels)) == list(range(LEVELS))
    np.testing.assert_allclose(THRESHOLDS, [grid[levels == n].min() for n in range(LEVELS)])


@st.composite
def grays(draw) -> np.ndarray:
    """Noise, plateaus, blobs and smooth maps, of few and of many values, touching the border."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "plateaus", "blobs", "smooth", "heatmap"]))
    if kind == "noise":
        return rng.integers(0, 256, (height, width), dtype=np.uint8)
    if kind == "plateaus":
        values = rng.integers(0, 256, rng.integers(2, 6), dtype=np.uint8)
        return rng.choice(values, (height, width))
    if kind == "blobs":
        gray = np.zeros((height, width), dtype=np.uint8)
        for _ in range(rng.integers(1, 9)):
            y, x = rng.integers(0, height), rng.integers(0, width)
            gray[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = rng.integers(0, 256)
        return gray
    if kind == "smooth":
        noise = cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), rng.uniform(0.5, 5))
        return quantise((noise - noise.min()) / max(np.ptp(noise), 1e-9))
    return quantise(score_map(heatmap(rng)))


def heatmap(rng: np.random.Generator) -> np.ndarray:
    """A few bumps and some noise on 7 × 7 cells, with or without a ReLU."""
    rows, columns = np.mgrid[:7, :7]
    cells = 0.1 * rng.standard_normal((7, 7))
    for _ in range(rng.integers(1, 4)):
        y, x = rng.uniform(0, 6, 2)
        cells += rng.uniform(0.2, 1) * np.exp(
            -((rows - y) ** 2 + (columns - x) ** 2) / rng.uniform(1, 8)
        )
    return cells.clip(min=0) if rng.random() < 0.5 else cells


@st.composite
def truths(draw, gray: np.ndarray) -> np.ndarray:
    """One to three boxes on a map."""
    corners = [
        [sorted(draw(st.tuples(st.integers(0, side - 1), st.integers(0, side - 1))))]
        for _ in range(draw(st.integers(1, 3)))
        for side in gray.shape[::-1]
    ]
    return np.reshape(corners, (-1, 2, 2)).swapaxes(1, 2).reshape(-1, 4)


@settings(max_examples=60, deadline=None)
@given(grays())
def test_a_search_is_that_of_the_reference(gray):
    expected = [searched(gray, level) for level in range(LEVELS)]
    boxes, starts, largest = search(gray)
    assert starts.tolist() == np.cumsum([0, *(len(e[0]) for e in expected[:-1])]).tolist()
    assert boxes.tolist() == [box for e in expected for box in e[0]]
    assert (largest - starts).tolist() == [e[1] for e in expected]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_reached_is_what_a_search_at_every_level_finds(data):
    gray = data.draw(grays())
    assert_reached(gray, data.draw(truths(gray)))


@pytest.mark.long
def test_what_is_reached_by_many_heatmaps():
    rng = np.random.default_rng(7)
    for _ in range(300):
        corners = rng.integers(0, GRID, (rng.integers(1, 4), 2, 2))
        truth = np.sort(corners, axis=1).reshape(-1, 4)
        assert_reached(quantise(score_map(heatmap(rng))), truth)


def test_few_levels_of_a_map_are_searched(monkeypatch):
    """Of smooth maps hardly any: that is what all the rest is for."""
    searches = []

    def counted(gray, levels):
        searches.append(len(levels))
        return search(gray, levels)

    monkeypatch.setattr(bounds, "search", counted)
    rng = np.random.default_rng(3)
    for _ in range(40):
        gray = quantise(score_map(heatmap(rng)))
        assert_reached(gray, np.array([[40, 60, 150, 170]]))
    assert sum(searches) < 40 * LEVELS / 10


def test_islands_and_holes_count_where_they_are_the_object():
    """The largest contour is not the peak's, or the object is an island, or a hole."""
    gray = np.zeros((30, 30), dtype=np.uint8)
    gray[2:6, 2:6] = 255
    gray[10:28, 8:28] = 128
    gray[15:20, 12:20] = 50
    for box in ([2, 2, 6, 6], [8, 10, 28, 28], [11, 14, 21, 21]):
        truth = np.array([box])
        assert_reached(gray, truth)
        assert reached(gray, truth, IOU_THRESHOLDS)[1].max() == 1


def test_iou_by_hand():
    # 5 × 5 and 2 × 5 pixels that share 2 × 4.
    overlap = iou(np.array([[1, 2, 5, 6]]), np.array([[3, 1, 4, 5]]), inclusive=True)
    assert overlap.tolist() == [8 / 27]
    points = iou(np.zeros((3, 1, 4), int), np.zeros((2, 4), int), inclusive=True)
    assert points.tolist() == [[1, 1]] * 3
    boxes = np.array([[1, 1, 3, 3], [4, 4, 5, 5]])
    assert (iou(boxes[:, None], boxes, inclusive=True) == np.eye(2)).all()
    # In continuous coordinates: 2 × 2 and 2 × 2 that share 1 × 2; and no area at all.
    first, second = np.array([0.0, 0, 2, 2]), np.array([[1.0, 0, 3, 2], [5, 5, 5, 5]])
    assert iou(first, second).tolist() == [1 / 3, 0]
    assert iou(second[1:], second[1:]).tolist() == [0]
    assert np.isnan(iou(second, np.full(4, np.nan))).all()


def test_the_best_of_several_objects_counts():
    gray = np.zeros((8, 10), dtype=np.uint8)
    gray[0:2, 0:2] = 255
    gray[4:8, 5:9] = 128
    largest, any_contour = best_ious(search(gray), np.array([[0, 0, 2, 2], [5, 4, 9, 5]]))
    assert any_contour.tolist() == [1.0] * 255
    # The larger contour shares 2 of 4 rows with the second object.
    assert largest.tolist() == [0.5] * 128 + [1.0] * 127


def test_truth_is_scaled_and_truncated_as_in_the_reference():
    # resize_bbox of the reference: (1, 2, 4, 3) of a 10 × 20 image in 35 × 10 pixels is
    # (3, 1, 14, 1); here the grid is 224 × 224.
    truth = in_view(np.array([[1, 2, 4, 3]]), np.array([0, 0, 10, 20], np.float32))
    assert truth.pixels.tolist() == [[22, 22, 89, 33]]
    assert truth.boxes.tolist() == [[1, 2, 4, 3]]
    assert truth.outside == 0


def test_truth_is_clipped_to_the_view():
    view = np.array([100, 0, 324, 224], np.float32)
    boxes = np.array([[0, 10, 150, 20], [0, 0, 100, 50], [300, 200, 400, 240], [324, 0, 330, 9]])
    truth = in_view(boxes, view)
    assert truth.boxes.tolist() == [[100, 10, 150, 20], [300, 200, 324, 224]]
    # The last pixel of the view is 223.
    assert truth.pixels.tolist() == [[0, 10, 50, 20], [200, 200, 223, 223]]
    assert truth.outside == 2


def test_fixed_boxes_peaks_and_energy_by_hand():
    view = np.array([0, 0, GRID, GRID], np.float32)
    truth = in_view(np.array([[0, 0, 112, 224], [200, 200, 210, 210]]), view)
    fixed = np.array([[0, 0, 224, 224], [np.nan] * 4])
    assert [fixed_iou(box, truth) for box in fixed] == [0.5, 0.0]
    assert peak_distance(np.array([50.0, 224.0]), truth) == 0
    assert peak_distance(np.array([115.0, 100.0]), truth) == 3
    assert peak_distance(np.array([203.0, 214.0]), truth) == 4
    assert peak_distance(np.array([np.nan, np.nan]), truth) == np.inf
    # The left half, and 10 × 10 pixels of the right one.
    assert energy_inside(np.ones((GRID, GRID)), truth) == (112 * 224 + 100) / 224**2
    assert energy_inside(np.zeros((GRID, GRID)), truth) == 0
    # Below zero counts as nothing: all that is positive lies in the left column of cells.
    energy = positive_part(np.array([[1.0, -5, -5, -5]]))
    assert energy_inside(energy, truth) == pytest.approx(1)


def test_baselines():
    view = np.array([10, 20, 110, 70], np.float32)
    truth = in_view(np.array([[35, 20, 85, 70]]), view)
    image = baseline("whole_image", view)
    assert [fixed_iou(box, truth) for box in image.fixed] == [0.5, 0.5]
    assert image.peak.tolist() == [60, 45]
    assert energy_inside(image.energy, truth) == 0.5
    assert baseline_sweep("whole_image").boxes.tolist() == [[0, 0, 223, 223]] * 255
    centre = baseline("center_gaussian", view)
    boxes = baseline_sweep("center_gaussian").boxes
    # Centred (boxes end one pixel behind their contour) and shrinking.
    inner = boxes[boxes[:, 0] > 0]
    assert len(inner) > 200
    assert (inner[:, 0] + inner[:, 2] == GRID).all()
    assert (np.diff(boxes[:, 2] - boxes[:, 0]) <= 0).all()
    assert centre.peak.tolist() == [60, 45]
    assert 0.5 < energy_inside(centre.energy, truth) < 1


@pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 333), (500, 375), (1, 7)])
def test_masks_are_resized_as_by_opencv(height, width):
    mask = np.random.default_rng(0).integers(0, 2, (height, width), dtype=np.uint8)
    view = np.array([0, 0, width, height], np.float32)
    expected = cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_NEAREST)
    assert (mask_in_view(mask, (width, height), view) == expected).all()
    # A mask of another size than its image covers it all the same.
    view = np.array([0, 0, 2 * width, 3 * height], np.float32)
    assert (mask_in_view(mask, (2 * width, 3 * height), view) == expected).all()


def test_masks_are_cropped_to_the_view():
    mask = np.zeros((10, 20), np.uint8)
    mask[2:6, 8:16] = 1
    view = np.array([8, 2, 16, 6], np.float32)
    assert mask_in_view(mask, (20, 10), view).all()
    assert mask_in_view(mask, (20, 10), np.array([0, 0, 8, 10], np.float32)).sum() == 0


def pxap(pairs) -> float:
    """Of images in a group each, their states merged from parts of one."""
    parts = []
    for index, (score, mask) in enumerate(pairs):
        histograms = score_histograms(score, mask)[None, None].astype(np.uint32)
        added = values("masks", {"histograms": histograms}, np.array([False]))
        parts.append(State.update(np.array([index]), added))
    rows, _ = summarise(State.merge(parts, GROUPS), ["method"], ["pxap"])
    return rows[0]["value"]


def test_pxap():
    mask = np.zeros((GRID, GRID), np.uint8)
    mask[:, :56] = 1
    assert pxap([(mask.astype(float), mask)]) == 1
    for value in (0.0, 0.5, 1.0):  # a constant map has the precision of chance
        assert pxap([(np.full(mask.shape, value), mask)]) == pytest.approx(0.25)
    ignored = mask.copy()
    ignored[:, 100:] = 255
    assert pxap([(np.zeros(mask.shape), ignored)]) == pytest.approx(0.56)
    # Pixels of both images are pooled; of each the area under precision and recall, by hand:
    # a quarter is found at precision 1 by score 1, the rest at the precision of the whole.
    half = np.zeros((GRID, GRID))
    half[:, :28] = 1
    assert pxap([(half, mask)]) == pytest.approx(0.5 * 1 + 0.5 * 0.25)
    assert pxap([(half, mask), (half, mask)]) == pxap([(half, mask)])


def test_pxap_is_the_average_precision():
    rng = np.random.default_rng(3)
    score = rng.random((GRID, GRID)).round(2) * 0.999
    mask = (rng.random((GRID, GRID)) < score).astype(np.uint8)
    order = np.argsort(-score.ravel(), kind="stable")
    found = mask.ravel()[order].cumsum()
    ends = np.append(np.flatnonzero(np.diff(score.ravel()[order])), GRID**2 - 1)
    precision, recall = found[ends] / (ends + 1), found[ends] / found[-1]
    expected = (precision * np.diff(recall, prepend=0)).sum()
    assert pxap([(score, mask)]) == pytest.approx(expected, abs=1e-9)


def plain_accuracies(maps, truths) -> tuple[float, float]:
    """MaxBoxAcc and MaxBoxAccV2 by a loop over all 1000 thresholds, in the reference's order."""
    right = np.zeros((4, 1000))
    for cells, boxes in zip(maps, truths, strict=True):
        score = cv2.resize(cells, (GRID, GRID), interpolation=cv2.INTER_CUBIC)
        score -= score.min()
        score /= score.max()
        gray = (score * 255).astype(np.uint8)
        for index, threshold in enumerate(np.arange(0, 1, 0.001)):
            found, largest = searched(gray, int(threshold * gray.max()))
            overlaps = [max(overlap(box, truth) for truth in boxes) for box in found]
            right[0, index] += overlaps[largest] >= 0.5
            for row, wanted in enumerate((0.3, 0.5, 0.7), start=1):
                right[row, index] += max(overlaps) >= wanted
    best = (right / len(maps)).max(1)
    return best[0], best[1:].mean()


def overlap(box, truth) -> float:
    width = min(box[2], truth[2]) - max(box[0], truth[0]) + 1
    height = min(box[3], truth[3]) - max(box[1], truth[1]) + 1
    shared = max(width, 0) * max(height, 0)
    first, second = ((b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, truth))
    return shared / (first + second - shared)


def test_accuracies_are_those_of_a_plain_loop():
    rng = np.random.default_rng(11)
    maps = [heatmap(rng) for _ in range(8)]
    truths = []
    for _ in maps:
        corners = rng.integers(0, 160, (rng.integers(1, 3), 2))
        truths.append(np.concatenate([corners, corners + rng.integers(20, 64, corners.shape)], 1))
    overlaps = np.stack(
        [
            best_ious(search(quantise(score_map(cells))), in_view(boxes, WHOLE).pixels)
            for cells, boxes in zip(maps, truths, strict=True)
        ]
    )
    top1 = np.arange(len(maps)) % 2 == 0
    rows, _, _ = measured({"method": overlaps}, top1, np.arange(len(maps)))
    found = {row["metric"]: row["value"] for row in rows}
    v1, v2 = plain_accuracies(maps, truths)
    assert found["max_box_acc"] == v1
    assert found["max_box_acc_v2"] == pytest.approx(v2)
    # Right where the top class is right too: the others count as wrong.
    v1, v2 = plain_accuracies(maps[::2], truths[::2])
    assert found["top1_max_box_acc"] == v1 / 2
    assert found["top1_max_box_acc_v2"] == pytest.approx(v2 / 2)


def test_the_best_thresholds_are_reported():
    # The first level at which the box is right is 40, the last 99: the first of equals counts.
    overlaps = np.zeros((1, 2, LEVELS))
    overlaps[:, :, 40:100] = 1
    rows, _, counts = measured({"method": overlaps}, np.array([True]), np.array([3]))
    found = {row["metric"]: row["thresholds"] for row in rows}
    assert found["max_box_acc"] == [THRESHOLDS[40]]
    assert found["top1_max_box_acc_v2"] == [THRESHOLDS[40]] * 3
    assert found["energy_pointing_game"] is None
    assert int(THRESHOLDS[40] * 255) == 40
    points = list(curves(counts, 1, ["method"], known=True))
    assert len(points) == 2 * 4 * LEVELS
    points = [row for row in points if row["metric"] == "max_box_acc"]
    assert [row["accuracy"] for row in points] == [0.0] * 40 + [1.0] * 60 + [0.0] * 155
    alone = {row["metric"] for row in curves(counts, 1, ["method"], known=False)}
    assert alone == {"top1_max_box_acc", "top1_max_box_acc_v2"}


def test_some_levels_are_those_of_all():
    gray = quantise(score_map(heatmap(np.random.default_rng(5))))
    truth = in_view(np.array([[30, 40, 120, 150], [100, 20, 200, 90]]), WHOLE)
    every = np.stack(best_ious(search(gray), truth.pixels))
    levels = [0, 30, 90, 254]
    some = np.stack(best_ious(search(gray, levels), truth.pixels))
    assert (some == every[:, levels]).all()


def measured(overlaps, top1, groups, scores=None):
    """Rows, pairs and counts of hits of methods, as the job comes to them from two passes.

    Args:
        overlaps: by method, those of the largest contour's box and of any: `[N, 2, 255]`.
        top1: `[N]`, whether the top class is right.
        groups: `[N]`.
        scores: the other measures of all methods, `[N]` each; left out, nothing is right.
    """
    both = np.stack(list(overlaps.values()), axis=1)
    largest, any_contour = both[:, :, 0], both[:, :, 1]
    found = hits({"iou": largest, "iou_any": any_contour})
    counts = np.stack([found, found & top1[:, None, None, None]], axis=2).sum(0)
    levels = best_levels(counts)
    by_level = swept({"iou": largest, "iou_any": any_contour})[:, :, None]
    best = np.take_along_axis(by_level, levels[None, ..., None], axis=-1)[..., 0]
    none = {"iou_15": 0.0, "iou_20": 0.0, "peak_distance": np.inf, "energy": 0.0}
    columns = {
        name: np.repeat(
            np.broadcast_to((scores or none)[name], top1.shape)[:, None], len(overlaps), axis=1
        )
        for name in MEASURES
    }
    # In two parts, as from two shards.
    parts = []
    for part in (slice(None, len(top1) // 2), slice(len(top1) // 2, None)):
        chosen = {name: column[part] for name, column in columns.items()}
        if len(top1[part]):
            added = values("boxes", chosen, top1[part], best[part])
            parts.append(State.update(groups[part], added))
    state = State.merge(parts, GROUPS)
    return *summarise(state, list(overlaps), names_of("boxes"), levels), counts


def flips(images: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(images) < share


def right_or_not(right: np.ndarray) -> np.ndarray:
    """Overlaps of images that are right at every threshold or at none."""
    return np.broadcast_to(right[:, None, None].astype(float), (len(right), 2, LEVELS))


def everything(right: np.ndarray) -> dict[str, np.ndarray]:
    """The other measures, likewise."""
    share = right.astype(float)
    distance = np.where(right, 0, np.inf)
    return {"iou_15": share, "iou_20": share, "peak_distance": distance, "energy": share}


@pytest.mark.parametrize("images", [400, 6000])
def test_intervals_are_as_wide_as_theory_says(images):
    # Of 6000 images several share a group.
    right, groups = flips(images, 0.6, 1), dealt(images)
    assert np.bincount(groups).max() - np.bincount(groups).min() <= 1
    every = np.ones(images, bool)
    rows, _, _ = measured({"method": right_or_not(right)}, every, groups, everything(right))
    assert len(rows) == len(names_of("boxes"))
    expected = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / images)
    for row in rows:
        assert row["value"] == pytest.approx(right.mean())
        assert row["images"] == images
        assert (row["ci_high"] - row["ci_low"]) / 2 == pytest.approx(expected, rel=0.12)
        assert row["ci_low"] < row["value"] < row["ci_high"]


def test_differences_are_paired():
    images = 800
    first, groups = flips(images, 0.6, 1), dealt(images)
    second = first.copy()
    second[:40] = True  # the same but for a few images
    overlaps = {"a": right_or_not(first), "b": right_or_not(second), "c": right_or_not(first)}
    _, pairs, _ = measured(overlaps, np.ones(images, bool), groups)
    found = {(p["method"], p["other"]): p for p in pairs if p["metric"] == "max_box_acc"}
    gained = (second.astype(float) - first).mean()
    pair = found["a", "b"]
    assert pair["difference"] == pytest.approx(-gained)
    assert pair["ci_low"] < pair["difference"] < pair["ci_high"] < 0
    # Unpaired, it would be within noise: each alone is uncertain by more than their difference.
    assert gained < 1.96 * np.sqrt(2 * 0.24 / images)
    same = found["a", "c"]
    assert (same["difference"], same["ci_low"], same["ci_high"]) == (0, 0, 0)


def test_rows_say_what_metrics_there_are():
    assert names_of("masks") == ["pxap"]
    twins = [name for name in names_of("boxes") if name.startswith("top1_")]
    assert twins == [
        *("top1_max_box_acc", "top1_max_box_acc_v2", "top1_box_acc_15", "top1_box_acc_20"),
        *("top1_pointing_game", "top1_pointing_game_0"),
    ]
    shown = titles(["pxap", "max_box_acc", "top1_max_box_acc", "box_acc_15"])
    assert shown == {
        "max_box_acc": "MaxBoxAcc", "top1_max_box_acc": "top-1 MaxBoxAcc", "pxap": "PxAP"
    }  # fmt: skip
    assert all(name == metric.name for name, metric in METRICS.items())


def test_states_add():
    rng = np.random.default_rng(0)
    groups, added = rng.integers(0, GROUPS, 500), {"x": rng.random((500, 3, 2))}
    whole = State.merge([State.update(groups, added)], GROUPS)
    parts = [State.update(groups[i::7], {"x": added["x"][i::7]}) for i in range(7)]
    merged = State.merge(parts, GROUPS)
    plain = np.zeros((GROUPS, 3, 2))
    for group, value in zip(groups, added["x"], strict=True):
        plain[group] += value
    np.testing.assert_allclose(whole.sums["x"], plain)
    np.testing.assert_allclose(merged.sums["x"], plain)
    assert (merged.images == np.bincount(groups, minlength=GROUPS)).all()


def test_zero_images_are_refused():
    with pytest.raises(ValueError, match="zero images"):
        draws(np.zeros(GROUPS, int))
    with pytest.raises(ValueError, match="zero images"):
        summarise(State.merge([], GROUPS), ["method"], ["pxap"])


def test_every_baseline_is_measured():
    truth = in_view(np.array([[0, 0, 224, 224]]), WHOLE)
    for name in BASELINES:
        claim = baseline(name, WHOLE)
        found = {measure: function(claim, truth) for measure, function in MEASURES.items()}
        assert found["peak_distance"] == 0
        assert found["energy"] == pytest.approx(1)
        assert 0 < found["iou_15"] <= 1
        assert best_ious(baseline_sweep(name), truth.pixels)[1][0] == 1
