"""Make a manifest, and the table of true boxes, of a data set by its layout.

    scacam manifest --layout voc --input VOCdevkit/ --output voc/

Writes OUTPUT/manifest.parquet for the explain job and OUTPUT/boxes.parquet for the evaluate job.
Counts what it could not match. An image with objects of several classes gets a row for each.
"""

import argparse
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet

from scacam.errors import RunError
from scacam.inputs.labels import plain
from scacam.inputs.layouts import LAYOUTS, Root, read_text
from scacam.storage import join
from scacam.storage.parquet import write_table
from scacam.tables import BOXES

_CORNERS = ["x0", "y0", "x1", "y1"]
_MANIFEST = pa.schema([("uri", pa.string()), ("label", pa.int32())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job."""
    parser.add_argument("--layout", required=True, choices=LAYOUTS)
    parser.add_argument("--input", required=True, metavar="ROOT", help="folder or s3:// prefix")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="likewise")
    parser.add_argument(
        "--categories",
        metavar="FILE",
        help="names of the network's classes, one per line in the order of their labels (default: "
        "of coco and voc ImageNet's, of the others the data set's own, sorted)",
    )


@dataclass(frozen=True)
class Result:
    """What the tables hold.

    Attributes:
        output: their folder.
        rows, images, boxes: how many there are.
        left_out: what was left out, and how much of it.
        nameless: rows whose class is no category, by its name.
    """

    output: str
    rows: int
    images: int
    boxes: int
    left_out: Mapping[str, int]
    nameless: Counter[str]
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows of {self.images:,} images, {self.boxes:,} boxes",
            *(f"  left out: {count:,} {what}" for what, count in self.left_out.items() if count),
        ]
        if self.nameless:
            most = ", ".join(f"{name} ({n:,})" for name, n in self.nameless.most_common(5))
            lines.append(
                f"  left out: {self.nameless.total():,} rows of {len(self.nameless):,} classes "
                f"that are no category: {most}{', …' if len(self.nameless) > 5 else ''}"
            )
        return "\n".join([*lines, f"tables: {self.output}"])


def run(*, layout: str, input: str, output: str, categories: str | None = None) -> Result:
    """Write the manifest and the boxes of a data set.

    Raises:
        RunError: the data set is not in this layout, none of its images has a known class, or the
            tables cannot be written.
    """
    root = Root(input)
    try:
        found = LAYOUTS[layout](root)
    except (KeyError, TypeError, ValueError, ET.ParseError, AttributeError) as error:
        raise RunError(
            f"{input} is not in the layout {layout}: {type(error).__name__}: {error}"
        ) from error
    classes = read_text(categories).splitlines() if categories else found.classes
    labels = {plain(name): label for label, name in enumerate(classes)}
    existing = set(root.images)
    there = [example for example in found.examples if example.uri in existing]
    kept = sorted(example for example in there if plain(example.name) in labels)
    if not kept:
        raise RunError(
            f"{input}: no image with a known class; {len(root.images)} images, "
            f"{len(found.examples)} annotated, classes such as {', '.join(list(labels)[:3])}"
        )
    nameless = Counter(example.name for example in there if plain(example.name) not in labels)
    root.left_out["annotated images that are not there"] += len(
        {example.uri for example in found.examples} - existing
    )
    root.left_out["images without annotation"] += len(
        set(found.images) - {example.uri for example in there}
    )
    rows = [(example.uri, labels[plain(example.name)], example.boxes) for example in kept]
    images = [{"uri": uri, "label": label} for uri, label, _ in rows]
    boxes = [
        {"uri": uri, **dict(zip(_CORNERS, box, strict=True)), "class_id": label}
        for uri, label, own in rows
        for box in own
    ]
    _write(join(output, "manifest.parquet"), pa.Table.from_pylist(images, _MANIFEST))
    _write(join(output, "boxes.parquet"), pa.Table.from_pylist(boxes, BOXES))
    distinct = len({example.uri for example in kept})
    return Result(output, len(kept), distinct, len(boxes), root.left_out, nameless)


def _write(path: str, table: pa.Table) -> None:
    try:
        write_table(path, table)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write {path}: {error}") from error
