"""Make a manifest, and the table of true boxes, of a data set by its layout.

    python jobs/manifest.py --layout voc --input VOCdevkit/ --output voc/

Writes OUTPUT/manifest.parquet for the explain job and OUTPUT/boxes.parquet for the evaluate job.
Counts what it could not match. An image with objects of several classes gets a row for each.
"""

import argparse
import io
import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from pyarrow import fs

from scacam.errors import RunError, ScacamError
from scacam.inputs.containers import IMAGE_SUFFIXES
from scacam.storage import join, locate, read_bytes
from scacam.tables import BOXES

_READERS = 16
_CORNERS = ["x0", "y0", "x1", "y1"]
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_MANIFEST = pa.schema([("uri", pa.string()), ("label", pa.int32())])

Box = tuple[float, ...]
"""x0, y0, x1, y1, in pixels of the image."""


class Example(NamedTuple):
    """A row of the manifest: an image, a class by its name, the boxes of this class in it."""

    uri: str
    name: str
    boxes: Sequence[Box] = ()


class DataSet(NamedTuple):
    """What a layout finds.

    Attributes:
        examples: some of their images may not be there.
        classes: the names of the classes in the order of their labels.
        images: those that should have an example.
    """

    examples: list[Example]
    classes: Sequence[str]
    images: list[str]


class Root:
    """The folder or prefix of a data set.

    Attributes:
        path: where it is, as the uris begin.
        files: all that is in it, sorted.
        images: those files that are images by their names.
        left_out: what was left out, and how much of it.
    """

    def __init__(self, path: str) -> None:
        try:
            filesystem, inner_path = locate(path.rstrip("/"))
            infos = filesystem.get_file_info(fs.FileSelector(inner_path, recursive=True))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot list {path}: {error}") from error
        scheme = path.partition("://")[0] + "://" if "://" in path else ""
        self.path = scheme + inner_path
        self.files = sorted(scheme + info.path for info in infos if info.type == fs.FileType.File)
        self.images = [file for file in self.files if file.lower().endswith(IMAGE_SUFFIXES)]
        self.left_out: Counter[str] = Counter()

    def find(self, *names: str) -> list[str]:
        """The files of these names, in whatever folder; empty unless all are there."""
        found = [next((file for file in self.files if _name(file) == name), "") for name in names]
        return found if all(found) else []


