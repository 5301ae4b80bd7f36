"""Networks in a chain: each image passes through all of them, and its pixels travel along."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray.data

from scacam.images import Preprocessing
from scacam.pipeline.allotments import Allotment
from scacam.pipeline.cluster import share
from scacam.pipeline.stages.rows import sampling_of

if TYPE_CHECKING:
    from scacam.networks import Network
    from scacam.pipeline.stages.holder import Holder

__all__ = ["chained", "links", "pool"]


def links(
    networks: Sequence["Network"], tally: Any
) -> tuple[list[Preprocessing], list[dict[str, Any]]]:
    """What networks share, and what sets them apart.

    Returns:
        Their distinct samplings, and for each network those arguments of its `Holder` that follow
        from its place in the chain.
    """
    samplings = list(dict.fromkeys(sampling_of(network.preprocessing) for network in networks))
    uses = [samplings.index(sampling_of(network.preprocessing)) for network in networks]
    return samplings, [
        {
            "sampling": sampling,
            "last_use": sampling not in uses[index + 1 :],
            "is_last": tally is not None and index == len(networks) - 1,
            "tally": tally,
        }
        for index, sampling in enumerate(uses)
    ]


def chained(
    stream: ray.data.Dataset,
    stage: "type[Holder]",
    networks: Sequence["Network"],
    arguments: Sequence[dict[str, Any]],
    allotments: Sequence[Allotment],
    images: int,
    rows: int,
) -> ray.data.Dataset:
    """Decoded images through a pool of actors for each network.

    Args:
        stream: what they come from.
        stage: what an actor holds its network in.
        networks: in their order.
        arguments: of each network's stage, but for what gets the network.
        allotments: what each network gets.
        images: how many there are.
        rows: of them per block.
    """
    for network, keywords, allotment in zip(networks, arguments, allotments, strict=True):
        stream = stream.map_batches(
            stage,
            fn_constructor_kwargs=keywords | {"load": share(network)},
            **pool(allotment, images, rows),
        )
    return stream


def pool(allotment: Allotment, images: int, rows: int) -> dict[str, Any]:
    """Keywords of `map_batches`: a pool of actors, none of which has nothing to do.

    Args:
        allotment: what the cluster gives it.
        images: how many there are.
        rows: of them per block.
    """
    return {
        "compute": ray.data.ActorPoolStrategy(size=min(allotment.actors, math.ceil(images / rows))),
        "batch_size": rows,
        "batch_format": "pyarrow",
        "num_cpus": allotment.num_cpus,
        "num_gpus": allotment.num_gpus or None,
    }
