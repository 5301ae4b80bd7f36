"""How faithful maps are to a network: all trials of a batch of images, and the metrics of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scacam.errors import ScacamError
from scacam.explainer import Explainer
from scacam.methods import METHODS
from scacam.networks import Network
from scacam.trials.case import Case, Tried, claim, normal
from scacam.trials.metrics import BASELINES, CURVES, chosen, measured
from scacam.trials.trials import TRIALS

__all__ = ["STEPS", "Faithfulness", "Trials", "faithfulness"]

STEPS = 20
_BATCH = 16


@dataclass(frozen=True)
class Faithfulness:
    """What B images say of the maps of M claimants: methods, and behind them the baselines.

    Attributes:
        claimants: their names.
        class_ids: int64 `[B]`, the top classes, which the maps are of.
        probability: float64 `[B]`, of these.
        metrics: by name, float64 `[B, M]`; which way is better, `trials.metrics.METRICS` says.
        curves: by name, float32 `[B, M, steps]`, as far as metrics needed them: the probability
            over the share of pixels, see `trials.metrics.CURVES`.
    """

    claimants: tuple[str, ...]
    class_ids: np.ndarray
    probability: np.ndarray
    metrics: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]

    def of(self, images: np.ndarray) -> "Faithfulness":
        """The same of some images alone: bool `[B]`."""
        return Faithfulness(
            self.claimants,
            self.class_ids[images],
            self.probability[images],
            {name: values[images] for name, values in self.metrics.items()},
            {name: values[images] for name, values in self.curves.items()},
        )

    @classmethod
    def joined(cls, parts: "Sequence[Faithfulness]") -> "Faithfulness":
        """That of the images of all parts, which say the same of each."""
        first = parts[0]
        return cls(
            first.claimants,
            np.concatenate([part.class_ids for part in parts]),
            np.concatenate([part.probability for part in parts]),
            {
                name: np.concatenate([part.metrics[name] for part in parts])
                for name in first.metrics
            },
            {name: np.concatenate([part.curves[name] for part in parts]) for name in first.curves},
        )

    def mean(self) -> dict[str, dict[str, float]]:
        """The means over the images, by metric and claimant."""
        return {
            name: dict(zip(self.claimants, values.mean(0).tolist(), strict=True))
            for name, values in self.metrics.items()
        }


class Trials:
    """Tries maps of a network, batch by batch."""

    def __init__(
        self,
        network: Network,
        claimants: Sequence[Tried],
        metrics: Sequence[str] | None = None,
        steps: int = STEPS,
        batch_size: int = _BATCH,
    ) -> None:
        """Choose what is tried and measured.

        Args:
            network: the network, in eval mode, where its images will be.
            claimants: the methods; the baselines come by themselves.
            metrics: names from `METRICS`; left out, all.
            steps: of the curves of deletion and insertion.
            batch_size: images per forward pass.

        Raises:
            ScacamError: a metric is not known.
        """
        self.network = network
        self.claimants = [*claimants, *map(Tried, BASELINES)]
        self.metrics = chosen(metrics)
        self.steps = steps
        self.batch_size = batch_size
        methods = [one.method for one in claimants if one.method is not None]
        self.explainer = Explainer(network, list(dict.fromkeys(methods)), top_k=0)

    def of_arrays(
        self,
        images: Tensor,
        heatmaps: Mapping[str, np.ndarray],
        seeds: Sequence[int],
        class_ids: np.ndarray,
    ) -> Faithfulness:
        """The same as a call, of maps as a run stores them."""
        tensors = {name: torch.from_numpy(each) for name, each in heatmaps.items()}
        return self(images, tensors, seeds, torch.from_numpy(class_ids))

    def __call__(
        self,
        images: Tensor,
        heatmaps: Mapping[str, Tensor],
        seeds: Sequence[int],
        class_ids: Tensor | None = None,
    ) -> Faithfulness:
        """Try the maps of a batch.

        Args:
            images: `[B, C, H, W]`, preprocessed as the network wants.
            heatmaps: of each claimant but the baselines, `[B, K, h, w]`, raw: of the top class, and
                of those that follow.
            seeds: a number for each image, the same in every pass, which makes its random map.
            class_ids: the top classes, int64 `[B]`; left out, as the network says now.
        """
        with torch.no_grad():
            case = self._case(images, heatmaps, seeds, class_ids)
            scores = {"probability": case.probability.double().cpu().numpy()[:, None]}
            for trial in dict.fromkeys(metric.needs for metric in self.metrics):
                scores |= TRIALS[trial](case)
        return Faithfulness(
            tuple(claimant.name for claimant in self.claimants),
            case.class_ids.cpu().numpy(),
            scores["probability"][:, 0],
            measured(self.metrics, scores),
            {name: scores[name] for name in CURVES if name in scores},
        )

    def _case(
        self,
        images: Tensor,
        heatmaps: Mapping[str, Tensor],
        seeds: Sequence[int],
        class_ids: Tensor | None,
    ) -> Case:
        said = self._probabilities(images)
        top = said.argmax(1) if class_ids is None else class_ids.to(said.device)
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        maps = []
        for claimant in self.claimants:
            if claimant.name in BASELINES:
                own = claim(claimant.name, wide, seeds, self.network)[:, None]
            else:
                own = heatmaps[claimant.name].to(images.device)
            maps.append(normal(own, claimant.relu))
        return Case(
            network=self.network,
            explainer=self.explainer,
            claimants=self.claimants,
            images=wide,
            dtype=images.dtype,
            class_ids=top,
            probability=said.gather(1, top[:, None])[:, 0],
            maps=[each[:, 0] for each in maps],
            others=[each[:, 1:] for each in maps[: -len(BASELINES)]],
            seeds=seeds,
            steps=self.steps,
            batch_size=self.batch_size,
        )

    def _probabilities(self, images: Tensor) -> Tensor:
        parts = [self.network.logits(some) for some in images.split(self.batch_size)]
        return self.network.probabilities(torch.cat(parts))


def faithfulness(
    network: Network,
    images: Tensor,
    heatmaps: Mapping[str, Tensor],
    metrics: Sequence[str] | None = None,
    steps: int = STEPS,
) -> Faithfulness:
    """How faithful maps are to what a network does, and whether they pass the sanity checks.

    >>> explanation = scacam.Explainer(network)(images)
    >>> found = scacam.faithfulness(network, images, explanation.heatmaps, ["deletion_auc", "road"])
    >>> found.mean()["deletion_auc"]["grad_cam"]

    Args:
        network: the network, which is run again on changed images and with other weights.
        images: float `[B, C, H, W]`, preprocessed as the network wants.
        heatmaps: by method, raw: `[B, K, h, w]`, of the top class and those that follow, as an
            explanation has them, or `[B, h, w]` of the top class alone.
        metrics: names from `scacam.trials.metrics.METRICS`; left out, all that can be had: with
            maps of the top class alone no random logit.
        steps: of the curves of deletion and insertion.

    Raises:
        ScacamError: there are no images or maps, there is not a map for each image, the maps are of
            an unknown method, a metric is not known, or the random logit is wanted of maps of one
            class.
    """
    if not len(images) or not heatmaps:
        raise ScacamError("faithfulness needs images and the maps of at least one method")
    full = {name: maps if maps.ndim == 4 else maps[:, None] for name, maps in heatmaps.items()}
    for name, maps in full.items():
        if name not in METHODS:
            raise ScacamError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
        if len(maps) != len(images):
            raise ScacamError(f"{len(images)} images and {len(maps)} maps of {name}")
    wanted = list(metrics) if metrics is not None else None
    if any(maps.shape[1] < 2 for maps in full.values()):
        if any(metric.needs == "random_logit" for metric in chosen(metrics or [])):
            raise ScacamError("random_logit needs the maps of more classes than the top one")
        wanted = wanted or [one.name for one in chosen(None) if one.needs != "random_logit"]
    trials = Trials(network, [Tried(name, name) for name in full], wanted, steps)
    parts = []
    for start in range(0, len(images), _BATCH):
        some = slice(start, start + _BATCH)
        shown = {name: of_method[some] for name, of_method in full.items()}
        parts.append(trials(images[some], shown, range(len(images))[some]))
    return Faithfulness.joined(parts)
