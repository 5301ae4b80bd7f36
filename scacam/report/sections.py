"""Sections of the report about what other jobs measured and left in `OUT/metrics`."""

from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from scacam.audit.attention import Objects
from scacam.audit.maps import Ranking
from scacam.report.charts import lines
from scacam.runs.results import Run

__all__ = ["best_and_worst", "class_activation_weights", "localization", "true_boxes"]

_METRICS = {
    "max_box_acc_v2": "MaxBoxAccV2",
    "max_box_acc": "MaxBoxAcc",
    "box_acc_20": "box at 20%",
    "pointing_game": "pointing game",
    "energy_pointing_game": "energy in boxes",
    "pxap": "PxAP",
    "top1_max_box_acc_v2": "top-1 MaxBoxAccV2",
    "top1_box_acc_20": "top-1 box at 20%",
    "top1_pointing_game": "top-1 pointing game",
}
_CHANNELS, _CLASSES = 50, 3
_RATIOS = (-1.0, 3.0)
_CURVES = ("max_box_acc_v2", "top1_max_box_acc_v2")
_IOU = 0.5
_PER_CHANNEL = ("class_weights", "averaged_gradients")


def true_boxes(run: Run) -> Objects | None:
    """Where the objects of a run's images are, if it was evaluated against boxes."""
    dataset = run.metrics("localization_boxes")
    if dataset is None:
        return None
    table = dataset.to_table().sort_by("image_id")
    corners = [table[name].to_numpy() for name in ("x0", "y0", "x1", "y1")]
    return Objects(table["image_id"].to_numpy(), np.stack(corners, axis=1).astype(np.float32))


def localization(run: Run) -> list[dict[str, Any]]:
    """For each network that was evaluated: its metrics, its curves, and what beats what."""
    dataset = run.metrics("localization")
    if dataset is None:
        return []
    rows = dataset.to_table().to_pylist()
    sections = []
    for network, of_network in groupby(rows, key=lambda row: row["network"]):
        cells = {(row["method"], row["metric"]): row for row in of_network}
        methods = list(dict.fromkeys(method for method, _ in cells))
        found = {metric for _, metric in cells}
        sections.append(
            {
                "network": network,
                "images": max(row["images"] for row in cells.values()),
                "metrics": {name: title for name, title in _METRICS.items() if name in found},
                "methods": methods,
                "cells": cells,
                "chart": _curves(run, network),
                "differences": _differences(run, network, methods, cells),
            }
        )
    return sections


def _curves(run: Run, network: str) -> Markup | None:
    """Accuracy over the threshold, a curve per method; methods with the same curve share it."""
    dataset = run.metrics("localization_curves")
    if dataset is None:
        return None
    where = (pc.field("network") == network) & (pc.field("iou") == _IOU)
    table = dataset.to_table(filter=where)
    metric = next((name for name in _CURVES if name in table["metric"].to_pylist()), None)
    table = table.filter(pc.field("metric") == metric).sort_by("threshold")
    series: dict[tuple[float, ...], list[str]] = {}
    for method in pc.unique(table["method"]).to_pylist():
        accuracy = table.filter(pc.field("method") == method)["accuracy"].to_pylist()
        series.setdefault(tuple(accuracy), []).append(method)
    if not series:
        return None
    thresholds = np.unique(table["threshold"].to_numpy())
    alt = f"Accuracy of the boxes of {network} over the threshold on its maps"
    return lines(
        {", ".join(names): (thresholds, np.array(curve)) for curve, names in series.items()},
        "threshold, as a share of the map's maximum",
        f"images with a box of IoU ≥ {_IOU}",
        alt,
        percent=True,
    )


