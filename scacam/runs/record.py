"""`run.json`: what ran on what, and whether a job continues that or something else."""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pyarrow as pa

import scacam
from scacam.errors import RunError
from scacam.localization import BOX_THRESHOLD
from scacam.methods import METHODS
from scacam.networks import Network
from scacam.storage import join, locate, read_bytes
from scacam.tables import SCHEMA_VERSION

__all__ = ["describe_network", "describe_run", "differences", "read_record", "write_record"]

_PACKAGES = ("torch", "torchvision", "ray", "pyarrow", "pillow", "numpy", "opencv-python-headless")
_DIGESTED_ROWS = 1 << 20
_FINGERPRINT = (
    "schema_version",
    "images",
    "manifest_sha256",
    "networks",
    "methods",
    "top_k",
    "explain_label",
    "view",
    "bfloat16",
    "box_threshold",
)


def describe_run(manifest: pa.Table, methods: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says of the images, the methods and the software."""
    found = {name: version(name) for name in _PACKAGES}
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"scacam": scacam.__version__, "python": platform.python_version(), **found},
        "images": len(manifest),
        "manifest_sha256": _digest(manifest.select(["uri", "label", "offset"])),
        "methods": {
            name: {"relu": METHODS[name].relu, "paper": METHODS[name].paper} for name in methods
        },
        "box_threshold": BOX_THRESHOLD,
    }


def describe_network(network: Network, methods: Sequence[str]) -> dict[str, Any]:
    """What `run.json` says of a network."""
    return {
        "name": network.name,
        "weights": network.weights,
        "sha256": network.digest(),
        "target_layer": network.target_layer.name,
        "target_call": network.target_layer.call,
        "head": network.head.kind,
        "class_weights": network.head.classifier,
        "feature_shape": list(network.feature_shape),
        "num_classes": network.num_classes,
        "preprocessing": asdict(network.preprocessing),
        "categories_sha256": _digest_of_names(network.categories),
        "methods": [name for name in methods if network.supports(name)],
    }


def _digest_of_names(names: Sequence[str] | None) -> str | None:
    return None if names is None else hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _digest(table: pa.Table) -> str:
    """Of the values, however they are divided into chunks."""
    digest = hashlib.sha256()
    for start in range(0, len(table), _DIGESTED_ROWS):
        for column in table.slice(start, _DIGESTED_ROWS).combine_chunks().columns:
            digest.update(pa.record_batch(column.chunks, ["column"]).serialize())
    return digest.hexdigest()


def read_record(output: str) -> dict[str, Any] | None:
    """The output's `run.json`, or None if there is none."""
    try:
        return json.loads(read_bytes(join(output, "run.json")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{output}/run.json is no JSON ({error}); delete this output") from error


def write_record(output: str, record: dict[str, Any]) -> None:
    """Write `run.json`; on local disk, too, all of it or nothing."""
    filesystem, path = locate(join(output, "run.json"))
    with filesystem.open_output_stream(path + ".new") as file:
        file.write(json.dumps(record, indent=2).encode())
    filesystem.move(path + ".new", path)


def differences(existing: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """How two runs differ in what determines their results, in words; empty if they do not."""
    versions = {"scacam version": [r["versions"]["scacam"] for r in (existing, wanted)]}
    before = dict(_flat({key: existing.get(key) for key in _FINGERPRINT}))
    after = dict(_flat({key: wanted.get(key) for key in _FINGERPRINT}))
    pairs = {key: [before.get(key), after.get(key)] for key in {**before, **after}} | versions
    return [f"{key}: {old} → {new}" for key, (old, new) in pairs.items() if old != new]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with dotted names; of a list of networks, by network."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        value = {item["name"]: item for item in value}
        yield name, list(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, list(value) if isinstance(value, tuple) else value
