"""Evaluate how well the heatmaps of a run localize, against true boxes or masks.

    scacam evaluate --run out/ --boxes boxes.csv

Looks at the stored heatmaps alone: needs no network and no images. Writes OUT/metrics.
"""

import argparse
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from scacam.errors import RunError
from scacam.evaluation.intervals import (
    Row,
    best_levels,
    curves,
    dealt,
    summarise,
)
from scacam.evaluation.measures import BASELINES
from scacam.evaluation.metrics import TOP1, State, names_of
from scacam.evaluation.shards import CountHits, MeasureMasks, ScoreImages
from scacam.evaluation.tables import CURVES, DIFFERENCES, LOCALIZATION, placed
from scacam.evaluation.truth import MaskFiles, TrueBoxes, read_boxes, read_masks
from scacam.evaluation.words import told
from scacam.pipeline.cluster import start_ray
from scacam.pipeline.tasks import in_tasks
from scacam.runs.lock import locked
from scacam.runs.results import Run, open_run
from scacam.storage import delete, join, locate
from scacam.storage.parquet import read_columns, write_table

logger = logging.getLogger("scacam")

_PROGRESS_S = 15.0
_TABLES = {"localization": LOCALIZATION, "differences": DIFFERENCES, "localization_curves": CURVES}
_BOXES = "metrics/localization_boxes.parquet"
_IMAGES = "metrics/localization_images"

Claimants = Mapping[str, tuple[str | None, str]]
"""By name, the layer and the method of what is measured; baselines have no layer."""


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


@dataclass
class Result:
    """The metrics of a run; as text, what they rest on and how the methods compare.

    Attributes:
        path: the folder of the tables.
        images: how many images were evaluated, by network.
        remarks: what the metrics rest on, and what was left out.
        rows: of the tables, by their names.
    """

    path: str
    images: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in _TABLES})
    ok: ClassVar[bool] = True

    def add(self, network: str, table: str, rows: Iterable[Row], claimants: Claimants) -> None:
        """Add rows of a network to a table, each of a claimant by its name."""
        self.rows[table] += placed(network, rows, claimants)

    def __str__(self) -> str:
        lines = [*self.remarks]
        for network in self.images:
            rows, pairs = (
                [row for row in self.rows[table] if row["network"] == network]
                for table in ("localization", "differences")
            )
            lines += [f"\n{network}, in %, with 95 % intervals", *told(rows, pairs)]
        return "\n".join([*lines, "", f"tables: {self.path}"])


def run(*, run: str, boxes: str | None = None, masks: str | None = None) -> Result:
    """Evaluate a run against boxes, or against masks.

    Args:
        run: the output of an explain job.
        boxes: a table of true boxes, see `evaluation.truth.read_boxes`.
        masks: a folder of masks, see `evaluation.truth.read_masks`.

    Raises:
        RunError: the run is not there or not complete, the truth cannot be read, or no image can
            be evaluated.
    """
    if (boxes is None) == (masks is None):
        raise RunError("evaluate against boxes or against masks: name one of the two")
    opened = open_run(run)
    if opened.config.get("status") != "complete":
        raise RunError(f"the run in {run} is not complete; complete it first")
    path = join(run, "manifest.parquet")
    manifest = read_columns(*locate(path), ["image_id", "uri", "label"])
    groups = dealt(len(manifest))
    truth: TrueBoxes | MaskFiles
    if boxes is not None:
        truth, left_out = read_boxes(boxes, manifest)
    else:
        truth, left_out = read_masks(str(masks), manifest)
    del manifest
    images = len(np.unique(truth.image_ids))
    if not images:
        raise RunError(f"no image of {run} can be evaluated: {listed(left_out)}")
    result = Result(join(run, "metrics"), remarks=[f"left out: {listed(left_out)}"])
    with locked(run):
        start_ray()
        forget(run)
        work = Work(opened, images, int(groups.max()) + 1, ray.put((truth, groups)))
        for network in opened.networks:
            logger.info("evaluating %s", network)
            if isinstance(truth, TrueBoxes):
                evaluate_boxes(work, network, result)
            else:
                evaluate_masks(work, network, result)
        write(run, result, truth)
    return result


