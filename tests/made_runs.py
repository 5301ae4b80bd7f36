"""Runs made of arrays, without Ray: the Parquet that the explain job would have written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scacam.evaluation.tables import CURVES, DIFFERENCES, IMAGE_SCORES, LOCALIZATION
from scacam.localization import localize
from scacam.methods import METHODS
from scacam.methods.caw import CAW
from scacam.runs.proof import prove
from scacam.tables import (
    ERRORS,
    EXPLANATION,
    IMAGE,
    MANIFEST,
    SCHEMA_VERSION,
    explanations,
    explanations_folder,
    pack_heatmaps,
)


@dataclass
class Said:
    """What one network says of N images: K classes each, and `[N, K, h, w]` maps by method.

    They are of its target layer, `features`; those of other layers come by the layer's name.
    Names that are None are null in the shards, as runs without categories once were.
    """

    class_ids: np.ndarray
    probabilities: np.ndarray
    heatmaps: dict[str, np.ndarray]
    class_names: Sequence[str | None]
    input_size: tuple[int, int] = (64, 64)
    views: np.ndarray | None = None
    weights: str = "DEFAULT"
    others: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, dict[str, np.ndarray]]:
        return {"features": self.heatmaps, **self.others}


@dataclass
class Images:
    """N images: where they are, their widths and heights, and their labels, −1 for none."""

    uris: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    labels: np.ndarray
    failed: Sequence[str] = field(default_factory=tuple)


def write_run(
    folder: Path, images: Images, networks: dict[str, Said], shards: int = 1, **config: Any
) -> str:
    """Write a run and return its path; failed images get the ids behind the others."""
    count = len(images.uris)
    ids = np.arange(count)
    labels = pa.array(images.labels, pa.int32(), mask=images.labels < 0)
    folder.mkdir(parents=True, exist_ok=True)
    all_ids = [*ids.tolist(), *range(count, count + len(images.failed))]
    all_labels = [*labels.to_pylist(), *([None] * len(images.failed))]
    known = {
        "image_id": all_ids,
        "uri": [*images.uris, *images.failed],
        "label": pa.array(all_labels, pa.int32()),
    }
    empty = pa.nulls(len(all_ids))
    manifest = pa.table(
        [
            known[name] if name in known else empty.cast(MANIFEST.field(name).type)
            for name in MANIFEST.names
        ],
        schema=MANIFEST,
    )
    pq.write_table(manifest, folder / "manifest.parquet")
    if images.failed:
        (folder / "errors").mkdir()
        failures = [
            {"image_id": count + i, "uri": uri, "stage": "decode", "error": "corrupt",
             "message": "no image"}
            for i, uri in enumerate(images.failed)
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(failures, ERRORS), folder / "errors/0.parquet")
    table = pa.table(
        [ids, images.uris, *np.array(images.sizes).reshape(-1, 2).T, labels],
        schema=pa.schema([IMAGE.field(name) for name in IMAGE.names]),
    )
    for name, said in networks.items():
        for layer, heatmaps in said.layers.items():
            path = folder / explanations_folder(name, layer)
            path.mkdir(parents=True)
            for shard, places in enumerate(np.array_split(np.arange(count), shards)):
                rows = _rows(table.take(places), said, heatmaps, places)
                pq.write_table(rows, path / f"{shard}.parquet", compression="zstd")
    used = [name for said in networks.values() for maps in said.layers.values() for name in maps]
    record = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "images": count + len(images.failed),
        "explained": count,
        "seconds": 2.0,
        "networks": [_described(name, said) for name, said in networks.items()],
        "methods": {
            name: {"relu": METHODS[name].relu, "paper": "a paper"} for name in dict.fromkeys(used)
        },
        "top_k": max(said.class_ids.shape[1] for said in networks.values()),
        "view": "whole_image",
        "versions": {"scacam": "0"},
        **config,
    }
    (folder / "run.json").write_text(json.dumps(record))
    index = prove(str(folder), record["networks"], len(all_ids)).index
    pq.write_table(index, folder / "index.parquet")
    return str(folder)


def _described(name: str, said: Said) -> dict[str, Any]:
    shape = next(iter(said.heatmaps.values())).shape
    return {
        "name": name,
        "weights": said.weights,
        "sha256": "0" * 64,
        "target_layer": "features",
        "feature_shape": [8, *shape[2:]],
        "num_classes": len(said.class_names),
        "methods": list(dict.fromkeys(name for maps in said.layers.values() for name in maps)),
        "layers": {
            layer: {"methods": list(maps), "map_shape": next(iter(maps.values())).shape[2:]}
            for layer, maps in said.layers.items()
        },
    }


def as_version_1(out: Path) -> None:
    """Give a run whose networks have one layer each the files of schema version 1."""
    record = json.loads((out / "run.json").read_text())
    index = pq.read_table(out / "index.parquet").drop_columns(["layer"]).to_pylist()
    for network in record["networks"]:
        (layer,) = network.pop("layers")
        assert layer == network["target_layer"]
        folder = out / explanations_folder(network["name"], layer)
        for shard in folder.iterdir():
            shard.rename(folder.parent / shard.name)
        folder.rmdir()
        for row in index:
            row["path"] = row["path"].replace(f"/layer={layer}/", "/")
    (out / "run.json").write_text(json.dumps({**record, "schema_version": 1}))
    pq.write_table(pa.Table.from_pylist(index), out / "index.parquet")


def _rows(
    images: pa.Table, said: Said, heatmaps: dict[str, np.ndarray], places: np.ndarray
) -> pa.Table:
    sizes = np.stack([images["width"].to_numpy(), images["height"].to_numpy()], axis=1)
    views = np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.float32)
    if said.views is not None:
        views = said.views[places].astype(np.float32)
    classes, methods = said.class_ids.shape[1], list(heatmaps)
    maps = np.stack([heatmaps[method][places] for method in methods], axis=2)
    flat = maps.reshape(-1, *maps.shape[3:])
    packed, scales = pack_heatmaps(flat)
    each = classes * len(methods)
    relu = np.tile([METHODS[method].relu for method in methods], len(places) * classes)
    where = localize(flat, relu, views.repeat(each, axis=0), said.input_size)
    columns: dict[str, Any] = dict(
        zip(EXPLANATION.names[:4], views.repeat(each, axis=0).T, strict=True)
    )
    chosen = said.class_ids[places].ravel().repeat(len(methods))
    columns |= {
        "class_id": chosen,
        "class_name": [said.class_names[i] for i in chosen],
        "rank": np.tile(np.arange(1, classes + 1).repeat(len(methods)), len(places)),
        "probability": said.probabilities[places].ravel().repeat(len(methods)),
        "method": methods * (len(places) * classes),
        "heatmap": list(packed.reshape(len(flat), -1)),
        "map_height": np.full(len(flat), flat.shape[1]),
        "map_width": np.full(len(flat), flat.shape[2]),
        "scale": scales,
    }
    located = np.concatenate([where.peaks, where.boxes], axis=1).T
    for name, values in zip(EXPLANATION.names[-6:], located, strict=True):
        columns[name] = pa.array(values, pa.float32(), from_pandas=True)
    arrays = [pa.array(columns[name], EXPLANATION.field(name).type) for name in EXPLANATION.names]
    structs = pa.StructArray.from_arrays(arrays, fields=list(EXPLANATION))
    offsets = np.arange(0, len(flat) + 1, each, dtype=np.int32)
    lists = pa.ListArray.from_arrays(offsets, structs)
    return explanations(images, lists, flat.shape[1:])


def evaluate(out: Path) -> None:
    """What an evaluation against boxes would leave."""
    metrics = out / "metrics"
    networks = [
        network["name"] for network in json.loads((out / "run.json").read_text())["networks"]
    ]
    rows, pairs, curves = [], [], []
    for network in networks:
        for method, value in (("grad_cam", 0.5), ("sca_cam", 0.6), ("whole_image", 0.3)):
            row = {"network": network, "method": method, "metric": "max_box_acc_v2", "value": value}
            row["layer"] = None if method == "whole_image" else "features"
            rows.append({**row, "ci_low": value - 0.1, "ci_high": value + 0.1, "images": 12})
            for threshold in np.linspace(0, 1, 9):
                accuracy = value * (1 - threshold)
                at = {"iou": 0.5, "threshold": threshold, "accuracy": accuracy}
                curves.append(
                    {**{name: row[name] for name in ("network", "layer", "method", "metric")}, **at}
                )
        pair = {"network": network, "metric": "max_box_acc_v2", "images": 12}
        for method, other, by in (("grad_cam", "sca_cam", -0.1), ("sca_cam", "whole_image", 0.3)):
            interval = {"difference": by, "ci_low": by - 0.2, "ci_high": by + 0.2}
            interval["layer"] = "features"
            interval["other_layer"] = None if other == "whole_image" else "features"
            pairs.append({**pair, "method": method, "other": other, **interval})
        scores = [
            {"image_id": i, "uri": f"{i}", "class_id": i % 2, "method": "sca_cam",
             "layer": "features", "top1": True,
             "iou_any": i / 12, "energy": 0.5}
            for i in range(12)
        ]  # fmt: skip
        folder = metrics / f"localization_images/network={network}"
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(scores, IMAGE_SCORES), folder / "0.parquet")
    for name, content, schema in (
        ("localization", rows, LOCALIZATION),
        ("differences", pairs, DIFFERENCES),
        ("localization_curves", curves, CURVES),
    ):
        pq.write_table(pa.Table.from_pylist(content, schema), metrics / f"{name}.parquet")
    boxes = {"image_id": np.arange(12)} | {
        name: np.full(12, value)
        for name, value in zip(("x0", "y0", "x1", "y1"), (50, 30, 90, 60), strict=True)
    }
    pq.write_table(pa.table(boxes), metrics / "localization_boxes.parquet")


def weigh(out: Path, names: str) -> None:
    """What `jobs/caw.py` would leave, one network being without class weights."""
    rng = np.random.default_rng(0)
    rows = []
    for network, ratio in (("net", 49.0), ("bare", None)):
        for class_id in range(4):
            averaged = rng.normal(size=512) * 1e-3
            row = {"network": network, "class_id": class_id, "class_name": f"{names}{class_id}"}
            row |= {"images": 9 - class_id, "averaged_gradients": averaged, "verdict": "measured"}
            if ratio:
                row |= {"class_weights": ratio * averaged, "ratio": ratio, "correlation": 1.0}
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, CAW), out / "metrics/caw.parquet")
