"""`run.json`: what ran on what, and whether a job continues that or something else."""

import json
from collections.abc import Iterator
from typing import Any

from scacam.errors import RunError
from scacam.storage import join, read_bytes, write_bytes
from scacam.tables import SCHEMA_VERSION

__all__ = ["differences", "layers_of", "read_record", "same_classes", "write_record"]

_FINGERPRINT = (
    "schema_version",
    "images",
    "manifest_sha256",
    "networks",
    "methods",
    "top_k",
    "min_probability",
    "explain_label",
    "embeddings",
    "view",
    "bfloat16",
    "compile",
    "gpu_decode",
    "box_threshold",
    "metrics",
    "steps",
)

_OLD_RUN = {"compile": False, "gpu_decode": False}
_OLD_NETWORK = {"output_kind": "softmax"}
"""How runs from before this was written treated every network."""


def read_record(output: str) -> dict[str, Any] | None:
    """The output's `run.json`, or None if there is none.

    Raises:
        RunError: it cannot be read, describes no run, or a newer version of scacam wrote it.
    """
    path = join(output, "run.json")
    try:
        record = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise RunError(f"{path} does not describe a run: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{output} has schema version {version}, but this scacam reads only up to "
            f"{SCHEMA_VERSION}; install a newer scacam"
        )
    return record


def write_record(output: str, record: dict[str, Any]) -> None:
    """Write `run.json`, all of it or nothing."""
    write_bytes(join(output, "run.json"), json.dumps(record, indent=2).encode())


def differences(existing: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """How two runs differ in what determines their results, in words; empty if they do not."""
    versions = {"scacam version": [r["versions"]["scacam"] for r in (existing, wanted)]}
    networks = [{**_OLD_NETWORK, **network} for network in existing.get("networks", ())]
    existing = {**_OLD_RUN, **existing, "networks": networks}
    wanted = {**_OLD_RUN, **wanted}
    before = dict(_flat({key: existing.get(key) for key in _FINGERPRINT}))
    after = dict(_flat({key: wanted.get(key) for key in _FINGERPRINT}))
    pairs = {key: [before.get(key), after.get(key)] for key in {**before, **after}} | versions
    return [f"{key}: {old} → {new}" for key, (old, new) in pairs.items() if old != new]


def layers_of(network: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `run.json` says of a network's layers: by name, their `methods` and their `map_shape`.

    A run of schema version 1 has its target layer alone.
    """
    if "layers" in network:
        layers: dict[str, dict[str, Any]] = network["layers"]
        return layers
    only = {"methods": network["methods"], "map_shape": network["feature_shape"][1:]}
    return {network["target_layer"]: only}


def same_classes(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether a class id means the same to two networks, as `run.json` describes them.

    It does if they have equally many classes and the same category names. Where the names of one
    are not known, they are taken for those of the other.
    """
    names = {network.get("categories_sha256") for network in (first, second)} - {None}
    return first["num_classes"] == second["num_classes"] and len(names) < 2


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
