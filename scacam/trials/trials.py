"""What is done to images and networks to try maps, one function each.

A trial takes a case and finds scores of its B images and M claimants by name, `[B, M, …]`, from
which `metrics.METRICS` come. What several claimants would ask alike is asked once.

To add a trial: write its function here and give it a row in `TRIALS`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scacam.trials.case import Case, between_0_and_1
from scacam.trials.imputation import impute
from scacam.trials.likeness import correlation, rank_correlation, ssim
from scacam.trials.perturbation import blurred, perturbed, same
from scacam.trials.weights import drawn_anew, redrawn

__all__ = ["TRIALS"]

Scores = dict[str, np.ndarray]

_SHARES = range(10, 100, 10)
"""Percent of the pixels that ROAD takes out."""

_NOISE = 0.01
"""On imputed pixels, in units of the normalised image (Rong et al. 2022)."""

_UNSOLVED = _NOISE / 50
"""By how much the last round of its solution may change an imputed image. Probabilities are then
4e-5 from those at the solution (root mean square, EfficientNet-Lite0); another draw of the noise
changes them by 0.017."""

_DRAWS, _RADIUS = 10, 0.02
"""Of sensitivity: draws, and by how much a value of the normalised image changes at most."""


def deletion(case: Case) -> Scores:
    """The most relevant pixels become the mean colour, which is 0 after normalisation."""
    mean = torch.zeros_like(case.images[:1])
    last = case.network.probabilities(case.network.logits(mean.to(case.dtype)))[0, case.class_ids]
    curves = _asked_in_steps(case, mean[:, :, :1, :1], case.images)
    return _curve("deletion", case, case.probability, curves, last)


def insertion(case: Case) -> Scores:
    """The most relevant pixels come into the blurred image."""
    background = blurred(case.images)
    first = case.ask(background, torch.arange(len(background), device=background.device))
    curves = _asked_in_steps(case, case.images, background)
    return _curve("insertion", case, first, curves, case.probability)


def masked(case: Case) -> Scores:
    """The image times the map between 0 and 1; what the network says of that, and the map of it."""
    masks = case.masks
    pairs = same(masks.flatten(2))
    probabilities, maps = [], []
    for start in range(0, len(pairs.images), case.batch_size):
        chosen = slice(start, start + case.batch_size)
        of_images = pairs.images[chosen]
        shown = masks[of_images, pairs.claimants[chosen]][:, None] * case.images[of_images]
        said, explained = case.explain(shown, of_images)
        probabilities.append(said)
        maps.append(explained)
    of_methods = [torch.cat(of_method) for of_method in zip(*maps, strict=True)]
    alike = []
    for index, own in enumerate(case.maps):
        if index < len(of_methods):
            found = of_methods[index][pairs.places[:, index]]
        else:
            found = case.claimed(index, masks[:, index, None] * case.images)
        alike.append(correlation(_numpy(own), _numpy(found)))
    return {
        "masked": _numpy(torch.cat(probabilities)[pairs.places]),
        "complexity": _numpy(masks.mean((2, 3))),
        "correlation": np.stack(alike, axis=1),
    }


def road(case: Case) -> Scores:
    """Pixels become what surrounds them, with noise: the most and the least relevant first."""
    pairs, places = case.ranking
    generator = torch.Generator().manual_seed(0)
    noise = _NOISE * torch.randn(case.images.shape[1:], generator=generator).to(case.images)
    removed = torch.tensor([case.pixels * share // 100 for share in _SHARES], device=noise.device)
    count, said = len(places), []
    for first in (True, False):
        # A share after the other: the more is removed, the longer it takes to solve.
        for start in range(0, len(removed) * count, case.batch_size):
            end = min(start + case.batch_size, len(removed) * count)
            number = torch.arange(start, end, device=noise.device)
            order, gone = number % count, removed[number // count, None]
            ranks, of_images = places[order], pairs.images[order]
            known = ranks >= gone if first else ranks < case.pixels - gone
            known = known.unflatten(1, case.size)
            images = impute(case.images[of_images], known, _UNSOLVED)
            said.append(case.ask(images.addcmul_((~known)[:, None].to(noise), noise), of_images))
    both = torch.cat(said).reshape(2, len(removed), count).mT[:, pairs.places]
    return {"morf": _numpy(both[0]), "lerf": _numpy(both[1])}


def random_logit(case: Case) -> Scores:
    """The maps beside those of the classes that follow: the mean over these."""
    pairs = zip(case.maps, case.others, strict=False)
    own = [maps[:, None].expand_as(others).flatten(0, 1) for maps, others in pairs]
    found = _likeness("random_logit", case, own, [maps.flatten(0, 1) for maps in case.others])
    images = len(case.images)
    return {name: each.reshape(images, -1, each.shape[1]).mean(1) for name, each in found.items()}


def random_head(case: Case) -> Scores:
    """The maps beside those that there are when the classifier's weights are drawn anew."""
    return _drawn("random_head", case, only_head=True)


