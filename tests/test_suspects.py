"""Who is right for the wrong reason: components, what is learnt of classes, and what stands out."""

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from scacam.audit.attention import fixed_place
from scacam.audit.classes import SAMPLE, Answers, Gathered
from scacam.audit.components import (
    Components,
    Contributions,
    find_component,
    find_shortcut,
    where,
)
from scacam.audit.kinds import KINDS, Tally, scored, strengths
from scacam.audit.likeness import find_parts
from scacam.methods.channels import top_channels
from scacam.methods.gradients import MaskedGradients

SHAPE = (4, 5)


def kept(values: np.ndarray, cells: np.ndarray, count: int) -> Contributions:
    """Of contributions `[N, C]` and peak cells the largest, as a run keeps them."""
    channels = np.argsort(-values, axis=1)[:, :count]
    return Contributions(
        channels, np.take_along_axis(values, channels, 1), np.take_along_axis(cells, channels, 1)
    )


def answers(rng: np.random.Generator, images: int, classes: int, **known: np.ndarray) -> Answers:
    """Answers without anything wrong."""
    shares = rng.random((images, *SHAPE))
    values = rng.random((images, 30))
    return Answers(
        np.arange(images),
        rng.integers(0, classes, images),
        rng.uniform(0.3, 1, images),
        rng.integers(0, classes, images).astype(np.float64),
        shares / shares.sum((1, 2), keepdims=True),
        None,
        np.full(images, np.nan),
        kept(values, rng.integers(0, 20, (images, 30)), 12),
    )._replace(**known)


@pytest.mark.parametrize("images", [7, 60])
def test_the_component_is_the_first_right_singular_vector(images):
    rng = np.random.default_rng(images)
    values = rng.normal(1, 0.1, (images, 20)) + np.outer(rng.random(images), rng.random(20))
    found = find_component(kept(values, np.zeros((images, 20), int), 20))
    expected = np.linalg.svd(values - values.mean(0))[2][0]
    expected *= np.sign(expected.sum())
    np.testing.assert_array_equal(found.channels, np.arange(20))
    np.testing.assert_allclose(found.direction, expected, atol=1e-8)
    assert found.level == pytest.approx(np.quantile(values @ expected, 0.1))


def test_what_is_not_kept_counts_as_nothing():
    contributions = Contributions(
        np.array([[9, 2], [4, 2]]), np.array([[3.0, 1.0], [2.0, 1.0]]), np.zeros((2, 2), int)
    )
    found = find_component(contributions)
    np.testing.assert_array_equal(found.channels, [2, 4, 9])
    np.testing.assert_allclose(found.direction, np.array([0, -2, 3]) / 13**0.5)
    # A channel that the class never had takes no part.
    other = Contributions(np.array([[1, 99]]), np.array([[5.0, 7.0]]), np.zeros((1, 2), int))
    assert found.places(other, 3).tolist() == [[0, 0, 0]]


def test_the_fall_is_that_of_the_softmax_without_the_component():
    """One channel that some images have: taken back to what the others have, by the definition."""
    others = np.log([2.0, 3.0])  # of two more classes
    values = np.array([[1.0, 0.2]] * 3 + [[1.0, 2.2]] * 6)
    logits = values.sum(1)
    p = np.exp(logits) / (np.exp(logits) + np.exp(others).sum())
    contributions = kept(values, np.zeros((9, 2), int), 2)
    component = find_component(contributions)
    without = np.exp(1.2) / (np.exp(1.2) + np.exp(others).sum())
    np.testing.assert_allclose(component.falls(contributions, p), p - without, atol=1e-9)


def test_all_classes_at_once_fall_as_each_by_itself():
    rng = np.random.default_rng(0)
    some = answers(rng, 90, 4)
    found = {
        class_id: find_component(some.contributions.of(some.class_ids == class_id))
        for class_id in (0, 3, 2)
    }
    every = Components.of(found, 4)
    falls = every.falls(some.class_ids, some.contributions, some.probabilities)
    for class_id, own in found.items():
        rows = some.class_ids == class_id
        alone = own.falls(some.contributions.of(rows), some.probabilities[rows])
        np.testing.assert_allclose(falls[rows], alone)
    assert np.isnan(falls[some.class_ids == 1]).all()
    none = Components.of({}, 4).falls(some.class_ids, some.contributions, some.probabilities)
    assert np.isnan(none).all()


def test_alike_images_owe_nothing():
    contributions = kept(np.ones((6, 3)), np.zeros((6, 3), int), 3)
    shortcut = find_shortcut(contributions, np.full(6, 0.9), SHAPE)
    assert shortcut.component.direction.tolist() == [0, 0, 0]
    falls = shortcut.component.falls(contributions, np.full(6, 0.9))
    np.testing.assert_allclose(falls, 0, atol=1e-12)
    assert shortcut.place == 0.5


