"""`run.json`: what ran on what, and whether a job continues that or something else."""

import json
from collections.abc import Iterator
from typing import Any

from scacam.errors import RunError
from scacam.storage import join, read_bytes, write_bytes

__all__ = ["differences", "read_record", "write_record"]

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
    write_bytes(join(output, "run.json"), json.dumps(record, indent=2).encode())


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