def random_network(case: Case) -> Scores:
    """The maps beside those that there are when all weights of the network are drawn anew."""
    return _drawn("random_network", case, only_head=False)


def sensitivity(case: Case) -> Scores:
    """The largest change of a map in ten draws of noise, relative to its length."""
    generator = torch.Generator().manual_seed(0)
    lengths = [_length(own) for own in case.maps]
    largest = torch.zeros(len(case.images), len(case.maps), device=case.images.device)
    for _ in range(_DRAWS):
        noise = 2 * torch.rand(case.images.shape[1:], generator=generator) - 1
        images = case.images + _RADIUS * noise.to(case.images)
        found = _explained(case, images)
        found += [case.claimed(index, images) for index in range(len(found), len(case.maps))]
        for index, (own, other) in enumerate(zip(case.maps, found, strict=True)):
            if other is own:
                continue
            change, length = _length(other - own), lengths[index]
            share = torch.where(length > 0, change / length, (change > 0).to(change))
            largest[:, index] = torch.maximum(largest[:, index], share)
    return {"sensitivity": _numpy(largest)}


TRIALS: dict[str, Callable[[Case], Scores]] = {
    trial.__name__: trial
    for trial in (
        *(deletion, insertion, masked, road),
        *(random_logit, random_head, random_network, sensitivity),
    )
}
"""All trials by name, as the metrics need them."""


def _asked_in_steps(case: Case, front: Tensor, back: Tensor) -> Tensor:
    """The probabilities at all steps but the first and the last: `[B, M, steps - 1]`."""
    pairs, places = case.ranking
    counts = [case.pixels * step // case.steps for step in range(1, case.steps)]
    batches = perturbed(front, back, pairs.images, places, counts, case.batch_size)
    said = [case.ask(images, of_images) for images, of_images in batches]
    flat = torch.cat(said) if said else case.probability[:0]
    return flat.reshape(len(places), len(counts))[pairs.places]


def _curve(name: str, case: Case, first: Tensor, inner: Tensor, last: Tensor) -> Scores:
    """A curve, whose ends are the same for all claimants, and the shares of pixels at its steps."""
    ends = [end[:, None, None].expand(-1, len(case.maps), 1) for end in (first, last)]
    counts = [case.pixels * step // case.steps for step in range(case.steps + 1)]
    curves = _numpy(torch.cat([ends[0], inner, ends[1]], dim=2))
    return {name: curves, "share": np.array(counts) / case.pixels}


def _explained(case: Case, images: Tensor) -> list[Tensor]:
    """Of each method the maps of the images of a case, or of what was made of each."""
    everyone = torch.arange(len(images), device=images.device)
    parts = [case.explain(images[some], some)[1] for some in everyone.split(case.batch_size)]
    return [torch.cat(of_method) for of_method in zip(*parts, strict=True)]


def _drawn(name: str, case: Case, only_head: bool) -> Scores:
    with drawn_anew(case.network, redrawn(case.network, only_head)):
        found = _explained(case, case.images)
    return _likeness(name, case, case.maps[: len(found)], found)


def _likeness(name: str, case: Case, own: Sequence[Tensor], others: Sequence[Tensor]) -> Scores:
    """How alike maps of each method are to others of it, `[N, h, w]`, those of one size at once.

    Baselines, which look at neither class nor network, have the same maps again: 1.
    """
    ranks, structure = (np.ones((len(own[0]), len(case.maps))) for _ in range(2))
    sizes = [maps.shape[1:] for maps in own]
    for size in set(sizes):
        methods = [index for index, each in enumerate(sizes) if each == size]
        pair = [torch.cat([maps[index] for index in methods]) for maps in (own, others)]
        found = rank_correlation(*map(_numpy, pair))
        ranks[:, methods] = found.reshape(len(methods), -1).T
        found = ssim(*(_numpy(between_0_and_1(maps)) for maps in pair))
        structure[:, methods] = found.reshape(len(methods), -1).T
    return {name: ranks, f"{name}_ssim": structure}


def _length(maps: Tensor) -> Tensor:
    return torch.linalg.vector_norm(maps.flatten(1), dim=1)


def _numpy(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