def test_falls_of_sure_answers_are_finite():
    contributions = kept(np.array([[1.0, 0.0]] * 3 + [[1.0, 900.0]] * 3), np.zeros((6, 2), int), 2)
    falls = find_component(contributions).falls(contributions, np.array([1.0, 0, 0.5] * 2))
    assert np.isfinite(falls).all()


def test_the_place_is_where_the_component_lies():
    values = np.array([[1.0, 0.1]] * 4 + [[1.0, 3.0]] * 4)
    cells = np.tile([7, 4], (8, 1))  # the second channel in the corner of a map of 4 × 5
    contributions, p = kept(values, cells, 2), np.full(8, 0.9)
    shortcut = find_shortcut(contributions, p, SHAPE)
    assert shortcut.located[0, 4] == pytest.approx(1)
    corner = np.zeros((1, *SHAPE))
    corner[0, 0, 4] = 1
    assert shortcut.place == pytest.approx(where(corner, None)[0])
    assert shortcut.place > 0.5
    coverage = np.zeros((8, *SHAPE))
    coverage[:, :2, 3:] = 1
    assert find_shortcut(contributions, p, SHAPE, coverage).place == 0
    assert find_shortcut(contributions, p, SHAPE, 1 - coverage).place == 1
    coverage[:] = np.nan
    assert find_shortcut(contributions, p, SHAPE, coverage).place == 0.5


def test_what_is_learnt_does_not_depend_on_the_parts():
    rng = np.random.default_rng(0)
    everything = answers(rng, 3000, 3)
    whole = Gathered.update(everything, 3)
    order = rng.permutation(3000)
    pieces = [Gathered.update(everything.of(part), 3) for part in np.array_split(order, 7)]
    merged = Gathered.merge(pieces)
    for one, other in ((whole.mapped, merged.mapped), (whole.squares, merged.squares)):
        np.testing.assert_allclose(one, other)
    np.testing.assert_allclose(whole.totals, merged.totals)
    assert sorted(whole.sample.image_ids) == sorted(merged.sample.image_ids)
    assert np.bincount(whole.sample.class_ids).tolist() == [SAMPLE] * 3
    first, second = whole.learn(), merged.learn()
    np.testing.assert_allclose(first.falls(everything), second.falls(everything), atol=1e-9)


def test_few_images_say_nothing():
    rng = np.random.default_rng(0)
    few = answers(rng, 9, 3, class_ids=np.repeat([0, 2], [5, 4]), probabilities=np.full(9, 0.9))
    learnt = Gathered.update(few, 3).learn()
    assert set(learnt.shortcuts) == set(learnt.parts) == {0}
    assert np.isfinite(learnt.falls(few)).tolist() == [True] * 5 + [False] * 4


def test_a_run_without_channels_has_the_other_kinds():
    rng = np.random.default_rng(0)
    old = answers(rng, 200, 4, contributions=None)
    found = scored(old, Gathered.update(old, 4).learn())
    known = {name for name, kind in found.items() if np.isfinite(kind.scores).any()}
    assert known == set(KINDS) - {"component", "off_object", "disagreement"}


def test_the_mean_of_the_scores_of_a_fixed_place_is_its_measure():
    rng = np.random.default_rng(0)
    some = answers(rng, 300, 4)
    learnt = Gathered.update(some, 4).learn()
    found = scored(some, learnt)["fixed_place"].scores
    for class_id in range(4):
        own = some.shares[some.class_ids == class_id]
        expected = fixed_place(own.sum(0), float((own**2).sum()), len(own), learnt.usual)
        assert found[some.class_ids == class_id].mean() == pytest.approx(0.5 + expected / 2)


def test_two_sorts_of_maps_are_told_apart():
    maps = np.zeros((10, *SHAPE))
    maps[:3, 0, 0] = maps[3:, 2, 2] = 1
    parts = find_parts(maps)
    assert parts is not None
    scores = parts.scores(maps)
    assert (scores[:3] > 0).all()
    assert (scores[3:] == 0).all()
    # Two points at a distance d: the mean is 0.7 d away from the three, and the spread 0.21 d².
    np.testing.assert_allclose(scores[:3], 0.49 / 0.21)
    assert find_parts(np.ones((5, *SHAPE))) is None


def test_nobody_is_accused_where_nothing_is_wrong():
    """Classes whose means differ by chance and by nature, in networks of all sizes."""
    rng = np.random.default_rng(0)
    accused = 0
    for network in range(400):
        classes = (3, 6, 30, 200)[network % 4]
        means = np.exp(rng.normal(0, rng.uniform(0.1, 1), classes))
        accused += strengths(means, 0.01 * means).stands_out.any()
    assert accused <= 4


