"""Evaluate how well the heatmaps of a run localize, against true boxes or masks.

    python jobs/evaluate.py --run out/ --boxes boxes.csv

Looks at the stored heatmaps alone: needs no network and no images. Writes OUT/metrics.
"""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import ray
import ray.data
from pyarrow import fs

from scacam.errors import RunError
from scacam.evaluation.intervals import BoxTotals, MaskTotals, Row, curves, dealt, summarise
from scacam.evaluation.measures import BASELINES, POINTING_TOLERANCE
from scacam.evaluation.shards import (
    MeasureBoxes,
    MeasureMasks,
    ScoreImages,
    unpack_histograms,
    unpack_hits,
)
from scacam.evaluation.sweep import RIGHT_IOU
from scacam.evaluation.truth import BoxTruth, MaskTruth, read_boxes, read_masks
from scacam.pipeline.cluster import start_ray
from scacam.runs.lock import locked
from scacam.runs.proof import shards_of
from scacam.runs.results import Run, open_run
from scacam.storage import join, locate
from scacam.storage.parquet import write_table
from scacam.tables import CURVES, DIFFERENCES, LOCALIZATION, TRUE_BOXES

logger = logging.getLogger("scacam")

_PROGRESS_S = 15.0
_TABLES = {
    "localization": LOCALIZATION,
    "differences": DIFFERENCES,
    "localization_curves": CURVES,
    "localization_boxes": TRUE_BOXES,
}
_IMAGES = "metrics/localization_images"
_SHOWN = {
    "max_box_acc": "MaxBoxAcc",
    "max_box_acc_v2": "MaxBoxAccV2",
    "top1_max_box_acc_v2": "top-1 V2",
    "box_acc_20": "box at 20 %",
    "pointing_game": "pointing",
    "energy_pointing_game": "energy",
    "pxap": "PxAP",
}
_HEADLINES = ("max_box_acc_v2", "top1_max_box_acc_v2", "pxap")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job."""
    parser.add_argument("--run", required=True, metavar="OUT", help="the output of an explain job")
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument(
        "--boxes", help=".csv or .parquet with uri or file, x0, y0, x1, y1, optionally class_id"
    )
    truth.add_argument(
        "--masks", metavar="FOLDER", help="a PNG per image: 0 outside, 1 inside, 255 ignored"
    )


@dataclass(frozen=True)
class Result:
    """The metrics, and the output they are of."""

    tables: "Tables"
    output: str
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        return summary(self.tables, self.output)


def run(*, run: str, boxes: str | None = None, masks: str | None = None) -> Result:
    """From the options to the metrics."""
    return evaluate(SimpleNamespace(run=run, boxes=boxes, masks=masks))


def evaluate(options: SimpleNamespace) -> Result:
    """From the options to the metrics."""
    run = open_run(options.run)
    if run.config.get("status") != "complete":
        raise RunError(f"the run in {options.run} is not complete; complete it first")
    truth: BoxTruth | MaskTruth
    if options.boxes:
        truth = read_boxes(options.boxes, run.manifest)
    else:
        truth = read_masks(options.masks, run.manifest)
    if not truth.wanted.any():
        raise RunError(f"no image of {options.run} can be evaluated: {listed(truth.left_out)}")
    with locked(options.run):
        start_ray()
        forget(options.run)
        tables = Tables([f"left out: {listed(truth.left_out)}"])
        if isinstance(truth, BoxTruth):
            tables.localization_boxes = list(truth.rows())
        for network in run.networks:
            logger.info("evaluating %s", network)
            if isinstance(truth, BoxTruth):
                evaluate_boxes(run, network, truth, tables)
            else:
                evaluate_masks(run, network, truth, tables)
        tables.write(options.run)
    return Result(tables, options.run)


@dataclass
class Tables:
    """The rows of the metrics' tables as they come, and remarks on what they rest on."""

    remarks: list[str]
    localization: list[Row] = field(default_factory=list)
    differences: list[Row] = field(default_factory=list)
    localization_curves: list[Row] = field(default_factory=list)
    localization_boxes: list[Row] = field(default_factory=list)

    def add(
        self, network: str, totals: Mapping[str, BoxTotals] | Mapping[str, MaskTotals], known: bool
    ) -> None:
        """Add the metrics of a network."""
        rows, pairs = summarise(totals, known)
        self.localization += [{"network": network, **row} for row in rows]
        self.differences += [{"network": network, **row} for row in pairs]

    def write(self, output: str) -> None:
        """Write the tables that have rows into `OUTPUT/metrics`."""
        for name, schema in _TABLES.items():
            rows = getattr(self, name)
            if rows:
                path = join(output, f"metrics/{name}.parquet")
                write_table(path, pa.Table.from_pylist(rows, schema))


