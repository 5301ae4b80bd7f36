"""Draw each photo of a run with its top classes and its heatmaps: one PNG per photo.

    scacam pictures --run out/                  # out/pictures/NAME.png

Reads the run's Parquet and the photos; needs neither the networks nor Ray.
"""

import argparse
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from scacam.drawing import fit, grey
from scacam.errors import RunError
from scacam.report.sheet import Cell, Panel, sheet
from scacam.runs.results import Run, open_run
from scacam.storage import join, write_bytes

logger = logging.getLogger("scacam")

_AT_ONCE = 512
_SIZE = 320, 240
_CLASSES = 5
_NAME_LENGTH = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job."""
    parser.add_argument("--run", required=True, help="the output of an explain job")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N photos")


@dataclass(frozen=True)
class Result:
    """How many pictures were drawn, and into which folder."""

    pictures: int
    folder: str
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{self.pictures:,} pictures: {self.folder}"


def run(*, run: str, limit: int | None = None) -> Result:
    """Draw the photos of a run, or the first ones.

    Raises:
        RunError: there is no run, or the limit is below 1.
        OSError: the pictures cannot be written.
    """
    folder = join(run, "pictures")
    return Result(draw(open_run(run), folder, limit), folder)


def draw(run: Run, folder: str, limit: int | None = None) -> int:
    """Write the pictures of the first images into a folder, and return how many."""
    if limit is not None and limit < 1:
        raise RunError(f"--limit must be at least 1, not {limit}")
    taken: set[str] = set()
    for count, (image_id, rows) in enumerate(images(run)):
        if count == limit:
            return count
        name = stem(next(iter(rows.values()))[0]["uri"])
        if name in taken:
            name = f"{name}_{image_id}"
        taken.add(name)
        buffer = io.BytesIO()
        picture(run, rows).save(buffer, "PNG")
        write_bytes(join(folder, f"{name}.png"), buffer.getvalue())
        if count and count % 100 == 0:
            logger.info("%d pictures", count)
    return len(taken)


def images(run: Run) -> Iterator[tuple[int, dict[str, list[dict[str, Any]]]]]:
    """Each image of the run with its explanations by network, a few images in memory at a time."""
    for start in range(0, len(run.image_ids), _AT_ONCE):
        ids = run.image_ids[start : start + _AT_ONCE]
        found: dict[int, dict[str, pa.Table]] = {}
        for network in run.networks:
            table = run.explanations(network, image_ids=ids).to_table()
            # The rows of an image lie together in each layer's shard.
            table = table.take(np.argsort(table["image_id"].to_numpy(), kind="stable"))
            owners = table["image_id"].to_numpy()
            for each, first, count in zip(
                *np.unique(owners, return_index=True, return_counts=True), strict=True
            ):
                found.setdefault(int(each), {})[network] = table.slice(first, count)
        for image_id, tables in sorted(found.items()):
            yield image_id, {network: rows.to_pylist() for network, rows in tables.items()}


def picture(run: Run, rows: dict[str, list[dict[str, Any]]]) -> Image.Image:
    """One photo, its top classes, and the heatmaps of its top class by every method."""
    first = next(iter(rows.values()))[0]
    photo = fit(run.photo(first) or grey(first["width"], first["height"]), *_SIZE)
    panels = [
        Panel(
            network,
            top_classes(explanations),
            label_note(explanations),
            [
                Cell(run.overlay(row, photo), claimant.name)
                for claimant in run.claimants(network)
                for row in explanations
                if row["rank"] == 1
                and (row["layer"], row["method"]) == (claimant.layer, claimant.method)
            ],
        )
        for network, explanations in rows.items()
    ]
    return sheet(Cell(photo, stem(first["uri"])), panels)


def top_classes(explanations: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Names and probabilities of the five most probable classes that were explained."""
    ranked = {row["rank"]: row for row in explanations if row["rank"]}
    return [(ranked[rank]["class_name"], ranked[rank]["probability"]) for rank in sorted(ranked)][
        :_CLASSES
    ]


def label_note(explanations: Sequence[dict[str, Any]]) -> str:
    """The label of an image, by name where its class was explained; nothing if it has none."""
    label = explanations[0]["label"]
    if label is None:
        return ""
    names = {row["class_id"]: row["class_name"] for row in explanations}
    return f"label: {names.get(label, f'class {label}')}"


def stem(uri: str) -> str:
    """The name of an image without its folder and its ending, short enough for a file name."""
    name = uri.rpartition("::")[2].rstrip("/").rpartition("/")[2]
    return (name.rpartition(".")[0] or name)[:_NAME_LENGTH] or "image"
