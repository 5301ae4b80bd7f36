"""Maps on trial: numbers of other libraries, numbers by hand, and a slow loop from definitions."""

import itertools
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import spsolve
from scipy.stats import spearmanr
from tiny_networks import colours

import scacam
from scacam import ScacamError
from scacam.trials.case import Tried, between_0_and_1, normal
from scacam.trials.faithfulness import Trials, faithfulness
from scacam.trials.imputation import impute
from scacam.trials.likeness import correlation, rank_correlation, ssim
from scacam.trials.metrics import BASELINES, METRICS, chosen, insane, measured, verdict
from scacam.trials.perturbation import blurred, edge_strength, perturbed, ranks, same, upsampled
from scacam.trials.weights import drawn_anew, redrawn


def curves(model, image, heatmap, counts, background=0.0):
    """Deletion into and insertion into a background, of a model that gives one number per image."""
    images = torch.tensor(image)[None, None]
    back = torch.full_like(images, background)
    places = ranks(torch.tensor(heatmap)[None])
    found = []
    for pair in ((back, images), (images, back)):
        batches = perturbed(*pair, torch.zeros(1, dtype=torch.long), places, counts, 3)
        found.append(np.concatenate([model(batch).numpy() for batch, _ in batches]))
    return found


def areas(found, counts):
    shares = np.array(counts) / counts[-1]
    names = ("deletion", "insertion")
    scores = {**dict(zip(names, found, strict=True)), "share": shares}
    return [float(METRICS[f"{name}_auc"].function(scores)) for name in names]


def total(images):
    return images.sum((1, 2, 3))


def test_the_numbers_of_torch_cam():
    image = [[0.4, 0.3], [0.2, 0.1]]
    counts = [0, 2, 4]
    found = curves(total, image, image, counts)
    np.testing.assert_allclose(found, [[1, 0.3, 0], [0, 0.7, 1]], atol=1e-6)
    np.testing.assert_allclose(areas(found, counts), [0.4, 0.6], atol=1e-6)
    image = [[0.3, 0.25, 0.2, 0.15, 0.1]]
    counts = [0, 2, 4, 5]
    found = curves(total, image, image, counts)
    np.testing.assert_allclose(found, [[1, 0.45, 0.1, 0], [0, 0.55, 0.9, 1]], atol=1e-6)
    np.testing.assert_allclose(areas(found, counts), [0.41, 0.59], atol=1e-6)
    scores = {"probability": np.array([1.0]), "masked": np.array([0.4])}
    assert METRICS["average_drop"].function(scores) == pytest.approx(0.6)


def test_the_numbers_of_xplique():
    """A model that answers 0 as soon as its top pixel is gone."""
    image = np.arange(1, 101, dtype=np.float32).reshape(10, 10) / 100

    def all_or_nothing(images):
        return (images.amax((1, 2, 3)) >= 0.999).float()

    counts = [10 * step for step in range(11)]
    found = curves(all_or_nothing, image, image, counts)
    np.testing.assert_array_equal(found[0], [1] + 10 * [0])
    np.testing.assert_array_equal(found[1], [0] + 10 * [1])
    np.testing.assert_allclose(areas(found, counts), [0.05, 0.95])


def test_an_additive_model():
    rng = np.random.default_rng(0)
    image = rng.random((6, 7), dtype=np.float32)
    image /= image.sum()
    counts = list(range(43))
    there = areas(curves(total, image, image, counts), counts)
    back = areas(curves(total, image, -image, counts), counts)
    assert sum(there) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(there, back[::-1], atol=1e-6)
    assert there[0] < 0.5 < there[1]
    constant = areas(curves(total, image, np.ones_like(image), counts), counts)
    reading = areas(curves(total, image, -np.arange(42.0).reshape(6, 7), counts), counts)
    assert constant == reading
    random = [
        areas(curves(total, image, rng.random((6, 7)), counts), counts)[0] for _ in range(200)
    ]
    assert abs(np.mean(random) - 0.5) < 3 * np.std(random) / np.sqrt(200)