def evaluate_boxes(run: Run, network: str, truth: BoxTruth, tables: Tables) -> None:
    """One network against boxes: the metrics first, then the table of images."""
    totals = {name: BoxTotals() for name in claimants(run, network)}
    groups = dealt(len(truth.wanted))
    seen: Counter[str] = Counter()
    for table in measured(run, network, truth, MeasureBoxes):
        one_each = table.filter(pc.equal(table["method"], BASELINES[0]))
        seen["images"] += len(one_each)
        seen["blind"] += pc.sum(pc.equal(one_each["inside"], 0)).as_py()
        seen["outside"] += pc.sum(one_each["outside"]).as_py()
        seen["unmapped"] += pc.sum(pc.invert(one_each["mapped"])).as_py()
        counted = table.filter(pc.greater(table["inside"], 0))
        for name, total in totals.items():
            rows = counted.filter(pc.equal(counted["method"], name))
            total.add(
                groups[rows["image_id"].to_numpy()],
                unpack_hits(rows["hits"]),
                scores(rows),
                rows["top1"].to_numpy(),
            )
    tables.remarks.append(
        f"{network}: {seen['images'] - seen['blind']:,} images evaluated; left out: "
        + listed(
            {
                "images that failed": int(truth.wanted.sum()) - seen["images"],
                "images without an object inside the view": seen["blind"],
                "objects outside of the view": seen["outside"],
            }
        )
    )
    if seen["images"] == seen["blind"]:
        raise RunError(f"there are no metrics over zero images: {tables.remarks[-1]}")
    known = not seen["unmapped"]
    if not known:
        tables.remarks.append(
            f"{network}: {seen['unmapped']:,} images have no map of their labelled class, so there "
            "are only top1_ metrics; run the explain job with --explain-label for the others"
        )
    tables.add(network, totals, known)
    tables.localization_curves += [{"network": network, **row} for row in curves(totals, known)]
    score_images(run, network, truth, totals, known)


def score_images(
    run: Run, network: str, truth: BoxTruth, totals: Mapping[str, BoxTotals], known: bool
) -> None:
    """Write one row per image and method, now that the best thresholds are known."""
    levels = {}
    for name, total in totals.items():
        best = total.best_levels(0 if known else 1)
        levels[name] = (int(best[0]), int(best[2]))
    filesystem, path = locate(join(run.path, f"{_IMAGES}/network={network}"))
    filesystem.create_dir(path, recursive=True)
    stream = stream_of(run, network, truth, ScoreImages, levels=levels)
    stream.write_parquet(path, filesystem=filesystem, try_create_dir=False)


def evaluate_masks(run: Run, network: str, truth: MaskTruth, tables: Tables) -> None:
    """One network against masks."""
    totals = {name: MaskTotals() for name in claimants(run, network)}
    groups = dealt(len(truth.wanted))
    seen: Counter[str] = Counter()
    for table in measured(run, network, truth, MeasureMasks):
        one_each = table.filter(pc.equal(table["method"], BASELINES[0]))
        seen["images"] += len(one_each)
        seen["unreadable"] += pc.sum(pc.invert(one_each["readable"])).as_py()
        seen["unmapped"] += pc.sum(pc.invert(one_each["mapped"])).as_py()
        counted = table.filter(pc.is_valid(table["histograms"]))
        for name, total in totals.items():
            rows = counted.filter(pc.equal(counted["method"], name))
            total.add(groups[rows["image_id"].to_numpy()], unpack_histograms(rows["histograms"]))
    if seen["unmapped"]:
        raise RunError(
            f"{network}: {seen['unmapped']:,} images have no map of their labelled class; "
            "run the explain job with --explain-label"
        )
    tables.remarks.append(
        f"{network}: {seen['images'] - seen['unreadable']:,} images evaluated; left out: "
        + listed(
            {
                "images that failed": int(truth.wanted.sum()) - seen["images"],
                "images whose mask is no gray PNG": seen["unreadable"],
            }
        )
    )
    if not any(total.histograms[:, 0].any() for total in totals.values()):
        raise RunError(
            f"no mask has a pixel of value 1 in the view of {network}; masks are 0 outside, "
            f"1 inside, 255 ignored. {tables.remarks[-1]}"
        )
    tables.add(network, totals, known=True)


def claimants(run: Run, network: str) -> list[str]:
    """The methods of a network, and the baselines."""
    return [*run.networks[network]["methods"], *BASELINES]