def test_a_class_far_from_the_others_stands_out():
    rng = np.random.default_rng(0)
    means = np.exp(rng.normal(0, 0.3, 40))
    means[7] = 8
    found = strengths(means, 0.1 * means)
    assert np.flatnonzero(found.stands_out).tolist() == [7]
    assert found.strength[7] == pytest.approx(8 / np.median(means))
    assert found.low[7] < found.strength[7] < found.high[7]
    # Not if its images scatter so much that it may be like the others.
    assert not strengths(means, np.where(np.arange(40) == 7, 4, 0.1)).stands_out.any()


def test_where_nothing_is_known_nothing_stands_out():
    for means in (np.zeros(9), np.full(9, np.nan), np.array([]), np.array([0.5]), np.eye(2)[0]):
        assert not strengths(means, np.zeros(len(means))).stands_out.any()


def test_tallies_of_parts_add():
    rng = np.random.default_rng(0)
    some = answers(rng, 500, 5)
    learnt = Gathered.update(some, 5).learn()
    whole = Tally.update(some.class_ids, scored(some, learnt), 5)
    parts = [some.of(rows) for rows in np.array_split(rng.permutation(500), 4)]
    merged = Tally.merge(Tally.update(p.class_ids, scored(p, learnt), 5) for p in parts)
    for kind in KINDS:
        for one, other in zip(whole.strengths(kind), merged.strengths(kind), strict=True):
            np.testing.assert_allclose(one, other)


def test_a_planted_shortcut_is_found():
    """Forty classes; in one of them half of the images hang on channels that lie in a corner."""
    rng = np.random.default_rng(0)
    count, classes = 4000, 40
    class_ids = np.arange(count) % classes
    values = rng.gamma(2, 0.15, (count, 30))
    cells = rng.choice([6, 7, 8, 11, 12, 13], (count, 30))
    planted = (class_ids == 7) & (rng.random(count) < 0.5)
    values[planted, 3:6] += 0.8
    cells[planted, 3:6] = 4
    some = answers(
        rng,
        count,
        classes,
        class_ids=class_ids,
        labels=class_ids.astype(np.float64),
        probabilities=expit(values.sum(1) - 8.5),
        contributions=kept(values, cells, 12),
    )
    learnt = Gathered.update(some, classes).learn()
    found = scored(some, learnt)
    tally = Tally.update(class_ids, found, classes)
    judged = tally.strengths("component")
    assert np.flatnonzero(judged.stands_out).tolist() == [7]
    falls = learnt.falls(some)
    known = np.isfinite(falls)
    order = np.flatnonzero(known)[np.argsort(-found["component"].scores[known])]
    hanging = known & planted
    assert hanging.sum() > 5
    assert hanging[order[: hanging.sum()]].mean() > 0.8
    # They owe about half of what was planted, since the tenth that has least has some of it too.
    expected = some.probabilities - expit(logit(some.probabilities) - 2.4)
    owed = np.median(falls[hanging]) / np.median(expected[hanging])
    assert 0.25 < owed < 1
    assert abs(np.median(falls[known & (class_ids != 7)])) < 0.1


def slowly(features: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """`Σ_ij G_k A_k` from the definition."""
    return (gradients * features[:, None]).sum((3, 4))


@pytest.mark.parametrize("form", ["compact", "masked", "any"])
def test_channels_are_those_that_add_most(form):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, *SHAPE, generator=rng)
    if form == "compact":
        gradients = torch.randn(3, 2, 6, 1, 1, generator=rng)
        dense = gradients.expand(-1, -1, -1, *SHAPE)
    elif form == "masked":
        values = torch.randn(3, 2, 6, 1, 1, generator=rng)
        mask = (features > 0).float()[:, None]
        gradients, dense = MaskedGradients(values, mask), values * mask
    else:
        gradients = dense = torch.randn(3, 2, 6, *SHAPE, generator=rng)
    found = top_channels(features, gradients, 4)
    expected = slowly(features, dense)
    assert found.ids.shape == (3, 2, 4)
    for image in range(3):
        for place in range(2):
            order = expected[image, place].argsort(descending=True)[:4]
            assert found.ids[image, place].tolist() == order.tolist()
            torch.testing.assert_close(
                found.contributions[image, place], expected[image, place, order]
            )
            for channel, cell in zip(order, found.cells[image, place], strict=True):
                assert features[image, channel].flatten()[cell] == features[image, channel].max()
    assert top_channels(features, gradients, 99).ids.shape == (3, 2, 6)
