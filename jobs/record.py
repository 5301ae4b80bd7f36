"""`run.json`: what ran on what. And the proof that a run is whole, from its files alone."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow.parquet
from pyarrow import fs

import scacam
from scacam.errors import RunError
from scacam.localization import BOX_THRESHOLD
from scacam.methods import METHODS
from scacam.networks import Network
from scacam.storage import join, locate
from scacam.tables import SCHEMA_VERSION

__all__ = ["describe_network", "prove", "refuse_other_run", "versions", "write_record"]

_PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "pillow", "numpy", "opencv-python-headless")


def refuse_other_run(output: str) -> None:
    """Raise RunError if the output holds a run already, or cannot be looked at."""
    try:
        filesystem, path = locate(output)
        for name in ("run.json", "manifest.parquet", "explanations", "errors"):
            if filesystem.get_file_info(join(path, name)).type != fs.FileType.NotFound:
                raise RunError(
                    f"output {output} holds another run (its {name} is there); "
                    "choose another output, or delete it"
                )
        filesystem.create_dir(path, recursive=True)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write to output {output}: {error}") from error


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {name: version(name) for name in _PACKAGES}
    return {"scacam": scacam.__version__, "python": platform.python_version(), **found}


def describe_network(network: Network, methods: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says of a network."""
    channels, height, width = network.feature_shape
    return {
        "name": network.name,
        "weights": network.weights,
        "sha256": network.digest(),
        "target_layer": network.target_layer.name,
        "target_call": network.target_layer.call,
        "head": network.head.kind,
        "class_weights": network.head.classifier,
        "feature_shape": [channels, height, width],
        "num_classes": network.num_classes,
        "preprocessing": asdict(network.preprocessing),
        "methods": [name for name in methods if network.supports(name)],
    }


def describe_methods(methods: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says of the methods."""
    return {name: {"relu": METHODS[name].relu, "paper": METHODS[name].paper} for name in methods}


def write_record(output: str, record: dict[str, Any]) -> None:
    """Write `run.json`."""
    whole = {"schema_version": SCHEMA_VERSION, "box_threshold": BOX_THRESHOLD, **record}
    filesystem, path = locate(join(output, "run.json"))
    with filesystem.open_output_stream(path) as file:
        file.write(json.dumps(whole, indent=2).encode())


def prove(output: str, networks: Sequence[str], images: int) -> None:
    """Check the files against the manifest: every image once, in explanations or in errors.

    Reads the ids of one shard at a time; memory is a byte per image of the manifest and network.

    Raises:
        RunError: says what is missing or there twice.
    """
    failed = np.zeros(images, dtype=np.uint8)
    for table in _shards(join(output, "errors"), ["image_id"]):
        np.add.at(failed, table["image_id"].to_numpy(), 1)
    for network in networks:
        seen = failed.copy()
        folder = join(output, f"explanations/network={network}")
        for table in _shards(folder, ["image_id", "class_id", "method"]):
            if table.group_by(table.column_names).aggregate([]).num_rows != len(table):
                raise RunError(f"{folder}: one shard has an (image, class, method) twice")
            seen[np.unique(table["image_id"].to_numpy())] += 1
        for wrong, what in (
            (seen == 0, "neither explained nor an error"),
            (seen > 1, "there twice"),
        ):
            if wrong.any():
                raise RunError(
                    f"{int(wrong.sum())} images are {what} for {network} in {output}, "
                    f"the first is image {int(wrong.argmax())}"
                )


def _shards(folder: str, columns: list[str]):  # type: ignore[no-untyped-def]
    filesystem, path = locate(folder)
    selector = fs.FileSelector(path, allow_not_found=True)
    for info in filesystem.get_file_info(selector):
        if info.path.endswith(".parquet"):
            with filesystem.open_input_file(info.path) as file:
                yield pyarrow.parquet.ParquetFile(file).read(columns)