def test_ties_are_ranked_in_reading_order():
    places = ranks(torch.tensor([[[1.0, 2.0, 1.0], [2.0, 0.0, 1.0]]]))
    assert places.tolist() == [[2, 0, 3, 1, 5, 4]]


@pytest.mark.parametrize("size", [(30, 41), (224, 224)])
def test_blur_is_that_of_opencv(size):
    image = np.random.default_rng(1).random((3, *size), dtype=np.float32)
    found = blurred(torch.from_numpy(image)[None])[0].numpy()
    expected = cv2.GaussianBlur(
        image.transpose(1, 2, 0), (11, 11), 5, borderType=cv2.BORDER_REFLECT_101
    )
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)])
def test_blur_keeps_what_is_constant_however_small(size):
    image = torch.full((1, 2, *size), 0.7)
    torch.testing.assert_close(blurred(image), image)


def test_edges():
    image = torch.zeros(1, 3, 5, 6)
    image[..., 3:] = 1
    edges = edge_strength(image)[0]
    np.testing.assert_allclose(edges, np.tile([0, 0, 4, 4, 0, 0], (5, 1)))


def test_one_pixel_is_imputed_from_its_neighbours():
    image = torch.arange(16.0).reshape(1, 1, 4, 4) ** 1.5
    values = image[0, 0].numpy()
    known = torch.ones(3, 4, 4, dtype=torch.bool)
    known[0, 1, 2] = known[1, 0, 0] = known[2, 3, 1] = False
    found = impute(image.expand(3, 1, 4, 4), known)[:, 0].numpy()
    direct = values[0, 2] + values[2, 2] + values[1, 1] + values[1, 3]
    diagonal = values[0, 1] + values[0, 3] + values[2, 1] + values[2, 3]
    assert found[0, 1, 2] == pytest.approx(direct / 6 + diagonal / 12, rel=1e-5)
    corner = ((values[0, 1] + values[1, 0]) / 6 + values[1, 1] / 12) / (5 / 12)
    assert found[1, 0, 0] == pytest.approx(corner, rel=1e-5)
    border = (values[3, 0] + values[3, 2] + values[2, 1]) / 6 + (values[2, 0] + values[2, 2]) / 12
    assert found[2, 3, 1] == pytest.approx(border / (8 / 12), rel=1e-5)


def test_two_neighbours_are_imputed_from_each_other():
    image = torch.arange(16.0).reshape(1, 1, 4, 4) % 5
    values = image[0, 0].numpy()
    known = torch.ones(1, 4, 4, dtype=torch.bool)
    known[0, 1, 1:3] = False
    left, right = impute(image, known)[0, 0, 1, 1:3].tolist()
    around = [
        sum(values[row, column] / (6 if row == 1 or column == middle else 12)
            for row in range(3) for column in range(middle - 1, middle + 2)
            if (row, column) not in ((1, 1), (1, 2)))
        for middle in (1, 2)
    ]  # fmt: skip
    # left = around + right / 6 and the other way round
    assert left == pytest.approx((around[0] + around[1] / 6) / (1 - 1 / 36), rel=1e-5)
    assert right == pytest.approx((around[1] + around[0] / 6) / (1 - 1 / 36), rel=1e-5)


def solved(image, known):
    """The imputation of ROAD from its definition, by a sparse solver: `[C, H, W]`."""
    rows, columns = np.nonzero(~known)
    unknown = np.full(known.shape, -1)
    unknown[rows, columns] = index = np.arange(len(rows))
    matrix = csc_matrix((len(rows), len(rows)))
    right = np.zeros((len(rows), len(image)))
    for down, across in itertools.product((-1, 0, 1), repeat=2):
        if (down, across) == (0, 0):
            continue
        weight = 1 / 12 if down and across else 1 / 6
        row, column = rows + down, columns + across
        inside = (row >= 0) & (row < known.shape[0]) & (column >= 0) & (column < known.shape[1])
        row, column, here = row[inside], column[inside], index[inside]
        there = unknown[row, column]
        links = there >= 0
        places = np.concatenate([[here, here], [here[links], there[links]]], axis=1)
        weights = np.repeat([weight, -weight], [len(here), links.sum()])
        matrix += csc_matrix((weights, places), shape=matrix.shape)
        right[here[~links]] += weight * image[:, row[~links], column[~links]].T
    filled = image.copy()
    filled[:, ~known] = spsolve(matrix, right).reshape(len(rows), -1).T
    return filled


