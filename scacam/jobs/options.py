"""The networks that a job is asked for: their options on the command line, and loading them."""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Sequence

import torch

from scacam.errors import RunError
from scacam.networks import Network, load_network
from scacam.storage import read_bytes

__all__ = ["add_network_options", "load_networks", "parse_networks", "seconds_per_image"]

logger = logging.getLogger("scacam")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add `--networks`, `--target-layer`, `--categories` and `--output-kind`."""
    parser.add_argument(
        "--networks",
        required=True,
        nargs="+",
        metavar="NAME[=WEIGHTS]",
        help="torchvision's or scacam's name of a network, timm.NAME, or package.module:factory; "
        "WEIGHTS is a published name, a checkpoint or 'random' (default: DEFAULT)",
    )
    parser.add_argument(
        "--target-layer",
        nargs="+",
        default=[],
        metavar="[NAME=]LAYER",
        help="the layer to explain, of every network or of the one named (default: the last with "
        "a spatial output before the classifier)",
    )
    parser.add_argument(
        "--categories",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="the class names, one per line, of every network or of the one named (default: those "
        "published with it)",
    )
    parser.add_argument(
        "--output-kind",
        nargs="+",
        default=[],
        metavar="[NAME=]KIND",
        help="softmax if an image is of one class, sigmoid if each class is a question by itself, "
        "of every network or of the one named (default: what its last step is, else softmax)",
    )


def parse_networks(specifications: Sequence[str]) -> dict[str, str]:
    """Weights by name, of `NAME[=WEIGHTS]`. Raises RunError for a network that is there twice."""
    pairs = [specification.partition("=")[::2] for specification in specifications]
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise RunError(f"network {repeated[0]!r} is there twice; one run holds it once")
    return {name: weights or "DEFAULT" for name, weights in pairs}


def load_networks(options: argparse.Namespace) -> list[Network]:
    """Load what the options of `add_network_options` ask for.

    Raises:
        NetworkError: a network cannot be loaded.
        RunError: the options contradict themselves, or a file of class names cannot be read.
    """
    wanted = parse_networks(options.networks)
    layers = _by_network(options.target_layer, list(wanted), "--target-layer")
    files = _by_network(options.categories, list(wanted), "--categories")
    kinds = _by_network(options.output_kind, list(wanted), "--output-kind")
    networks = []
    for name, weights in wanted.items():
        logger.info("loading %s, weights %s", name, weights)
        categories = _read_categories(files[name]) if name in files else None
        networks.append(
            load_network(
                name,
                weights,
                target_layer=layers.get(name),
                categories=categories,
                output_kind=kinds.get(name),
            )
        )
    return networks


def seconds_per_image(network: Network) -> float:
    """What one image takes a network, in this process and after a first one."""
    preprocessing = network.preprocessing
    shape = (1, *preprocessing.crop_size, preprocessing.channels)
    images = network.normalize(torch.zeros(shape, dtype=torch.uint8))
    with torch.inference_mode():
        network.module(images)
        began = time.perf_counter()
        network.module(images)
        return time.perf_counter() - began


def _by_network(values: Sequence[str], names: Sequence[str], option: str) -> dict[str, str]:
    """A value for each network that has one: its own, `NAME=VALUE`, or the one for all."""
    own, common = {}, []
    for value in values:
        name, separator, rest = value.partition("=")
        if separator and name in names:
            own[name] = rest
        else:
            common.append(value)
    if len(common) > 1:
        raise RunError(
            f"{option} has {' and '.join(common)} for every network; write NAME=VALUE, with NAME "
            f"of {', '.join(names)}"
        )
    return {name: common[0] for name in names if common} | own


def _read_categories(path: str) -> list[str]:
    try:
        lines = read_bytes(path).decode().rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read the class names in {path}: {error}") from error
    return [line.strip() for line in lines]
