"""Find what to worry about in a run: classes and images that are right for the wrong reason.

    scacam audit --run out/

Looks at the stored predictions and heatmaps alone: needs no network and no images. Where the run
was evaluated against boxes, it knows where the objects are. Writes OUT/metrics.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import fs

from scacam.audit.maps import true_boxes
from scacam.errors import RunError
from scacam.evaluation.truth import TrueBoxes
from scacam.findings.classes import Gathered, Learnt
from scacam.findings.components import MIN_IMAGES
from scacam.findings.kinds import (
    FINDING_IMAGES,
    FINDINGS,
    KINDS,
    SUSPECTS,
    Tally,
)
from scacam.findings.passes import Best, Judge, Judged, Look, merged
from scacam.pipeline.cluster import start_ray
from scacam.pipeline.tasks import in_tasks
from scacam.runs.lock import locked
from scacam.runs.results import Run, open_run
from scacam.storage import join, locate
from scacam.storage.parquet import write_table, write_tables

logger = logging.getLogger("scacam")

_AT_ONCE = 4096
_AHEAD = 2
_TOLD = 5
_SUSPECTS, _FINDINGS = "metrics/suspects.parquet", "metrics/findings.parquet"
_IMAGES = "metrics/findings_images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job."""
    parser.add_argument("--run", required=True, metavar="OUT", help="the output of an explain job")


@dataclass
class Result:
    """What the audit came to.

    Attributes:
        path: the folder of the tables.
        networks: their names, with what is to be said of each.
        findings: rows of the table.
        suspects: how many there are, by network.
    """

    path: str
    networks: list[str] = field(default_factory=list)
    findings: list[dict[str, object]] = field(default_factory=list)
    suspects: dict[str, int] = field(default_factory=dict)
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        lines = []
        for network in self.networks:
            found = [row for row in self.findings if row["network"] == network]
            out = [row for row in found if row["stands_out"]]
            lines.append(f"{network}: {self.suspects[network]:,} suspects")
            if not out:
                lines.append("  no class stands out")
            if not self.suspects[network]:
                lines.append(
                    f"  an answer is suspected in a run that kept its predictions, of a class with "
                    f"{MIN_IMAGES} confident ones"
                )
            for row in out[:_TOLD]:
                title = KINDS[str(row["kind"])].title
                lines.append(
                    f"  {row['class_name']} {title}: {row['strength']:.1f} times the median class "
                    f"[{row['ci_low']:.1f}, {row['ci_high']:.1f}], {row['share']:.0%} of "
                    f"{row['images']:,} images"
                )
            if len(out) > _TOLD:
                lines.append(f"  and {len(out) - _TOLD} more")
        return "\n".join([*lines, f"tables: {self.path}"])


def run(*, run: str) -> Result:
    """Audit a run.

    Raises:
        RunError: the run is not there or not complete, or nothing in it was explained.
    """
    opened = open_run(run)
    if opened.config.get("status") != "complete":
        raise RunError(f"the run in {run} is not complete; complete it first")
    if not opened.config.get("explained"):
        raise RunError(f"no image of {run} was explained; its errors say why")
    chunks = [
        opened.image_ids[start : start + _AT_ONCE]
        for start in range(0, len(opened.image_ids), _AT_ONCE)
    ]
    with locked(run):
        start_ray()
        objects = shared(true_boxes(opened))
        learnt, names = learn(opened, chunks, objects)
        shown = in_tasks(Judge(opened.path, objects, shared(learnt)), chunks)
        result = write(opened, learnt, names, merged(shown))
    return result


def shared(value: object) -> Callable[[], Any]:
    """Put something where all tasks find it; a call there gets it."""
    get: Callable[..., Any] = ray.get
    return partial(get, ray.put(value))


def learn(
    run: Run, chunks: Sequence[np.ndarray], objects: Callable[[], TrueBoxes | None]
) -> tuple[dict[str, Learnt], dict[str, dict[int, str]]]:
    """What is known of the classes of each network, and what they are called."""
    logger.info("learning what is usual of each class")
    names: dict[str, dict[int, str]] = {name: {} for name in run.networks}
    totals: dict[str, list[Gathered]] = {name: [] for name in run.networks}
    found = in_tasks(Look(run.path, objects), chunks)
    # Some at a time: of each network there is one sum, and that of those which have just come.
    while few := list(islice(found, _AHEAD * 8)):
        for name in run.networks:
            seen = [part[name] for part in few if name in part]
            parts = [*totals[name], *(part.gathered for part in seen)]
            totals[name] = [Gathered.merge(parts)] if parts else []
            for part in seen:
                names[name] |= part.names
    return {name: parts[0].learn() for name, parts in totals.items() if parts}, names