def ilsvrc(root: Root) -> DataSet:
    """The validation images of ILSVRC 2012, with devkit and XML boxes, or with Kaggle's CSVs."""
    kaggle = root.find("LOC_val_solution.csv", "LOC_synset_mapping.txt")
    devkit = root.find("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
    boxes: dict[str, list[Box]] = {}
    if kaggle:
        classes = [line.split()[0] for line in _text(kaggle[1]).splitlines() if line]
        answers = pd.read_csv(io.StringIO(_text(kaggle[0])))
        names = {}
        for stem, answer in zip(answers.ImageId, answers.PredictionString, strict=True):
            words = answer.split()
            names[stem] = words[0]
            boxes[stem] = [_box(words[i + 1 : i + 5]) for i in range(0, len(words), 5)]
    elif devkit:
        wnids = _wnids(read_bytes(devkit[1]))
        classes = sorted(wnids.values())
        names = {
            f"ILSVRC2012_val_{number:08d}": wnids[int(line)]
            for number, line in enumerate(_text(devkit[0]).split(), start=1)
        }
        for stem, objects in _sheets(root, "ILSVRC2012_val_"):
            boxes[stem] = [box for _, box, _ in objects]
    else:
        raise RunError(
            f"{root.path} has neither the devkit's ILSVRC2012_validation_ground_truth.txt and "
            "meta.mat, nor Kaggle's LOC_val_solution.csv and LOC_synset_mapping.txt"
        )
    images = {_stem(i): i for i in root.images if _name(i).startswith("ILSVRC2012_val_")}
    examples = [
        Example(images.get(stem, stem), name, boxes.get(stem, [])) for stem, name in names.items()
    ]
    return DataSet(examples, classes, list(images.values()))


def tiny_imagenet(root: Root) -> DataSet:
    """Tiny ImageNet: `WNID_boxes.txt` of each class folder and `val_annotations.txt`."""
    sheets = [f for f in root.files if f.endswith(("_boxes.txt", "/val_annotations.txt"))]
    examples = []
    for sheet, text in zip(sheets, _texts(sheets), strict=True):
        folder = sheet.rpartition("/")[0]
        for line in text.splitlines():
            file, *name, x0, y0, x1, y1 = line.split("\t")
            wnid = name[0] if name else _name(folder)
            examples.append(Example(f"{folder}/images/{file}", wnid, [_box((x0, y0, x1, y1))]))
    listed = root.find("wnids.txt")
    known = _text(listed[0]).split() if listed else {example.name for example in examples}
    return DataSet(examples, sorted(known), root.images)


def image_folder(root: Root) -> DataSet:
    """A folder per class, as torchvision's ImageFolder reads it. There are no boxes."""
    examples = []
    for image in root.images:
        folder, separator, _ = image.removeprefix(root.path + "/").partition("/")
        if separator:
            examples.append(Example(image, folder))
    return DataSet(examples, sorted({example.name for example in examples}), root.images)


def coco(root: Root) -> DataSet:
    """COCO's detection annotations, `instances_*.json`. Crowds are left out."""
    where = {_name(image): image for image in root.images}
    boxes: defaultdict[tuple[str, str], list[Box]] = defaultdict(list)
    sheets = [f for f in root.files if _name(f).startswith("instances_") and f.endswith(".json")]
    for sheet in sheets:
        content = json.loads(_text(sheet))
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: _name(image["file_name"]) for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation.get("iscrowd"):
                root.left_out["crowds"] += 1
                continue
            x, y, width, height = annotation["bbox"]
            key = files[annotation["image_id"]], names[annotation["category_id"]]
            boxes[key].append((x, y, x + width, y + height))
    examples = [Example(where.get(file, file), name, own) for (file, name), own in boxes.items()]
    return DataSet(examples, _imagenet(), root.images)


def voc(root: Root) -> DataSet:
    """PASCAL VOC: `Annotations/*.xml`, `JPEGImages`. Classes with difficult objects only are left
    out of an image, as in TorchRay's pointing game."""
    images = {_stem(i): i for i in root.images if i.split("/")[-2] == "JPEGImages"}
    examples = []
    for stem, objects in _sheets(root, ""):
        boxes: defaultdict[str, list[Box]] = defaultdict(list)
        easy = {name for name, _, difficult in objects if not difficult}
        for name, (x0, y0, x1, y1), _ in objects:
            boxes[name].append((x0 - 1, y0 - 1, x1, y1))  # pixels counted from 1, the last one in
        root.left_out["classes with difficult objects only"] += len(boxes.keys() - easy)
        examples += [Example(images.get(stem, stem), name, boxes[name]) for name in sorted(easy)]
    return DataSet(examples, _imagenet(), list(images.values()))


def csv(root: Root) -> DataSet:
    """`images.csv` with `uri` or `file`, and `label`; `boxes.csv` with these and x0, y0, x1, y1."""
    sheets = root.find("images.csv")
    if not sheets:
        raise RunError(f"{root.path} has no images.csv with uri or file, and label")
    images = _keyed(root, sheets[0], ["label"])
    boxes: dict[str, list[Box]] = {}
    for sheet in root.find("boxes.csv"):
        rows = _keyed(root, sheet, _CORNERS)
        for key, *corners in rows[["key", *_CORNERS]].itertuples(index=False):
            boxes.setdefault(key, []).append(_box(corners))
    examples = [
        Example(key, str(label), boxes.pop(key, []))
        for key, label in zip(images.key, images.label, strict=True)
    ]
    root.left_out["images with boxes that images.csv does not list"] += len(boxes)
    numbers = images.label.astype(str).str.fullmatch(r"\d+").all()
    top = int(images.label.max()) + 1 if numbers else 0
    classes = [str(number) for number in range(top)] or sorted(set(images.label))
    return DataSet(examples, classes, root.images)


LAYOUTS: dict[str, Callable[[Root], DataSet]] = {
    layout.__name__: layout for layout in (ilsvrc, tiny_imagenet, image_folder, coco, voc, csv)
}


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
    classes = _text(options.categories).splitlines() if options.categories else found.classes
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


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return _name(path).rpartition(".")[0]


def _box(words: Iterable[str | float]) -> Box:
    return tuple(float(word) for word in words)


def _text(path: str) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def _texts(paths: Iterable[str]) -> Iterator[str]:
    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(_text, paths)


def _sheets(root: Root, prefix: str) -> Iterator[tuple[str, list[tuple[str, Box, bool]]]]:
    """The XML files of VOC's kind: their stem, and name, box and difficulty of each object."""
    sheets = [f for f in root.files if f.endswith(".xml") and _name(f).startswith(prefix)]
    for sheet, text in zip(sheets, _texts(sheets), strict=True):
        objects = []
        for found in ET.fromstring(text).iter("object"):
            box = _box(found.findtext(f"bndbox/{side}", "") for side in _SIDES)
            objects.append((found.findtext("name", ""), box, found.findtext("difficult") == "1"))
        yield _stem(sheet), objects


def _wnids(data: bytes) -> dict[int, str]:
    """The WordNet ids of the classes by their ILSVRC 2012 ids, of the devkit's `meta.mat`."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    return {
        int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
        for synset in synsets
        if not synset["num_children"]  # the others are not classes, but what classes have in common
    }


def _imagenet() -> list[str]:
    from torchvision.models import get_weight

    return get_weight("ResNet18_Weights.IMAGENET1K_V1").meta["categories"]


def _keyed(root: Root, sheet: str, columns: list[str]) -> pd.DataFrame:
    """A CSV with a column `key`: the uri of each row's image."""
    rows = pd.read_csv(io.StringIO(_text(sheet)))
    missing = [name for name in columns if name not in rows]
    if missing or not ({"uri", "file"} & set(rows)):
        raise RunError(f"{sheet} has no column {', '.join(missing) or 'uri or file'}")
    if "uri" in rows:
        folder = sheet.rpartition("/")[0]
        rows["key"] = [uri if uri.startswith(root.path) else f"{folder}/{uri}" for uri in rows.uri]
    else:
        where = {_name(image): image for image in root.images}
        rows["key"] = [where.get(file, file) for file in rows.file]
    return rows


def _write(path: str, table: pa.Table) -> None:
    try:
        filesystem, inner_path = locate(path)
        filesystem.create_dir(inner_path.rpartition("/")[0], recursive=True)
        with filesystem.open_output_stream(inner_path) as file:
            pyarrow.parquet.write_table(table, file)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot write {path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
