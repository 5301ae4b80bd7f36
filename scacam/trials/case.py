"""A batch of images and what claimants say of them: what every trial begins with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from scacam.evaluation.measures import baseline_map
from scacam.explainer import Explainer
from scacam.methods import METHODS
from scacam.networks import Network
from scacam.trials.metrics import BASELINES
from scacam.trials.perturbation import Pairs, edge_strength, ranks, same, upsampled

__all__ = ["Case", "Tried", "between_0_and_1", "normal"]

_CLAIMS: dict[str, Callable[[Tensor, Sequence[int], tuple[int, int]], Tensor]] = {
    "random_map": lambda images, seeds, cells: torch.stack(
        [torch.rand(cells, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ),
    "center_gaussian": lambda images, seeds, cells: torch.from_numpy(
        baseline_map("center_gaussian")
    ).expand(len(images), -1, -1),
    "edge_strength": lambda images, seeds, cells: edge_strength(images),
    "constant_map": lambda images, seeds, cells: torch.ones(len(images), 1, 1),
}
"""What each baseline says of images, given a number for each and the size of a method's maps."""

_LOOKING = ("edge_strength",)
"""The baselines that look at the images."""


class Tried(NamedTuple):
    """Who says where a network looks: a method, at a layer, or a baseline.

    Attributes:
        name: as tables have it.
        method: of `METHODS`; None for a baseline, and for maps of unknown origin.
        layer: the layer whose features it weighs; None for where the method's maps are by default.
    """

    name: str
    method: str | None = None
    layer: str | None = None

    @property
    def relu(self) -> bool:
        """Whether its maps get a ReLU first."""
        return self.method is not None and METHODS[self.method].relu


@dataclass(frozen=True)
class Case:
    """B images and what M claimants say of the class that the network finds most probable.

    Attributes:
        network: the network.
        explainer: makes the maps of the methods among the claimants anew, if that is wanted.
        claimants: M of them, at first the methods, then the baselines.
        images: `[B, C, H, W]` as the network wants them, in single precision at least.
        dtype: the precision in which it wants them.
        class_ids: int64 `[B]`, the top classes.
        probability: `[B]`, of these.
        maps: of each claimant `[B, h, w]`, in their normal form.
        others: of each method the same of the classes that follow: `[B, K - 1, h, w]`.
        seeds: a number for each image, which makes the random map.
        steps: of the curves of deletion and insertion.
        batch_size: images per forward pass.
    """

    network: Network
    explainer: Explainer | None
    claimants: Sequence[Tried]
    images: Tensor
    dtype: torch.dtype
    class_ids: Tensor
    probability: Tensor
    maps: Sequence[Tensor]
    others: Sequence[Tensor]
    seeds: Sequence[int]
    steps: int
    batch_size: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def pixels(self) -> int:
        """How many an image has."""
        return self.size[0] * self.size[1]

    @cached_property
    def masks(self) -> Tensor:
        """The maps between 0 and 1, at the size of the images: `[B, M, H, W]`."""
        return torch.stack([upsampled(between_0_and_1(each), self.size) for each in self.maps], 1)

    @cached_property
    def ranking(self) -> tuple[Pairs, Tensor]:
        """Which claimants rank the pixels of which images alike, and the rankings `[P, H·W]`."""
        by_claimant = [ranks(upsampled(each, self.size)) for each in self.maps]
        by_image = torch.stack(by_claimant, dim=1)
        pairs = same(by_image)
        return pairs, by_image[pairs.images, pairs.claimants]

    def ask(self, images: Tensor, of_images: Tensor) -> Tensor:
        """The probabilities `[N]` of the classes of those images which these were made of."""
        logits = self.network.logits(self._laid_out(images))
        probabilities = self.network.probabilities(logits)
        return probabilities.gather(1, self.class_ids[of_images, None])[:, 0]

    def _laid_out(self, images: Tensor) -> Tensor:
        """In memory like the images of the case, for networks differ in speed by that: a quarter
        for EfficientNet-Lite0 on a processor.
        """
        last = torch.channels_last
        like = last if self.images.is_contiguous(memory_format=last) else torch.contiguous_format
        return images.to(self.dtype, memory_format=like)

    def explain(self, images: Tensor, of_images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Those probabilities, and of each method the maps `[N, h, w]` of the same classes."""
        assert self.explainer is not None
        wanted = self.class_ids[of_images]
        found = self.explainer(self._laid_out(images), wanted)
        probabilities = self.network.probabilities(found.logits).gather(1, wanted[:, None])[:, 0]
        maps = []
        for claimant in self.claimants[: len(self.others)]:
            assert claimant.method is not None
            of_layer = found.layers[claimant.layer] if claimant.layer else found.heatmaps
            maps.append(normal(of_layer[claimant.method][:, 0], claimant.relu))
        return probabilities, maps

    def claimed(self, index: int, images: Tensor) -> Tensor:
        """What a baseline says of images of which one was made of each: `[B, h, w]`."""
        claimant = self.claimants[index]
        if claimant.name not in _LOOKING:
            return self.maps[index]
        return normal(claim(claimant.name, images, self.seeds, self.network), claimant.relu)


def claim(baseline: str, images: Tensor, seeds: Sequence[int], network: Network) -> Tensor:
    """What a baseline says of images: `[B, h, w]`. The random map has the network's resolution."""
    assert baseline in BASELINES
    return _CLAIMS[baseline](images, seeds, network.feature_shape[1:]).to(images)


def normal(maps: Tensor, relu: bool) -> Tensor:
    """Maps `[..., h, w]` as they are stored, in half precision as shares of the largest magnitude.

    And then with the ReLU of their method, if it has one. So maps that are one up to a factor are
    the same, and what is read from a run is what was found at once.
    """
    maps = maps.float()
    largest = maps.abs().amax((-2, -1), keepdim=True)
    shares = torch.where(largest > 0, maps / largest, 0).half().float()
    return shares.relu() if relu else shares


def between_0_and_1(maps: Tensor) -> Tensor:
    """The positive part of maps `[..., h, w]` divided by its maximum; zeros where there is none."""
    positive = maps.relu()
    largest = positive.amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, positive / largest, 0)