def stream_of(
    run: Run, network: str, truth: BoxTruth | MaskTruth, stage: Callable[..., Any], **more: Any
) -> ray.data.Dataset:
    """The shards of a network through a stage of `measure`, not started yet."""
    folder = f"explanations/network={network}"
    shards = [join(run.path, folder, info.base_name) for info in shards_of(run.path, folder)]
    described = run.networks[network]
    measure = stage(
        load=partial(ray.get, ray.put(truth)),
        methods=described["methods"],
        with_relu=[name for name, method in run.methods.items() if method["relu"]],
        input_size=tuple(described["preprocessing"]["crop_size"]),
        **more,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    return items.map_batches(measure, batch_size=1, batch_format="pyarrow")


def measured(
    run: Run, network: str, truth: BoxTruth | MaskTruth, stage: Callable[..., Any]
) -> Iterator[pa.Table]:
    """The measures of a network, a block at a time as they come; says now and then how far."""
    stream = stream_of(run, network, truth, stage)
    total, done, shown = int(truth.wanted.sum()), 0, time.monotonic()
    for table in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
        if not len(table):
            continue
        yield table
        done += pc.count_distinct(table["image_id"]).as_py()
        if time.monotonic() - shown > _PROGRESS_S:
            shown = time.monotonic()
            logger.info("%s: %d of %d images (%.0f %%)", network, done, total, 100 * done / total)


def scores(rows: pa.Table) -> np.ndarray:
    """The measures of `scacam.intervals.SCORES`: float `[rows, 5]`, 0 where there is none."""
    iou_15, iou_20, energy = (
        rows[name].fill_null(0.0).to_numpy() for name in ("iou_15", "iou_20", "energy")
    )
    distance = rows["peak_distance"].fill_null(np.inf).to_numpy()
    right = (iou_15 >= RIGHT_IOU, iou_20 >= RIGHT_IOU)
    pointed = (distance < POINTING_TOLERANCE, distance == 0)
    return np.stack([*right, *pointed, energy], axis=1).astype(np.float64)


def forget(output: str) -> None:
    """Delete what an earlier evaluation wrote."""
    for name in (_IMAGES, *(f"metrics/{table}.parquet" for table in _TABLES)):
        filesystem, path = locate(join(output, name))
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == fs.FileType.File:
            filesystem.delete_file(path)


def listed(counts: Mapping[str, int]) -> str:
    """Counts in words, without those that are zero."""
    words = [f"{count:,} {what}" for what, count in counts.items() if count]
    return ", ".join(words) or "nothing"


def summary(tables: Tables, output: str) -> str:
    """The last words of the job: what the metrics rest on, and the metrics."""
    lines = list(tables.remarks)
    cells = {(row["network"], row["method"], row["metric"]): row for row in tables.localization}
    metrics = [name for name in _SHOWN if any(key[2] == name for key in cells)]
    for network in dict.fromkeys(key[0] for key in cells):
        methods = list(dict.fromkeys(key[1] for key in cells if key[0] == network))
        width = max(map(len, methods))
        lines += ["", f"{network}, in %, with 95 % intervals"]
        lines.append(" " * width + "".join(f"  {_SHOWN[name]:>19}" for name in metrics))
        for method in methods:
            row = "".join(f"  {percent(cells[network, method, name]):>19}" for name in metrics)
            lines.append(f"{method:<{width}}{row}")
        lines += compared(tables, network, width)
    return "\n".join([*lines, "", f"tables: {join(output, 'metrics')}"])


def percent(row: Row, value: str = "value", form: str = ".1f") -> str:
    """A value and its interval."""
    numbers = [f"{100 * row[name]:{form}}" for name in (value, "ci_low", "ci_high")]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def compared(tables: Tables, network: str, width: int) -> Iterator[str]:
    """The best method against each other one, paired, in the metric that matters most."""
    rows = [row for row in tables.localization if row["network"] == network]
    metric = next(name for name in _HEADLINES if any(row["metric"] == name for row in rows))
    ranked = [row for row in rows if row["metric"] == metric and row["method"] not in BASELINES]
    best = max(ranked, key=lambda row: row["value"])["method"]
    yield f"\n{_SHOWN[metric]} of {best} minus that of"
    for row in tables.differences:
        pair = row["method"], row["other"]
        if row["network"] != network or row["metric"] != metric or best not in pair:
            continue
        if best == row["other"]:
            flipped = {"difference": -row["difference"], "ci_low": -row["ci_high"]}
            row = {**row, **flipped, "ci_high": -row["ci_low"], "other": row["method"]}
        noise = row["ci_low"] <= 0 <= row["ci_high"]
        verdict = "within noise" if noise else "more than noise"
        yield f"{row['other']:<{width}}  {percent(row, 'difference', '+.1f'):>19}  {verdict}"
