"""What `run.json` says of the images, the networks, the methods and the software."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from scacam.localization import BOX_THRESHOLD
from scacam.methods import METHODS
from scacam.networks import Network
from scacam.storage import join
from scacam.tables import CHANNELS, NETWORK, SCHEMA_VERSION, network_path
from scacam.version import __version__

__all__ = ["class_weights", "describe_network", "describe_run", "package_version"]

_PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "pillow", "numpy", "opencv-python-headless")

_DIGESTED_ROWS = 1 << 20


def describe_run(manifest: pa.Table, methods: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says of the images, the methods and the software."""
    found = {name: package_version(name) for name in _PACKAGES}
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"scacam": __version__, "python": platform.python_version(), **found},
        "images": len(manifest),
        "manifest_sha256": _digest(manifest.select(["uri", "label", "offset"])),
        "methods": {
            name: {"relu": METHODS[name].relu, "paper": METHODS[name].paper} for name in methods
        },
        "box_threshold": BOX_THRESHOLD,
    }


def package_version(package: str) -> str | None:
    """Of a package as it was installed; None where another stands in for it, as conda's OpenCV."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_network(network: Network, methods: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says of a network."""
    loading = network.rebuild
    return {
        "name": network.name,
        "loaded_as": None if loading is None else loading.args[0],
        "prompts": None if loading is None else loading.keywords["prompts"],
        "weights": network.weights,
        "sha256": network.digest(),
        "target_layer": network.target_layer.name,
        "target_call": network.target_layer.call,
        "head": network.head.kind,
        "class_weights": network.head.classifier,
        "feature_shape": list(network.feature_shape),
        "channels": min(CHANNELS, network.feature_shape[0]),
        "finer_layer": None if network.finer_layer is None else network.finer_layer.name,
        "num_classes": network.num_classes,
        "output_kind": network.output.kind,
        "last_step": network.output.last_step,
        "preprocessing": asdict(network.preprocessing),
        "categories_sha256": _digest_of_names(network.categories),
        "methods": [name for name in methods if network.supports(name)],
        "layers": {
            layer: {"methods": list(names), "map_shape": list(network.map_shape(layer))}
            for layer, names in network.methods_by_layer(methods).items()
        },
    }


def class_weights(output: str, network: Network) -> tuple[str, pa.Table]:
    """Where the classes of a network are stored with their weights and biases, and the table."""
    classes = range(network.num_classes)
    weights, biases = network.class_weights, network.class_biases
    columns = [
        pa.array(classes, pa.int32()),
        [network.class_name(class_id) for class_id in classes],
        pa.nulls(len(classes), pa.float32()) if biases is None else biases.float().cpu().numpy(),
        pa.nulls(len(classes), NETWORK.field("weights").type)
        if weights is None
        else list(weights.float().cpu().numpy()),
    ]
    return join(output, network_path(network.name)), pa.table(columns, schema=NETWORK)


def _digest_of_names(names: Sequence[str] | None) -> str | None:
    return None if names is None else hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _digest(table: pa.Table) -> str:
    """Of the values, however they are divided into chunks."""
    digest = hashlib.sha256()
    for start in range(0, len(table), _DIGESTED_ROWS):
        for column in table.slice(start, _DIGESTED_ROWS).combine_chunks().columns:
            digest.update(pa.record_batch(column.chunks, ["column"]).serialize())
    return digest.hexdigest()