@pytest.mark.parametrize("size", [(4, 4), (37, 22), (5, 64)])
def test_imputation_solves_the_system(size):
    rng = np.random.default_rng(2)
    images = rng.normal(size=(4, 2, *size)).astype(np.float32)
    smooth = cv2.resize(rng.random((3, 3)), size[::-1])
    known = np.stack(
        [rng.random(size) < 0.1, rng.random(size) < 0.9, smooth > 0.6, smooth > np.median(smooth)]
    )
    known[:, 0, 0] = True
    found = impute(torch.from_numpy(images), torch.from_numpy(known)).numpy()
    for image, mask, filled in zip(images, known, found, strict=True):
        np.testing.assert_allclose(filled, solved(image, mask), atol=1e-3)


def test_nothing_and_everything_to_impute():
    images = torch.randn(2, 3, 9, 9)
    known = torch.tensor([True, False])[:, None, None].expand(2, 9, 9)
    found = impute(images, known)
    torch.testing.assert_close(found[0], images[0])
    assert not found[1].any()


def test_the_same_maps_are_one_pair():
    maps = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    maps[0, 2] = maps[0, 0]
    maps[1, 1] = maps[1, 0] = -0.0 * maps[1, 0]
    maps[1, 0] = 0.0
    pairs = same(maps)
    assert pairs.images.tolist() == [0, 0, 1, 1]
    assert pairs.claimants.tolist() == [0, 1, 0, 2]
    assert pairs.places.tolist() == [[0, 1, 0], [2, 2, 3]]


def test_likeness():
    rng = np.random.default_rng(3)
    one, other = rng.integers(0, 6, (2, 5, 9, 8)).astype(np.float32) / 5
    pairs = list(zip(one, other, strict=True))
    expected = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in pairs]
    np.testing.assert_allclose(rank_correlation(one, other), expected)
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
    np.testing.assert_allclose(correlation(one, other), expected, rtol=1e-6)
    np.testing.assert_allclose(ssim(one, other), [slow_ssim(a, b) for a, b in pairs], rtol=1e-6)
    constant = np.full_like(one, 0.1)
    for measure in (rank_correlation, correlation, ssim):
        np.testing.assert_array_equal(measure(one, one), 1)
        np.testing.assert_array_equal(measure(constant, constant), 1)
    for measure in (rank_correlation, correlation):
        np.testing.assert_array_equal(measure(one, constant), 0)


def slow_ssim(one, other):
    found = []
    for row in range(one.shape[0] - 6):
        for column in range(one.shape[1] - 6):
            a, b = (
                m[row : row + 7, column : column + 7].astype(float).ravel() for m in (one, other)
            )
            covariance = np.cov(a, b)
            light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
            shape = (2 * covariance[0, 1] + 9e-4) / (covariance[0, 0] + covariance[1, 1] + 9e-4)
            found.append(light * shape)
    return np.mean(found)


