"""Make a manifest, and the table of true boxes, of a data set by its layout.

    python jobs/manifest.py --layout voc --input VOCdevkit/ --output voc/

Writes OUTPUT/manifest.parquet for the explain job and OUTPUT/boxes.parquet for the evaluate job.
Counts what it could not match. An image with objects of several classes gets a row for each.
"""

import argparse
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet

from scacam.errors import RunError, ScacamError
from scacam.inputs.layouts import LAYOUTS, Root, read_text
from scacam.storage import join
from scacam.storage.parquet import write_table
from scacam.tables import BOXES

_CORNERS = ["x0", "y0", "x1", "y1"]
_MANIFEST = pa.schema([("uri", pa.string()), ("label", pa.int32())])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layout", required=True, choices=LAYOUTS)
    parser.add_argument("--input", required=True, metavar="ROOT", help="folder or s3:// prefix")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="likewise")
    parser.add_argument(
        "--categories",
        metavar="FILE",
        help="names of the network's classes, one per line in the order of their labels (default: "
        "of coco and voc ImageNet's, of the others the data set's own, sorted)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; 0 when both tables are written."""
    options = parse(arguments)
    try:
        print(make(options))
    except ScacamError as error:
        print(f"manifest: {error}", file=sys.stderr)
        return 2
    return 0


def make(options: argparse.Namespace) -> str:
    """Write both tables and say in words what is in them and what is not."""
    root = Root(options.input)
    try:
        found = LAYOUTS[options.layout](root)
    except (KeyError, TypeError, ValueError, ET.ParseError, AttributeError) as error:
        raise RunError(
            f"{options.input} is not in the layout {options.layout}: "
            f"{type(error).__name__}: {error}"
        ) from error
    classes = read_text(options.categories).splitlines() if options.categories else found.classes
    labels = {_plain(name): label for label, name in enumerate(classes)}
    existing = set(root.images)
    there = [example for example in found.examples if example.uri in existing]
    kept = sorted(example for example in there if _plain(example.name) in labels)
    if not kept:
        raise RunError(
            f"{options.input}: no image with a known class; {len(root.images)} images, "
            f"{len(found.examples)} annotated, classes such as {', '.join(list(labels)[:3])}"
        )
    nameless = Counter(example.name for example in there if _plain(example.name) not in labels)
    root.left_out["annotated images that are not there"] += len(
        {example.uri for example in found.examples} - existing
    )
    root.left_out["images without annotation"] += len(
        set(found.images) - {example.uri for example in there}
    )
    rows = [(example.uri, labels[_plain(example.name)], example.boxes) for example in kept]
    images = [{"uri": uri, "label": label} for uri, label, _ in rows]
    boxes = [
        {"uri": uri, **dict(zip(_CORNERS, box, strict=True)), "class_id": label}
        for uri, label, own in rows
        for box in own
    ]
    _write(join(options.output, "manifest.parquet"), pa.Table.from_pylist(images, _MANIFEST))
    _write(join(options.output, "boxes.parquet"), pa.Table.from_pylist(boxes, BOXES))
    lines = [
        f"{len(kept):,} rows of {len({e.uri for e in kept}):,} images, {len(boxes):,} boxes",
        *(f"  left out: {count:,} {what}" for what, count in root.left_out.items() if count),
    ]
    if nameless:
        most = ", ".join(f"{name} ({count:,})" for name, count in nameless.most_common(5))
        lines.append(
            f"  left out: {nameless.total():,} rows of {len(nameless):,} classes that are no "
            f"category: {most}{', …' if len(nameless) > 5 else ''}"
        )
    return "\n".join([*lines, f"tables: {options.output}"])


def _plain(name: str) -> str:
    return name.strip().replace("_", " ").casefold()


def _write(path: str, table: pa.Table) -> None:
    try:
        write_table(path, table)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write {path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
