"""Sections of the report about what other jobs measured and left in `OUT/metrics`."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from scacam.audit.maps import Ranking
from scacam.evaluation.intervals import Row, compared
from scacam.evaluation.metrics import headline, titles
from scacam.evaluation.sweep import RIGHT_IOU
from scacam.evaluation.tables import named
from scacam.report.charts import lines
from scacam.runs.results import Claimant, Run

__all__ = ["best_and_worst", "class_activation_weights", "localization", "measured"]

_CHANNELS, _CLASSES = 50, 3
_RATIOS = (-1.0, 3.0)
_PER_CHANNEL = ("class_weights", "averaged_gradients")


def measured(run: Run, table: str) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """For each network in a table of metrics what a section begins with, and the table's rows.

    The section has of `cells` the row of every method and metric, by their names.
    """
    dataset = run.metrics(table)
    rows = [] if dataset is None else dataset.to_table().to_pylist()
    for network, of_network in groupby(rows, key=itemgetter("network")):
        found = list(of_network)
        cells = {(row["method"], row["metric"]): row for row in named(found, found)}
        section = {
            "network": network,
            "images": max(row["images"] for row in found),
            "methods": list(dict.fromkeys(method for method, _ in cells)),
            "cells": cells,
        }
        yield section, found


def localization(run: Run) -> list[dict[str, Any]]:
    """For each network that was evaluated: its metrics, its curves, and what beats what."""
    sections = []
    for section, found in measured(run, "localization"):
        names = {row["metric"] for row in found}
        shown = titles(names)
        sections.append(
            section
            | {
                "metrics": shown,
                "chart": _curves(run, section["network"], headline(names), found),
                "differences": _differences(run, section["network"], found, shown),
            }
        )
    return sections


def _curves(run: Run, network: str, metric: str | None, measured: list[Row]) -> Markup | None:
    """Accuracy over the threshold, a curve per method; methods with the same curve share it."""
    dataset = run.metrics("localization_curves")
    if dataset is None:
        return None
    where = (pc.field("network") == network) & (pc.field("iou") == RIGHT_IOU)
    where = where & (pc.field("metric") == metric)
    table = dataset.to_table(filter=where).sort_by("threshold")
    accuracies: dict[str, list[float]] = {}
    for row in named(measured, table.to_pylist()):
        accuracies.setdefault(row["method"], []).append(row["accuracy"])
    series: dict[tuple[float, ...], list[str]] = {}
    for method, accuracy in accuracies.items():
        series.setdefault(tuple(accuracy), []).append(method)
    if not series:
        return None
    thresholds = np.unique(table["threshold"].to_numpy())
    alt = f"Accuracy of the boxes of {network} over the threshold on its maps"
    return lines(
        {", ".join(names): (thresholds, np.array(curve)) for curve, names in series.items()},
        "threshold, as a share of the map's maximum",
        f"images, IoU ≥ {RIGHT_IOU}",
        alt,
        percent=True,
    )


def _differences(
    run: Run, network: str, rows: list[Row], shown: Mapping[str, str]
) -> dict[str, Any] | None:
    """The best method against each other one."""
    dataset = run.metrics("differences")
    if dataset is None:
        return None
    pairs = dataset.to_table(filter=pc.field("network") == network).to_pylist()
    found = compared(named(rows, rows), named(rows, pairs))
    if found is None:
        return None
    return {"metric": shown[found.metric], "best": found.best, "others": found.others}


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
    run: Run, network: str, claimant: Claimant, size: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images that a claimant localizes best and worst, by the overlap of its best box."""
    dataset = run.metrics(f"localization_images/network={network}")
    best, worst = Ranking(size), Ranking(size)
    if dataset is not None:
        columns = ["image_id", "uri", "class_id", "iou_any", "energy"]
        where = pc.field("method") == claimant.method
        if "layer" in dataset.schema.names:  # it was not when networks had one layer
            where = where & (pc.field("layer") == claimant.layer)
        for batch in dataset.to_batches(columns=columns, filter=where):
            table = pa.Table.from_batches([batch])
            overlap = table["iou_any"].to_numpy()
            best.add(overlap, table)
            worst.add(-overlap - 1e-3 * np.nan_to_num(table["energy"].to_numpy()), table)
    return best.entries, worst.entries