def test_metrics_by_hand():
    scores = {
        "probability": np.array([[0.8], [0.5]]),
        "masked": np.array([[0.4, 0.9], [0.5, 0.0]]),
        "complexity": np.array([[0.5, 1.0], [0.25, 0.2]]),
        "correlation": np.array([[0.0, 1.0], [1.0, -1.0]]),
        "morf": np.array([[[0.2, 0.4], [0.0, 0.0]], [[0.5, 0.5], [1.0, 0.0]]]),
        "lerf": np.array([[[0.6, 0.4], [1.0, 1.0]], [[0.5, 0.5], [0.0, 0.0]]]),
    }
    names = ["average_drop", "increase_in_confidence", "average_gain", "coherency", "adcc", "road"]
    found = measured(chosen(names), scores)
    expected = {
        "average_drop": [[0.5, 0], [0, 1]],
        "increase_in_confidence": [[0, 1], [0, 0]],
        "average_gain": [[0, 0.5], [0, 0]],
        "coherency": [[0.5, 1], [1, 0]],
        "adcc": [[0.5, 0], [3 / (1 + 4 / 3 + 1), 0]],
        "road": [[0.1, 0.5], [0, -0.25]],
    }
    assert list(found) == names
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-9, err_msg=name)


def test_failed_sanity_checks():
    rows = [
        {"method": "good", "metric": "random_head", "ci_low": 0.1},
        {"method": "blind", "metric": "random_head", "ci_low": 0.9},
        {"method": "blind", "metric": "random_network", "ci_low": 0.6},
        {"method": "blind", "metric": "insertion_auc", "ci_low": 0.9},
        {"method": "constant_map", "metric": "random_head", "ci_low": 1.0},
    ]
    assert insane(rows) == {"blind": ["random_head", "random_network"]}
    same = [
        {"method": "good", "metric": "random_logit", "ci_low": 0.8},
        {"method": "blind", "metric": "random_logit", "ci_low": 0.995},
        {"method": "constant_map", "metric": "random_logit", "ci_low": 1.0},
    ]
    assert verdict([*rows, *same]) == [
        "maps hardly change when the classifier's weights are random: blind",
        "maps hardly change when the whole network is random: blind",
        "maps are the same for every class: blind",
    ]
    assert verdict([row for row in rows if row["method"] == "good"]) == [
        "the maps of all methods change when the classifier's weights are random"
    ]


@pytest.fixture(scope="module")
def network():
    return colours()


@pytest.fixture(scope="module")
def shown(network):
    generator = torch.Generator().manual_seed(4)
    images = F.interpolate(torch.rand(5, 3, 4, 4, generator=generator), (32, 32), mode="bilinear")
    return images, scacam.Explainer(network)(images)


def test_all_metrics_of_a_tiny_network(network, shown):
    images, explanation = shown
    found = scacam.faithfulness(network, images, explanation.heatmaps)
    assert found.claimants == (*explanation.heatmaps, *BASELINES)
    assert list(found.metrics) == list(METRICS)
    assert all(np.isfinite(values).all() for values in found.metrics.values())
    assert {values.shape for values in found.metrics.values()} == {(5, len(found.claimants))}
    np.testing.assert_array_equal(found.class_ids, explanation.class_ids[:, 0])
    mean = found.mean()
    for check in ("random_logit", "random_head", "random_network", "random_logit_ssim"):
        assert all(mean[check][name] == 1 for name in BASELINES)
        assert mean[check]["sca_cam"] < 1 or check == "random_logit"
    # What knows neither class nor classifier.
    assert mean["random_logit"]["feature_map"] == mean["random_head"]["feature_map"] == 1
    assert mean["random_head"]["gap_cam"] < 1
    for name in ("constant_map", "center_gaussian", "random_map"):
        assert mean["sensitivity"][name] == 0
    assert mean["sensitivity"]["edge_strength"] > 0 < mean["sensitivity"]["grad_cam"]
    assert mean["complexity"]["constant_map"] == 1
    assert mean["average_drop"]["constant_map"] == 0
    assert set(found.curves) == {"deletion", "insertion", "morf", "lerf"}
    assert found.curves["deletion"].shape == (5, len(found.claimants), 21)
    np.testing.assert_allclose(found.curves["deletion"][:, 0, 0], found.probability, rtol=1e-6)
    np.testing.assert_allclose(found.curves["insertion"][:, 3, -1], found.probability, rtol=1e-6)


