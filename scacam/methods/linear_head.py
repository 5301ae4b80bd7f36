"""Maps for which others run the head again and again, in closed form behind a linear head.

Where a head is pooling and one linear layer, what it would say without a channel, or of one cell
alone, is known from its weights. These functions take features `[B, C, h, w]` and a `LinearHead`,
and give raw maps `[B, K, h, w]` like those in `maps`. Of a head that does more, `recipro_cam` takes
a `GeneralHead`, which runs for every cell.

References:
    Byun and Lee 2024, ReciproCAM.
    Desai and Ramaswamy 2020, Ablation-CAM.
    Zhang et al. 2025, Finer-CAM.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scacam.methods.gradients import Gradients, averaged, weigh

__all__ = ["GeneralHead", "LinearHead", "ablation_cam", "finer_cam", "recipro_cam"]

_REFERENCES, _STRENGTH = 3, 0.6
"""Of Finer-CAM: how many classes are told apart from, and how much of their maps is taken off."""


class LinearHead(NamedTuple):
    """A head that is linear on pooled features, and what it said of a batch.

    Attributes:
        kind: `pooled` (pooling, then linear), `rectified` (a ReLU before the pooling) or `scores`
            (a linear layer at each position, ReLU, then pooling).
        weights: `[classes, C]`.
        biases: `[classes]`.
        logits: `[B, classes]`.
        class_ids: of the explained classes, `[B, K]`.
        gradients: of the logits of any classes `[B, R]` with respect to the features.
        is_softmax: whether probabilities are the softmax of the logits, not the sigmoid of each.
        scores: where the kind is `scores`, those of each class before the ReLU,
            `[B, classes, h, w]`; else None.
    """

    kind: Literal["pooled", "rectified", "scores"]
    weights: Tensor
    biases: Tensor
    logits: Tensor
    class_ids: Tensor
    gradients: Callable[[Tensor], Gradients]
    is_softmax: bool
    scores: Tensor | None


class GeneralHead(NamedTuple):
    """A head of any other kind, which can be run for each cell of a batch.

    Attributes:
        of_cells: gives the logits of each cell alone, `[B, h · w, classes]`.
        class_ids: of the explained classes, `[B, K]`.
        is_softmax: as of a `LinearHead`.
    """

    of_cells: Callable[[], Tensor]
    class_ids: Tensor
    is_softmax: bool


def recipro_cam(features: Tensor, head: LinearHead | GeneralHead) -> Tensor:
    """The probability of the class if the head saw one cell alone (Byun and Lee 2024).

    All cells and classes are one product: `softmax(W A(i, j) / Z + b)` behind pooling. The map is
    not scaled to between 0 and 1, and a network with independent labels has its sigmoid in place of
    the softmax.
    """
    cells = features.shape[2] * features.shape[3]
    if isinstance(head, GeneralHead):
        logits = head.of_cells()
    elif head.scores is not None:
        # The other cells hold zeros, of which the score is the bias.
        rest = head.biases.relu() * ((cells - 1) / cells)
        logits = head.scores.flatten(2).mT.relu().div_(cells).add_(rest)
    else:
        kept = features.relu() if head.kind == "rectified" else features
        logits = F.linear(kept.flatten(2).mT, head.weights / cells, head.biases)
    each = head.class_ids[:, None].expand(-1, cells, -1)
    if head.is_softmax:
        maps = logits.softmax(2).gather(2, each)
    else:
        maps = logits.gather(2, each).sigmoid()
    return maps.mT.unflatten(2, features.shape[2:])


def ablation_cam(features: Tensor, head: LinearHead) -> Tensor:
    """`Σ_k (y - y without channel k) A_k`, before the ReLU (Desai and Ramaswamy 2020).

    Not divided by the logit y, as in the paper, which changes the sign where that is negative. The
    weights are `w_k mean(A_k)` behind pooling: there they are the channels' Shapley values, and
    those of DeepLIFT, as well.
    """
    weights = head.weights[head.class_ids]
    if head.scores is None:
        kept = features.relu() if head.kind == "rectified" else features
        return weigh(weights * kept.mean((2, 3))[:, None], features)
    chosen = head.class_ids[..., None].expand(-1, -1, features[0, 0].numel())
    scores = head.scores.flatten(2).gather(1, chosen)
    channels = features.flatten(2)
    # relu(s) - relu(s - x) = min(x - min(s, 0), max(s, 0))
    below, above = (-scores).relu(), scores.relu()
    drops, parts = [], torch.empty_like(channels)
    for low, high, weight in zip(below.unbind(1), above.unbind(1), weights.unbind(1), strict=True):
        torch.addcmul(low[:, None], weight[..., None], channels, out=parts)
        drops.append(torch.minimum(parts, high[:, None], out=parts).mean(2))
    return weigh(torch.stack(drops, 1), features)


def finer_cam(features: Tensor, head: LinearHead) -> Tensor:
    """`m_c - 0.6 · mean(m_r)`, before the ReLU, of Grad-CAM's maps m (Zhang et al. 2025).

    The references r are the three classes with the logits closest to that of c, or as many as there
    are. It shows what speaks for the class and not for those that it is likely taken for.
    """
    explained = head.logits.gather(1, head.class_ids)
    distances = (head.logits[:, None] - explained[..., None]).abs()
    distances.scatter_(2, head.class_ids[..., None], torch.inf)
    count = min(_REFERENCES, head.logits.shape[1] - 1)
    references = distances.topk(count, dim=2, largest=False).indices
    classes = torch.cat([head.class_ids, references.flatten(1)], 1)
    averages = averaged(head.gradients(classes))
    own, theirs = averages.split([explained.shape[1], references[0].numel()], 1)
    return weigh(own - _STRENGTH * theirs.unflatten(1, (-1, count)).mean(2), features)
