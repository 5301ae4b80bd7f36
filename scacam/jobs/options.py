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

__all__ = [
    "add_input_options",
    "add_network_options",
    "load_networks",
    "parse_networks",
    "refuse_below_one",
    "seconds_per_image",
]

logger = logging.getLogger("scacam")


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add `--input`, `--image-column`, `--label-column` and `--limit`."""
    parser.add_argument(
        "--input",
        required=True,
        help="folder or s3:// prefix of images, .tar shards or .parquet tables; or a .csv or "
        ".parquet manifest (uri, label)",
    )
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="of tables with several columns of images, the one to take",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="the column of a table or manifest, or the key in .json files of tar shards, that "
        "holds the labels (default: label)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N images")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add `--networks`, `--target-layer`, `--categories` and `--output-kind`."""
    parser.add_argument(
        "--networks",
        required=True,
        nargs="+",
        metavar="NAME[=WEIGHTS]",
        help="torchvision's or scacam's name of a network, timm.NAME, hf.NAME, open_clip.NAME, or "
        "package.module:factory; "
        "WEIGHTS is a published name, a checkpoint or 'random' (default: DEFAULT)",
    )
    parser.add_argument(
        "--target-layer",
        nargs="+",
        metavar="[NAME=]LAYER",
        help="the layer to explain, of every network or of the one named (default: the last with "
        "a spatial output before the classifier); several are explained each by itself, and the "
        "last of them to run is the target layer",
    )
    parser.add_argument(
        "--categories",
        nargs="+",
        metavar="[NAME=]FILE",
        help="the class names, one per line, of every network or of the one named (default: those "
        "published with it)",
    )
    parser.add_argument(
        "--output-kind",
        nargs="+",
        metavar="[NAME=]KIND",
        help="softmax if an image is of one class, sigmoid if each class is a question by itself, "
        "of every network or of the one named (default: what its last step is, else softmax)",
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="[NAME=]FILE",
        help="the classes of zero-shot networks (open_clip.NAME) in words, one per line",
    )


def refuse_below_one(**options: int | None) -> None:
    """Raise RunError for an option that is given and less than 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def parse_networks(specifications: Sequence[str]) -> dict[str, str]:
    """Weights by name, of `NAME[=WEIGHTS]`. Raises RunError for a network that is there twice."""
    pairs = [specification.partition("=")[::2] for specification in specifications]
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise RunError(f"network {repeated[0]!r} is there twice; one run holds it once")
    return {name: weights or "DEFAULT" for name, weights in pairs}


def load_networks(
    networks: Sequence[str],
    target_layer: Sequence[str] = (),
    categories: Sequence[str] = (),
    output_kind: Sequence[str] = (),
    finer_layer: Sequence[str] = (),
    prompts: Sequence[str] = (),
) -> list[Network]:
    """Load what the options of `add_network_options`, here by the same names, ask for.

    Raises:
        NetworkError: a network cannot be loaded.
        RunError: the options contradict themselves, or a file of class names cannot be read.
    """
    wanted = parse_networks(networks)
    layers = _by_network(target_layer, list(wanted))
    finer = _one_by_network(finer_layer, list(wanted), "--finer-layer")
    files = _one_by_network(categories, list(wanted), "--categories")
    kinds = _one_by_network(output_kind, list(wanted), "--output-kind")
    asked = _one_by_network(prompts, list(wanted), "--prompts")
    loaded = []
    for name, weights in wanted.items():
        logger.info("loading %s, weights %s", name, weights)
        names = _read_categories(files[name]) if name in files else None
        zero_shot = name.startswith("open_clip.") and name in asked
        loaded.append(
            load_network(
                name,
                weights,
                target_layer=layers.get(name),
                finer_layer=finer.get(name),
                categories=names,
                output_kind=kinds.get(name),
                prompts=_read_categories(asked[name]) if zero_shot else None,
            )
        )
    return loaded


def seconds_per_image(network: Network) -> float:
    """What one image takes a network on one core, after a first one."""
    preprocessing = network.preprocessing
    shape = (1, *preprocessing.crop_size, preprocessing.channels)
    images = network.normalize(torch.zeros(shape, dtype=torch.uint8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            network.module(images)
            began = time.perf_counter()
            network.module(images)
            return time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


def _by_network(values: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The values of each network that has some: its own, `NAME=VALUE`, or those for all."""
    own: dict[str, list[str]] = {}
    common = []
    for value in values:
        name, separator, rest = value.partition("=")
        if separator and name in names:
            own.setdefault(name, []).append(rest)
        else:
            common.append(value)
    return {name: common for name in names if common} | own


def _one_by_network(values: Sequence[str], names: Sequence[str], option: str) -> dict[str, str]:
    """The one value of each network that has one."""
    found = _by_network(values, names)
    for name, several in found.items():
        if len(several) > 1:
            raise RunError(
                f"{option} has {' and '.join(several)} for {name}; give each network one value, "
                f"NAME=VALUE, with NAME of {', '.join(names)}"
            )
    return {name: value for name, (value,) in found.items()}


def _read_categories(path: str) -> list[str]:
    try:
        lines = read_bytes(path).decode().rstrip("\n").split("\n")
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read the class names in {path}: {error}") from error
    return [line.strip() for line in lines]