def test_a_batch_is_its_images(network, shown):
    images, explanation = shown
    heatmaps = {name: explanation.heatmaps[name] for name in ("sca_cam", "grad_cam")}
    names = ["insertion_auc", "adcc", "random_logit", "random_network", "sensitivity"]
    whole = faithfulness(network, images, heatmaps, names)
    trials = Trials(network, [Tried(name, name) for name in heatmaps], names)
    for index in range(len(images)):
        one = slice(index, index + 1)
        part = trials(images[one], {name: m[one] for name, m in heatmaps.items()}, [index])
        for name, values in part.metrics.items():
            np.testing.assert_allclose(values, whole.metrics[name][one], atol=1e-4, err_msg=name)


def test_many_images_are_tried_in_parts(network, shown):
    images, explanation = shown
    heatmaps = {"sca_cam": explanation.heatmaps["sca_cam"]}
    names = ["average_drop", "random_head"]
    once = faithfulness(network, images, heatmaps, names)
    often = {"sca_cam": heatmaps["sca_cam"].repeat(4, 1, 1, 1)}
    found = faithfulness(network, images.repeat(4, 1, 1, 1), often, names)
    assert found.metrics["random_head"].shape == (20, 5)
    np.testing.assert_allclose(
        found.metrics["average_drop"][15:, 0], once.metrics["average_drop"][:, 0], atol=1e-6
    )


def test_maps_that_rank_alike_share_their_passes(network, shown):
    images, explanation = shown
    seen = SimpleNamespace(images=0)
    handle = network.module.register_forward_hook(
        lambda module, inputs, output: setattr(seen, "images", seen.images + len(output))
    )

    def passes(heatmaps):
        seen.images = 0
        faithfulness(network, images, heatmaps, ["deletion_auc", "road", "average_drop"])
        return seen.images

    own = explanation.heatmaps["grad_cam"]
    try:
        alone = passes({"grad_cam": own})
        shared = passes({"grad_cam": own, "hires_cam": 3 * own, "xgrad_cam": own / 7})
        apart = passes({"grad_cam": own, "hires_cam": own.flip(-1), "xgrad_cam": own.flip(-2)})
    finally:
        handle.remove()
    assert shared == alone
    assert apart == alone + 2 * len(images) * (19 + 18 + 1)


def test_weights_are_drawn_and_given_back(network):
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    head = redrawn(network, True)
    assert set(head) == {"3.weight", "3.bias"}
    changed = []

    def look():
        with drawn_anew(network, redrawn(network, False)):
            for name, value in network.module.state_dict().items():
                changed.append(not torch.equal(value, before[name]) or not before[name].any())
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert len(changed) == 4
    assert all(changed)
    for name, value in network.module.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_cannot_be_tried_is_refused(network, shown):
    images, explanation = shown
    own = explanation.heatmaps["grad_cam"]
    with pytest.raises(ScacamError, match="unknown method 'mine'"):
        faithfulness(network, images, {"mine": own})
    with pytest.raises(ScacamError, match="unknown metric 'auc'; known are deletion_auc"):
        faithfulness(network, images, {"grad_cam": own}, ["auc"])
    with pytest.raises(ScacamError, match="5 images and 2 maps of grad_cam"):
        faithfulness(network, images, {"grad_cam": own[:2]})
    with pytest.raises(ScacamError, match="at least one method"):
        faithfulness(network, images, {})
    with pytest.raises(ScacamError, match="more classes than the top one"):
        faithfulness(network, images, {"grad_cam": own[:, 0]}, ["random_logit"])
    without = faithfulness(network, images, {"grad_cam": own[:, 0]}, steps=1)
    assert not {"random_logit", "random_logit_ssim"} & set(without.metrics)


