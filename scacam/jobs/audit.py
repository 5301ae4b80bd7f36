"""Find what to worry about in a run: classes and images that are right for the wrong reason.

    scacam audit --run out/

Looks at the stored predictions and heatmaps alone: needs no network and no images. Where the run
was evaluated against boxes, it knows where the objects are. Writes OUT/metrics.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import ray
from pyarrow import fs

from scacam.audit.agreement import Agreement, Compare, sample
from scacam.audit.classes import ANSWERED, CLASSES, Learnt
from scacam.audit.components import MIN_IMAGES
from scacam.audit.kinds import (
    FINDING_IMAGES,
    FINDINGS,
    KINDS,
    SUSPECTS,
    Tally,
)
from scacam.audit.maps import true_boxes
from scacam.audit.passes import Best, Judge, Judged, Learn, Look, Opening, Seen, by_network
from scacam.errors import RunError
from scacam.pipeline.cluster import start_ray
from scacam.pipeline.tasks import added_in_tasks, in_tasks
from scacam.runs.lock import locked
from scacam.runs.results import Run, open_run
from scacam.storage import join, locate
from scacam.storage.parquet import write_table

logger = logging.getLogger("scacam")

_AT_ONCE = 4096
_TOLD = 5
_IMAGES = "findings_images"


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
    images = opened.images.count
    opening = Opening(opened.path)
    with locked(run):
        start_ray()
        objects = elsewhere(lambda: true_boxes(opening.run()))
        logger.info("learning what is usual of each class")
        add = partial(by_network, Seen.merge)
        get_seen = added_in_tasks(Look(opening, objects), add, chunks(images))
        seen = get_seen()
        learnt = {
            name: one.gathered.learn(partial(in_tasks, Learn(get_seen, name)))
            for name, one in seen.items()
        }
        logger.info("looking for who is out of it")
        judge = Judge(opening, objects, shared(learnt))
        found = added_in_tasks(judge, partial(by_network, Judged.merge), chunks(images))()
        logger.info("comparing methods and networks")
        agreement = Agreement.merge(in_tasks(Compare(opening), sample(images)))
        return write(opened, seen, learnt, found, agreement)


def elsewhere(function: Callable[[], object]) -> Callable[[], Any]:
    """Call a function in a task, and leave what it returns where all tasks find it."""
    get: Callable[..., Any] = ray.get
    return partial(get, ray.remote(function).remote())


def shared(value: object) -> Callable[[], Any]:
    """Put something where all tasks find it; a call there gets it, once in each process."""
    return partial(_got, ray.put(value))


@lru_cache(maxsize=1)
def _got(where: ray.ObjectRef) -> Any:
    return ray.get(where)


def chunks(images: int) -> Iterator[np.ndarray]:
    """The ids of so many images, those of one task at a time."""
    for start in range(0, images, _AT_ONCE):
        yield np.arange(start, min(start + _AT_ONCE, images))


def write(
    run: Run,
    seen: dict[str, Seen],
    learnt: dict[str, Learnt],
    found: dict[str, Judged],
    agreement: Agreement,
) -> Result:
    """Write the tables; those of an earlier audit go."""
    result = Result(join(run.path, "metrics"))
    for name, one in found.items():
        result.networks.append(name)
        result.findings += _findings(name, seen[name].names, learnt[name], one.tally)
        result.suspects[name] = len(one.suspects.groups)
    result.findings.sort(key=lambda row: (not row["stands_out"], -float(str(row["strength"]))))
    for number, row in enumerate(result.findings):
        row["finding"] = number
    uris = _Uris(run, [part for one in found.values() for part in (one.images, one.suspects)])
    suspects = [
        _suspects(name, seen[name].names, learnt[name], one.suspects, uris)
        for name, one in found.items()
    ]
    classes = [
        row
        for name, one in found.items()
        for row in _classes(name, seen[name], learnt[name], one.images)
    ]
    alike, lie = agreement.tables(run)
    for name, table in (
        ("findings", pa.Table.from_pylist(result.findings, FINDINGS)),
        ("suspects", pa.concat_tables(suspects)),
        ("classes", pa.Table.from_pylist(classes, CLASSES)),
        ("agreement", alike),
        ("attention", lie),
    ):
        write_table(join(result.path, f"{name}.parquet"), table)
    filesystem, folder = locate(join(result.path, _IMAGES))
    if filesystem.get_file_info(folder).type == fs.FileType.Directory:
        filesystem.delete_dir(folder)
    for name, one in found.items():
        table = _finding_images(name, result.findings, len(learnt[name].mapped), one.images, uris)
        write_table(join(result.path, _IMAGES, f"{name}.parquet"), table)
    return result


def _classes(network: str, seen: Seen, learnt: Learnt, best: Best) -> Iterator[dict[str, object]]:
    """Rows of the classes that a network says of some image, the most frequent first."""
    count = len(learnt.mapped)
    confident = best.groups - len(KINDS) * count
    sums = dict(zip(ANSWERED, seen.answered, strict=True))
    height, width = learnt.usual.shape
    for class_id in np.argsort(-sums["images"], kind="stable").tolist():
        if not sums["images"][class_id]:
            return
        mean = learnt.totals[class_id] / max(learnt.mapped[class_id], 1)
        yield {
            "network": network,
            "class_id": class_id,
            "class_name": seen.names[class_id],
            **{name: int(sums[name][class_id]) for name in ANSWERED[:-1]},
            "probability": float(sums["probability"][class_id] / sums["images"][class_id]),
            "map": mean.ravel().astype(np.float32),
            "map_height": height,
            "map_width": width,
            "confident": best.image_ids[confident == class_id],
        }


def _finding_images(
    network: str, findings: Sequence[dict[str, object]], classes: int, best: Best, uris: "_Uris"
) -> pa.Table:
    """The images of the findings of a network with so many classes."""
    kinds = {kind: place for place, kind in enumerate(KINDS)}
    numbers = np.full((len(KINDS) + 1) * classes, -1)
    for row in findings:
        if row["network"] == network:
            numbers[kinds[str(row["kind"])] * classes + int(str(row["class_id"]))] = row["finding"]
    found_by = numbers[best.groups]
    ids = best.image_ids
    table = pa.table(
        [found_by, ids, uris.of(ids), best.values[:, 0].astype("f4")], schema=FINDING_IMAGES
    )
    order = [("finding", "ascending"), ("score", "descending")]
    return table.filter(pa.array(found_by >= 0)).sort_by(order)


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
        self.ids = np.unique(np.concatenate([part.image_ids for part in listed]))
        self.uris = run.images.rows(self.ids, ["uri"])["uri"].combine_chunks()

    def of(self, image_ids: np.ndarray) -> pa.Array:
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