def _differences(
    run: Run, network: str, methods: list[str], cells: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any] | None:
    """The best method against each other one, in the first metric there is."""
    dataset = run.metrics("differences")
    metric = next((name for name in _METRICS if any(m == name for _, m in cells)), None)
    if dataset is None or metric is None:
        return None
    candidates = [method for method in methods if method in run.methods]
    best = max(candidates, key=lambda method: cells[method, metric]["value"])
    where = (pc.field("network") == network) & (pc.field("metric") == metric)
    others = []
    for row in dataset.to_table(filter=where).to_pylist():
        sign = 1 if row["method"] == best else -1
        if best in (row["method"], row["other"]):
            low, high = sorted((sign * row["ci_low"], sign * row["ci_high"]))
            others.append(
                {
                    "other": row["other"] if sign == 1 else row["method"],
                    "difference": sign * row["difference"],
                    "low": low,
                    "high": high,
                    "noise": low <= 0 <= high,
                }
            )
    return {"metric": _METRICS[metric], "best": best, "others": others}


def class_activation_weights(run: Run) -> list[dict[str, Any]]:
    """For each network: its class weights and averaged gradients over a sample of channels."""
    dataset = run.metrics("caw")
    if dataset is None:
        return []
    sections = []
    columns = [name for name in dataset.schema.names if name not in _PER_CHANNEL]
    classes = dataset.to_table(columns=columns).sort_by([("network", "ascending")]).to_pylist()
    for network, of_network in groupby(classes, key=lambda row: row["network"]):
        rows = sorted(of_network, key=lambda row: -row["images"])
        shown = [row["class_id"] for row in rows[:_CLASSES]]
        where = (pc.field("network") == network) & pc.field("class_id").isin(shown)
        found = {row["class_id"]: row for row in dataset.to_table(filter=where).to_pylist()}
        sections.append(
            {
                "network": network,
                "images": sum(row["images"] for row in rows),
                "verdict": rows[0]["verdict"],
                "rows": rows[:_CLASSES],
                "charts": _weight_charts(network, [found[class_id] for class_id in shown]),
            }
        )
    return sections


def _weight_charts(network: str, rows: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """Both weights of one class and their ratio; then each weight for several classes."""
    first = rows[0]
    name = first["class_name"] or f"class {first['class_id']}"
    count = len(first["averaged_gradients"])
    channels = np.unique(np.linspace(0, count - 1, min(count, _CHANNELS)).round().astype(int))

    def values(row: dict[str, Any], column: str) -> tuple[np.ndarray, np.ndarray]:
        return channels, np.array(row[column])[channels]

    charts = []
    x = f"channel ({len(channels)} of {count})"
    if first["ratio"]:
        averaged = values(first, "averaged_gradients")[1]
        weights = values(first, "class_weights")[1]
        title = f"class weight w and averaged gradient α of {name}"
        curves = {
            "w": (channels, weights),
            f"{first['ratio']:.4g} α": (channels, first["ratio"] * averaged),
        }
        charts.append((title, lines(curves, x, "weight", f"{network}: {title}")))
        ratio = np.divide(
            weights, averaged, out=np.full(len(channels), np.nan), where=averaged != 0
        )
        title = f"their ratio w / α, as a multiple of its median {first['ratio']:.4g}"
        curves = {"w / α": (channels, ratio / first["ratio"])}
        charts.append((title, lines(curves, x, "ratio", f"{network}: {title}", y_range=_RATIOS)))
    for column, symbol in (("class_weights", "w"), ("averaged_gradients", "α")):
        curves = {
            row["class_name"] or str(row["class_id"]): values(row, column)
            for row in rows
            if row[column]
        }
        if len(curves) > 1:
            title = f"{symbol} of the same channels for different classes"
            charts.append((title, lines(curves, x, symbol, f"{network}: {title}")))
    return charts


def best_and_worst(
    run: Run, network: str, method: str, size: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images that a method localizes best and worst, by the overlap of its best box."""
    dataset = run.metrics(f"localization_images/network={network}")
    best, worst = Ranking(size), Ranking(size)
    if dataset is not None:
        columns = ["image_id", "uri", "class_id", "iou_any", "energy"]
        where = pc.field("method") == method
        for batch in dataset.to_batches(columns=columns, filter=where):
            table = pa.Table.from_batches([batch])
            overlap = table["iou_any"].to_numpy()
            best.add(overlap, table)
            worst.add(-overlap - 1e-3 * np.nan_to_num(table["energy"].to_numpy()), table)
    return best.entries, worst.entries