def write(
    run: Run,
    learnt: dict[str, Learnt],
    names: dict[str, dict[int, str]],
    found: dict[str, Judged],
) -> Result:
    """Write the tables; those of an earlier audit go."""
    result = Result(join(run.path, "metrics"))
    images: list[tuple[str, int, Best]] = []
    for name, one in found.items():
        result.networks.append(name)
        result.findings += _findings(name, names[name], learnt[name], one.tally)
        result.suspects[name] = len(one.suspects.groups)
        images.append((name, len(learnt[name].mapped), one.images))
    result.findings.sort(key=lambda row: (not row["stands_out"], -float(str(row["strength"]))))
    for number, row in enumerate(result.findings):
        row["finding"] = number
    uris = _Uris(run, [part for one in found.values() for part in (one.images, one.suspects)])
    suspects = [
        _suspects(name, names[name], learnt[name], one.suspects, uris)
        for name, one in found.items()
    ]
    write_table(join(run.path, _FINDINGS), pa.Table.from_pylist(result.findings, FINDINGS))
    write_tables(join(run.path, _SUSPECTS), suspects, SUSPECTS)
    filesystem, folder = locate(join(run.path, _IMAGES))
    if filesystem.get_file_info(folder).type == fs.FileType.Directory:
        filesystem.delete_dir(folder)
    numbers = {
        (row["network"], row["kind"], row["class_id"]): row["finding"] for row in result.findings
    }
    for name, classes, best in images:
        kinds = list(KINDS)
        found_by = np.array(
            [
                numbers.get((name, kinds[group // classes], group % classes), -1)
                for group in best.groups.tolist()
            ],
            dtype=np.int64,
        )
        table = pa.table(
            [found_by, best.image_ids, uris.of(best.image_ids), best.values[:, 0].astype("f4")],
            schema=FINDING_IMAGES,
        ).filter(pa.array(found_by >= 0))
        order = [("finding", "ascending"), ("score", "descending")]
        write_table(join(run.path, _IMAGES, f"{name}.parquet"), table.sort_by(order))
    return result


def _findings(
    network: str, names: dict[int, str], learnt: Learnt, tally: Tally
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for place, kind in enumerate(KINDS):
        strengths = tally.strengths(kind)
        for class_id in np.flatnonzero(np.isfinite(strengths.strength)).tolist():
            count = int(tally.images[place, class_id])
            located = None
            if kind == "component":
                located = learnt.shortcuts[class_id].located.ravel().astype(np.float32)
            rows.append(
                {
                    "network": network,
                    "class_id": class_id,
                    "class_name": names.get(class_id),
                    "kind": kind,
                    "strength": float(strengths.strength[class_id]),
                    "ci_low": float(strengths.low[class_id]),
                    "ci_high": float(strengths.high[class_id]),
                    "images": count,
                    "share": float(tally.affected[place, class_id]) / count,
                    "stands_out": bool(strengths.stands_out[class_id]),
                    "located": located,
                    "map_height": None if located is None else learnt.usual.shape[0],
                    "map_width": None if located is None else learnt.usual.shape[1],
                }
            )
    return rows


class _Uris:
    """The uris of the images that are listed."""

    def __init__(self, run: Run, listed: Sequence[Best]) -> None:
        wanted = np.unique(np.concatenate([part.image_ids for part in listed]))
        manifest = run.manifest
        kept = manifest.select(["image_id", "uri"]).filter(
            pc.is_in(manifest["image_id"], pa.array(wanted))
        )
        kept = kept.sort_by("image_id")
        self.ids, self.uris = kept["image_id"].to_numpy(), kept["uri"]

    def of(self, image_ids: np.ndarray) -> pa.ChunkedArray:
        """Of these, in their order."""
        return self.uris.take(pa.array(np.searchsorted(self.ids, image_ids)))


def _suspects(
    network: str, names: dict[int, str], learnt: Learnt, best: Best, uris: _Uris
) -> pa.Table:
    score, fall, probability, class_ids = best.values.T
    ids = class_ids.astype(np.int32)
    places = [learnt.shortcuts[class_id].place for class_id in ids.tolist()]
    return pa.table(
        [
            [network] * len(ids),
            best.image_ids,
            uris.of(best.image_ids),
            ids,
            [names.get(class_id) for class_id in ids.tolist()],
            *(column.astype(np.float32) for column in (probability, fall)),
            np.array(places, dtype=np.float32),
            score.astype(np.float32),
        ],
        schema=SUSPECTS,
    )
