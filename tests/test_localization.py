"""Peaks and boxes, worked out by hand."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from scacam import localization
from scacam.localization import BOX_THRESHOLD, box_of_region, localize, upsample
from scacam.tables import pack_heatmaps, unpack_heatmaps


def one(heatmap, relu=False, view=(0, 0, 8, 8), input_size=(8, 8)):
    peaks, boxes = localize(
        np.array([heatmap], dtype=float), np.array([relu]), np.array([view], float), input_size
    )
    return peaks[0].tolist(), boxes[0].tolist()


def test_a_single_cell_at_the_networks_own_resolution():
    heatmap = np.zeros((4, 4))
    heatmap[1, 2] = 5
    # At 4 × 4 input no upsampling: cell (row 1, column 2) is x 2..3, y 1..2.
    assert one(heatmap, view=(0, 0, 4, 4), input_size=(4, 4)) == ([2.5, 1.5], [2, 1, 3, 2])


def test_coordinates_are_those_of_the_original_image():
    heatmap = np.zeros((4, 4))
    heatmap[1, 2] = 5
    # The view is 40 × 80 pixels and begins at (10, 20).
    peak, box = one(heatmap, view=(10, 20, 50, 100), input_size=(4, 4))
    assert peak == [35, 50]
    assert box == [30, 40, 40, 60]


def test_upsampling_spreads_the_box_bilinearly():
    # 2 × 2 to 4 × 4 without aligned corners: rows and columns weigh 0.75 and 0.25 inside.
    heatmap = [[1, 0], [0, 0]]
    np.testing.assert_allclose(upsample(np.array(heatmap, float), (4, 4))[0], [1, 0.75, 0.25, 0])
    # 0.25 · 0.75 = 0.1875 is below 20 %, 0.25 · 1 and 0.75 · 0.75 are above.
    assert one(heatmap, view=(0, 0, 4, 4), input_size=(4, 4)) == ([1, 1], [0, 0, 3, 3])


def test_upsampling_is_torchs():
    maps = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(maps)[None], size=(64, 96), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(upsample(maps, (64, 96)), expected[0], atol=1e-6)


def test_the_largest_region_counts_not_the_one_with_the_peak():
    heatmap = np.zeros((8, 8))
    heatmap[0, 0] = 10
    heatmap[4:7, 3:8] = 3
    assert one(heatmap) == ([0.5, 0.5], [3, 4, 8, 7])


def test_regions_touch_at_corners():
    heatmap = np.diag([1.0] * 8)
    assert one(heatmap)[1] == [0, 0, 8, 8]


def test_equal_regions_and_equal_peaks_take_the_first():
    heatmap = np.zeros((8, 8))
    heatmap[1, 1] = heatmap[6, 6] = 1
    assert one(heatmap) == ([1.5, 1.5], [1, 1, 2, 2])


def test_a_region_at_the_border():
    heatmap = np.zeros((8, 8))
    heatmap[5:, 6:] = 1
    assert one(heatmap)[1] == [6, 5, 8, 8]


def test_constant_maps_have_neither():
    for value in (0, 3, -3):
        peak, box = one(np.full((4, 4), value))
        assert np.isnan(peak).all()
        assert np.isnan(box).all()


def test_a_map_without_a_positive_value_has_a_peak_but_no_box():
    heatmap = np.full((4, 4), -2.0)
    heatmap[0, 3] = -1
    for relu in (False, True):
        peak, box = one(heatmap, relu, view=(0, 0, 4, 4), input_size=(4, 4))
        assert peak == [3.5, 0.5]
        assert np.isnan(box).all()


def test_a_positive_value_that_upsampling_takes_away_has_no_box():
    heatmap = np.full((3, 3), -1.0)
    heatmap[1, 1] = 0.001
    # 3 to 6: at the cell's centre it weighs 0.75² = 0.5625, and −1 the rest: below zero.
    assert (upsample(heatmap, (6, 6)) < 0).all()
    peak, box = one(heatmap, False, (0, 0, 6, 6), (6, 6))
    assert peak == [3, 3]
    assert np.isnan(box).all()
    # After a ReLU it weighs 0.1875 at least where it is counted, a third of the largest.
    assert one(heatmap, True, (0, 0, 6, 6), (6, 6)) == ([3, 3], [1, 1, 5, 5])
    # 3 to 9: one pixel lies on the cell's centre and keeps its value.
    assert one(heatmap, False, (0, 0, 9, 9), (9, 9)) == ([4.5, 4.5], [4, 4, 5, 5])


def test_a_positive_value_that_storage_takes_away_has_no_box():
    heatmap = np.full((4, 4), -1.0)
    heatmap[0, 3] = 1e-9
    stored = unpack_heatmaps(*pack_heatmaps(heatmap[None]))[0]
    assert stored.max() == 0
    peak, box = one(stored, view=(0, 0, 4, 4), input_size=(4, 4))
    assert peak == [3.5, 0.5]
    assert np.isnan(box).all()


def test_one_map_without_a_box_does_not_cost_the_others_theirs():
    maps = np.full((3, 3, 3), -1.0)
    maps[:, 1, 1] = 1, 0.001, 1
    views = np.array([[0, 0, 6, 6]] * 3, dtype=float)
    _, boxes = localize(maps, np.zeros(3, bool), views, (6, 6))
    assert np.isnan(boxes[:, 0]).tolist() == [False, True, False]


def test_the_scale_of_a_map_does_not_matter():
    whole = np.random.default_rng(0).integers(-50, 100, (20, 5, 5)).astype(np.float32)
    views, relu = np.array([[0, 0, 40, 40]] * 20), np.arange(20) % 2 == 0
    expected = localize(whole, relu, views, (40, 40))
    for exponent in (-149, -100, 100, 121):  # float32 ends at 2^-149 and 2^128
        found = localize(np.ldexp(whole, exponent), relu, views, (40, 40))
        np.testing.assert_array_equal(found.peaks, expected.peaks)
        np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_a_map_that_is_not_finite_stops_nothing():
    heatmap = np.eye(4)
    heatmap[2, 1] = np.nan
    peak, box = one(heatmap)
    assert np.isnan(peak + box).all()
    heatmap[2, 1] = np.inf
    with np.errstate(invalid="ignore"):
        peak, box = one(heatmap)
    assert peak == [3, 5]
    assert np.isnan(box).all()


def test_no_maps_and_maps_of_one_cell():
    peaks, boxes = localize(np.zeros((0, 4, 4)), np.zeros(0, bool), np.zeros((0, 4)), (8, 8))
    assert (peaks.shape, boxes.shape) == ((0, 2), (0, 4))
    peak, box = one([[7.0]])
    assert np.isnan(peak + box).all()


def test_a_mask_without_a_region_has_no_box():
    assert np.isnan(box_of_region(np.zeros((5, 5), bool))).all()


def test_relu_comes_before_upsampling():
    # Without the ReLU the neighbour's −100 pulls the cells between below the threshold.
    heatmap = [[1, -100]]
    assert one(heatmap, False, (0, 0, 8, 4), (4, 8))[1] == [0, 0, 2, 4]
    assert one(heatmap, True, (0, 0, 8, 4), (4, 8))[1] == [0, 0, 5, 4]


@pytest.mark.parametrize("smooth", [0, 0.7, 2])
def test_regions_are_scipys(smooth):
    rng = np.random.default_rng(1)
    for _ in range(200):
        mask = ndimage.gaussian_filter(rng.standard_normal(rng.integers(1, 60, 2)), smooth) > 0.1
        if mask.any():
            assert box_of_region(mask) == labelled_box(mask)


def labelled_box(mask):
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return (np.nan,) * 4
    sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
    rows, columns = ndimage.find_objects(labels)[int(np.argmax(sizes))]
    return columns.start, rows.start, columns.stop, rows.stop


def maps_of_all_kinds(rng, shape):
    """Some 500 maps as they are stored, `[N, h, w]`."""
    noise = rng.standard_normal((120, *shape))
    y, x = np.indices(shape)
    places = (
        rng.uniform(-1, 1, (80, 2, 1, 1)) * np.reshape(shape, (2, 1, 1))
        + np.reshape(shape, (2, 1, 1)) * 0.5
    )
    squares = ((np.stack([y, x]) - places) ** 2).sum(1)
    widths = rng.uniform(0.3, max(shape), (80, 1, 1)) ** 2
    checkered = np.where((x + y) % 2, 1, rng.uniform(-1, 0.5, (20, 1, 1)))
    kinds = [
        noise,
        *(ndimage.gaussian_filter(noise, (0, smooth, smooth)) for smooth in (0.5, 1, 2)),
        np.exp(-squares / widths),  # a blob, perhaps off the map
        np.exp(-squares / widths) - rng.uniform(0, 1, (80, 1, 1)),
        np.exp(-np.abs(squares - widths)),  # a ring
        checkered,
        rng.choice([0, 0.2, 1], (80, *shape)),  # plateaus, some at the threshold
        rng.choice([-1, -1, 1e-3], (40, *shape)),  # tiny peaks
        -np.abs(noise[:10]),
    ]
    heatmaps = np.concatenate(kinds)
    heatmaps[rng.random(len(heatmaps)) < 0.2] *= 1e-6
    return unpack_heatmaps(*pack_heatmaps(heatmaps.astype(np.float32)))


@pytest.mark.parametrize(
    ("shape", "input_size"),
    [
        ((7, 7), (112, 112)),
        ((7, 7), (224, 224)),
        ((8, 8), (130, 130)),
        ((7, 5), (64, 97)),
        ((14, 14), (70, 70)),
        ((3, 3), (9, 9)),
        ((4, 4), (6, 6)),
        ((6, 6), (6, 9)),
        ((9, 6), (7, 5)),
        ((1, 5), (40, 40)),
    ],
)
def test_boxes_are_those_of_the_upsampled_maps(shape, input_size):
    heatmaps = maps_of_all_kinds(np.random.default_rng(2), shape)
    height, width = input_size
    views = np.array([[0, 0, width, height]] * len(heatmaps), float)
    relu = np.arange(len(heatmaps)) % 2 == 0
    _, boxes = localize(heatmaps, relu, views, input_size)
    for heatmap, rectified, box in zip(heatmaps, relu, boxes, strict=True):
        upsampled = upsample(heatmap.clip(min=0) if rectified else heatmap, input_size)
        expected = labelled_box(upsampled > BOX_THRESHOLD * upsampled.max())
        if np.ptp(heatmap) == 0:
            expected = (np.nan,) * 4
        np.testing.assert_allclose(box, np.float32(expected), rtol=1e-6, atol=1e-4)


def test_a_map_of_one_region_is_not_upsampled(monkeypatch):
    monkeypatch.delattr(localization, "upsample")
    y, x = np.indices((7, 7))
    heatmaps = np.exp(-np.array([(y - row) ** 2 + (x - row / 2) ** 2 for row in range(7)]) / 4)
    views = np.array([[0, 0, 224, 224]] * 7, float)
    _, boxes = localize(heatmaps, np.ones(7, bool), views, (224, 224))
    assert np.isfinite(boxes).all()
