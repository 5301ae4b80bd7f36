"""A network for the processes of a pool: put once for all, or built anew where that cannot be."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import ray

from scacam.errors import NetworkError

if TYPE_CHECKING:
    from scacam.networks import Network

__all__ = ["share"]

logger = logging.getLogger("scacam")


def share(network: "Network") -> "Callable[[], Network]":
    """What a process calls to get a network.

    Args:
        network: one that can be pickled, or that `load_network` made: a module that holds a lock or
            a parametrization is built anew from its name and weights in each process.

    Raises:
        NetworkError: in that process, if what is built there has other weights.
    """
    try:
        held = ray.put(network)
        return lambda: ray.get(held)
    except Exception as error:  # whatever a module holds may raise anything
        if network.rebuild is None:
            raise
        reason = str(error.__cause__ or error).partition("\n")[0]
        logger.info("%s is built anew in each process (%s)", network.name, reason)
        return partial(_rebuilt, network.rebuild, network.digest())


def _rebuilt(rebuild: "Callable[[], Network]", digest: str) -> "Network":
    network = rebuild()
    if network.digest() != digest:
        raise NetworkError(
            f"{network.name} cannot be pickled and has other weights each time that it is made; "
            "give them as a checkpoint"
        )
    return network