@pytest.mark.long
def test_a_slow_loop_from_the_definitions(photo):
    """One image of a real network, the maps of two methods, one pass at a time."""
    network = scacam.load_network("efficientnet_lite0")
    pixels = np.asarray(photo(224, 224, 3))
    images = network.normalize(torch.from_numpy(pixels.copy())[None])
    methods = ("grad_cam", "sca_cam")
    explainer = scacam.Explainer(network, methods, 2)
    heatmaps = explainer(images).heatmaps
    names = [name for name in METRICS if not name.startswith("random_") or "logit" in name]
    found = faithfulness(network, images, heatmaps, names, steps=4)
    image, noise = images[0], torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(0))

    def said(changed):
        with torch.no_grad():
            return float(network.module(changed[None]).softmax(1)[0, class_id])

    with torch.no_grad():
        class_id = int(network.module(images).argmax())
    for index, method in enumerate(methods):
        small = normal(heatmaps[method][0, 0], method == "grad_cam")
        large = upsampled(small[None], (224, 224))[0].numpy()
        order = sorted(range(224 * 224), key=lambda place: -large.ravel()[place])

        def first(count, order=order):
            mask = np.zeros(224 * 224, dtype=bool)
            mask[order[:count]] = True
            return torch.from_numpy(mask.reshape(224, 224))

        smooth = blurred(images)[0]
        for step in range(5):
            gone = first(224 * 224 * step // 4)
            assert found.curves["deletion"][0, index, step] == pytest.approx(
                said(torch.where(gone, 0, image)), abs=1e-4
            )
            assert found.curves["insertion"][0, index, step] == pytest.approx(
                said(torch.where(gone, image, smooth)), abs=1e-4
            )
        for name in ("deletion", "insertion"):
            curve = found.curves[name][0, index]
            area = np.mean((curve[1:] + curve[:-1]) / 2)
            assert found.metrics[f"{name}_auc"][0, index] == pytest.approx(area, abs=1e-4)
        for share in (10, 40):
            count = 224 * 224 * share // 100
            for name, known in (("morf", ~first(count)), ("lerf", first(224 * 224 - count))):
                filled = torch.from_numpy(solved(image.numpy(), known.numpy()))
                filled = torch.where(known, image, filled + 0.01 * noise)
                assert found.curves[name][0, index, share // 10 - 1] == pytest.approx(
                    said(filled), abs=1e-4
                )
        mask = upsampled(between_0_and_1(small)[None], (224, 224))[0]
        before, after = said(image), said(image * mask)
        get = {name: values[0, index] for name, values in found.metrics.items()}
        assert get["average_drop"] == pytest.approx(max(0, before - after) / before, abs=1e-4)
        assert get["average_gain"] == pytest.approx(max(0, after - before) / (1 - before), abs=1e-4)
        assert get["increase_in_confidence"] == (after > before)
        assert get["complexity"] == pytest.approx(float(mask.mean()), abs=1e-4)

        def anew(changed, method=method):
            maps = explainer(changed[None], torch.tensor([class_id])).heatmaps[method]
            return normal(maps[0, -1], method == "grad_cam")

        pair = small.numpy().ravel(), anew(image * mask).numpy().ravel()
        assert get["coherency"] == pytest.approx((1 + np.corrcoef(*pair)[0, 1]) / 2, abs=1e-4)
        drop, coherent = get["average_drop"], get["coherency"]
        parts = coherent, 1 - get["complexity"], 1 - drop
        assert get["adcc"] == pytest.approx(3 / sum(1 / part for part in parts), abs=1e-4)
        other = normal(heatmaps[method][0, 1], method == "grad_cam").numpy().ravel()
        assert get["random_logit"] == pytest.approx(
            spearmanr(small.numpy().ravel(), other).statistic, abs=1e-4
        )
        generator = torch.Generator().manual_seed(0)
        changes = []
        for _ in range(10):
            jitter = 0.02 * (2 * torch.rand(3, 224, 224, generator=generator) - 1)
            changes.append(float((anew(image + jitter) - small).norm() / small.norm()))
        assert get["sensitivity"] == pytest.approx(max(changes), abs=1e-3)
