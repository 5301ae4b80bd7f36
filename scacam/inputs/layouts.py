"""Data sets by their layout on disk: which images there are, of which class, with which boxes.

To add a layout: write a function from a `Root` to a `DataSet`, give it a place in `LAYOUTS`, and
test it.
"""

import io
import json
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from scacam.errors import RunError
from scacam.inputs.contents import IMAGE_SUFFIXES
from scacam.inputs.labels import imagenet_names, imagenet_wnids, parse_labels
from scacam.inputs.listing import UNDECODABLE, list_files
from scacam.inputs.sheets import read_sheet
from scacam.storage import read_bytes

__all__ = ["LAYOUTS", "DataSet", "Example", "Root", "read_text"]

_READERS = 16
_CORNERS = ["x0", "y0", "x1", "y1"]

_SIDES = ("xmin", "ymin", "xmax", "ymax")


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
        folders: all folders in it.
        images: those files that are images by their names.
        left_out: what was left out, and how much of it.
    """

    def __init__(self, path: str) -> None:
        try:
            listing = list_files(path)
        except (OSError, ValueError) as error:
            raise RunError(f"cannot list {path}: {error}") from error
        self.path, self.folders = listing.path, listing.folders
        self.files = [file.uri for file in listing.files if file.size is not None]
        self.images = [file for file in self.files if file.lower().endswith(IMAGE_SUFFIXES)]
        self.left_out = Counter(
            {
                "links to nothing": len(listing.files) - len(self.files),
                f"files {UNDECODABLE}": listing.undecodable,
            }
        )

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
        classes = [line.split()[0] for line in read_text(kaggle[1]).splitlines() if line]
        answers = pd.read_csv(io.StringIO(read_text(kaggle[0])))
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
            for number, line in enumerate(read_text(devkit[0]).split(), start=1)
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
    known = read_text(listed[0]).split() if listed else {example.name for example in examples}
    return DataSet(examples, sorted(known), root.images)


def image_folder(root: Root) -> DataSet:
    """A folder per class, as torchvision's ImageFolder reads it; an empty one is a class, too.

    Folders that are all named by WordNet ids of ImageNet are ImageNet's classes, be they some or
    all. There are no boxes.
    """
    examples = []
    for image in root.images:
        folder, separator, _ = image.removeprefix(root.path + "/").partition("/")
        if separator:
            examples.append(Example(image, folder))
    inside = (folder.removeprefix(root.path + "/") for folder in root.folders)
    classes = {folder for folder in inside if "/" not in folder} | {e.name for e in examples}
    if classes and classes <= set(imagenet_wnids()):
        return DataSet(examples, imagenet_wnids(), root.images)
    return DataSet(examples, sorted(classes), root.images)


def coco(root: Root) -> DataSet:
    """COCO's detection annotations, `instances_*.json`. Crowds are left out."""
    where = {_name(image): image for image in root.images}
    boxes: defaultdict[tuple[str, str], list[Box]] = defaultdict(list)
    sheets = [f for f in root.files if _name(f).startswith("instances_") and f.endswith(".json")]
    for sheet in sheets:
        content = json.loads(read_text(sheet))
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
    return DataSet(examples, imagenet_names(), root.images)


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
    return DataSet(examples, imagenet_names(), list(images.values()))


def csv(root: Root) -> DataSet:
    """`images.csv` with `uri` or `file`, and `label`; `boxes.csv` with these and x0, y0, x1, y1."""
    sheets = root.find("images.csv")
    if not sheets:
        raise RunError(f"{root.path} has no images.csv with uri or file, and label")
    keys, images = _keyed(root, sheets[0], ["label"])
    numbers, names = parse_labels(images["label"], sheets[0])
    named = names.null_count < len(names)  # then numbers are names, too
    labels = pc.coalesce(names, numbers.cast(pa.string())).to_pylist()
    boxes: dict[str, list[Box]] = {}
    for sheet in root.find("boxes.csv"):
        boxed, corners = _keyed(root, sheet, _CORNERS)
        for key, *box in zip(boxed, *corners.select(_CORNERS).to_pydict().values(), strict=True):
            boxes.setdefault(key, []).append(_box(box))
    examples = [
        Example(key, label, boxes.pop(key, []))
        for key, label in zip(keys, labels, strict=True)
        if label is not None
    ]
    root.left_out["images without a label"] += labels.count(None)
    root.left_out["images with boxes that images.csv does not list"] += len(boxes)
    top = -1 if named else pc.max(numbers).as_py() or 0
    classes = [str(number) for number in range(top + 1)] or sorted({e.name for e in examples})
    return DataSet(examples, classes, root.images)


LAYOUTS: dict[str, Callable[[Root], DataSet]] = {
    layout.__name__: layout for layout in (ilsvrc, tiny_imagenet, image_folder, coco, voc, csv)
}


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return _name(path).rpartition(".")[0]


def _box(words: Iterable[str | float]) -> Box:
    return tuple(float(word) for word in words)


def read_text(path: str) -> str:
    """The content of a text file. Raises RunError if it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def _texts(paths: Iterable[str]) -> Iterator[str]:
    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(read_text, paths)


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


def _keyed(root: Root, sheet: str, columns: list[str]) -> tuple[list[str], pa.Table]:
    """A CSV, and the uri of each row's image."""
    try:
        rows = read_sheet(sheet, ["uri", "file", *columns]).table
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {sheet}: {error}") from error
    missing = [name for name in columns if name not in rows.column_names]
    if missing or not {"uri", "file"} & set(rows.column_names):
        raise RunError(f"{sheet} has no column {', '.join(missing) or 'uri or file'}")
    if "uri" in rows.column_names:
        folder = sheet.rpartition("/")[0]
        uris = [uri or "" for uri in rows["uri"].to_pylist()]
        return [uri if uri.startswith(root.path) else f"{folder}/{uri}" for uri in uris], rows
    where = {_name(image): image for image in root.images}
    return [where.get(file, file) for file in rows["file"].cast(pa.string()).to_pylist()], rows