class Work(NamedTuple):
    """What is to be done for every network.

    Attributes:
        run: whose shards are measured.
        images: how many of its images have a truth.
        groups: how many groups they are dealt to.
        truth: the truth and the groups, where all tasks find them.
    """

    run: Run
    images: int
    groups: int
    truth: ray.ObjectRef

    def claimants(self, network: str) -> "Claimants":
        """What is measured of a network, by name: the methods of its layers, and the baselines.

        Of each its layer and its method; baselines have no layer.
        """
        methods = {each.name: (each.layer, each.method) for each in self.run.claimants(network)}
        return {**methods, **{name: (None, name) for name in BASELINES}}

    def summed(
        self,
        network: str,
        stage: Callable[..., Any],
        groups: int,
        levels: np.ndarray | None = None,
        **more: Any,
    ) -> tuple[Counter[str], State]:
        """The sums over all shards of a network, `[groups, claimants, …]`, and what became of them.

        Layer by layer, for their shards have the same images; the baselines with the last one.
        """
        layers = self.run.networks[network]["layers"]
        states = []
        begin = 0
        for layer, described in layers.items():
            baselines = BASELINES if layer == list(layers)[-1] else ()
            end = begin + len(described["methods"]) + len(baselines)
            if levels is not None:
                more["levels"] = levels[begin:end]
            counts, state = self._summed(network, layer, baselines, stage, groups, more)
            states.append(state)
            begin = end
        return counts, State.beside(states)

    def _summed(
        self,
        network: str,
        layer: str,
        baselines: Sequence[str],
        stage: Callable[..., Any],
        groups: int,
        more: Mapping[str, Any],
    ) -> tuple[Counter[str], State]:
        """Those of one layer, made in tasks and only added here."""
        described = self.run.networks[network]
        measure = stage(
            load=partial(ray.get, self.truth),
            layer=layer,
            methods=described["layers"][layer]["methods"],
            baselines=baselines,
            with_relu=[name for name, method in self.run.methods.items() if method["relu"]],
            input_size=tuple(described["preprocessing"]["crop_size"]),
            **more,
        )
        shards = self.run.shards(network, layer)
        counts: Counter[str] = Counter()

        def states() -> Iterator[State]:
            shown = time.monotonic()
            for part in in_tasks(measure, shards):
                counts.update(part.counts)
                if time.monotonic() - shown > _PROGRESS_S:
                    shown, done = time.monotonic(), counts["images"]
                    share = f"{done / self.images:.0%}"
                    logger.info("%s: %d of %d images (%s)", network, done, self.images, share)
                yield part.state

        return counts, State.merge(states(), groups)


def evaluate_boxes(work: Work, network: str, result: Result) -> None:
    """One network against boxes: the best thresholds first, then the metrics at these."""
    counts, state = work.summed(network, CountHits, 1)
    images = int(state.images[0])
    result.images[network] = images
    result.remarks.append(
        f"{network}: {images:,} images evaluated; left out: "
        + listed(
            {
                "images that failed": work.images - counts["images"],
                "images without an object inside the view": counts["blind"],
                "objects outside of the view": counts["outside"],
            }
        )
    )
    if not images:
        raise RunError(f"there are no metrics over zero images: {result.remarks[-1]}")
    known = not counts["unmapped"]
    if not known:
        result.remarks.append(
            f"{network}: {counts['unmapped']:,} images have no map of their labelled class, so "
            "there are only top1_ metrics; run the explain job with --explain-label for the others"
        )
    hits, claimants = state.sums["hits"][0], work.claimants(network)
    levels = best_levels(hits)
    folder = join(work.run.path, f"{_IMAGES}/network={network}")
    _, state = work.summed(
        network, ScoreImages, work.groups, levels=levels, known=known, folder=folder
    )
    names = [name for name in names_of("boxes") if known or name.startswith(TOP1)]
    found = curves(hits, images, list(claimants), known)
    result.add(network, "localization_curves", found, claimants)
    rows, pairs = summarise(state, list(claimants), names, levels)
    result.add(network, "localization", rows, claimants)
    result.add(network, "differences", pairs, claimants)


def evaluate_masks(work: Work, network: str, result: Result) -> None:
    """One network against masks."""
    counts, state = work.summed(network, MeasureMasks, work.groups)
    if counts["unmapped"]:
        raise RunError(
            f"{network}: {counts['unmapped']:,} images have no map of their labelled class; "
            "run the explain job with --explain-label"
        )
    result.images[network] = counts["images"] - counts["unreadable"]
    result.remarks.append(
        f"{network}: {result.images[network]:,} images evaluated; left out: "
        + listed(
            {
                "images that failed": work.images - counts["images"],
                "images whose mask is no gray PNG": counts["unreadable"],
            }
        )
    )
    if not any(sums[:, :, 0].any() for sums in state.sums.values()):
        raise RunError(
            f"no mask has a pixel of value 1 in the view of {network}; masks are 0 outside, "
            f"1 inside, 255 ignored. {result.remarks[-1]}"
        )
    claimants = work.claimants(network)
    rows, pairs = summarise(state, list(claimants), names_of("masks"))
    result.add(network, "localization", rows, claimants)
    result.add(network, "differences", pairs, claimants)


def write(output: str, result: Result, truth: TrueBoxes | MaskFiles) -> None:
    """Write the tables that have rows."""
    for name, schema in _TABLES.items():
        if result.rows[name]:
            table = pa.Table.from_pylist(result.rows[name], schema)
            write_table(join(result.path, f"{name}.parquet"), table)
    if isinstance(truth, TrueBoxes):
        write_table(join(output, _BOXES), truth.table())


def forget(output: str) -> None:
    """Delete what an earlier evaluation wrote."""
    for name in (_IMAGES, _BOXES, *(f"metrics/{table}.parquet" for table in _TABLES)):
        delete(join(output, name))


def listed(counts: Mapping[str, int]) -> str:
    """Counts in words, without those that are zero."""
    words = [f"{count:,} {what}" for what, count in counts.items() if count]
    return ", ".join(words) or "nothing"
