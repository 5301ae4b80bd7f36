"""Ground truth of the images of a run: their true boxes or masks, matched by name."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from scacam.errors import RunError
from scacam.evaluation.tables import TRUE_BOXES
from scacam.inputs.labels import parse_labels
from scacam.inputs.manifest import absolute_uris
from scacam.inputs.sheets import read_sheet
from scacam.storage import absolute, join, locate
from scacam.tables import stacked

__all__ = ["LeftOut", "MaskFiles", "TrueBoxes", "read_boxes", "read_masks"]

LeftOut = dict[str, int]
"""What was left out, in words, and how much of it."""

_CORNERS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class TrueBoxes:
    """Where the objects are.

    Attributes:
        image_ids: int64 `[N]`, one per box, rising.
        boxes: float64 `[N, 4]`, x0, y0, x1, y1 in pixels of the original images, half-open.
    """

    image_ids: np.ndarray
    boxes: np.ndarray

    @classmethod
    def from_table(cls, table: pa.Table) -> "TrueBoxes":
        """From a table as in `tables.TRUE_BOXES`."""
        return cls(table["image_id"].to_numpy(), stacked(table, _CORNERS))

    def table(self) -> pa.Table:
        """As in `tables.TRUE_BOXES`."""
        return pa.table([self.image_ids, *self.boxes.T], schema=TRUE_BOXES)

    def of(self, image_id: int) -> np.ndarray:
        """The boxes of one image, `[M, 4]`."""
        return self.boxes[slice(*np.searchsorted(self.image_ids, [image_id, image_id + 1]))]


@dataclass(frozen=True)
class MaskFiles:
    """Masks of the objects, one file per image.

    Attributes:
        image_ids: int64 `[N]`, the images that have one, rising.
        folder: where the files are, absolute.
    """

    image_ids: np.ndarray
    folder: str

    def of(self, uri: str) -> str:
        """The path of the mask of an image."""
        return join(self.folder, _mask_names(pa.array([uri]))[0].as_py())


def read_boxes(source: str, manifest: pa.Table) -> tuple[TrueBoxes, LeftOut]:
    """Read the boxes of a run's images that are of the image's labelled class.

    Args:
        source: a `.csv` or `.parquet` file with `uri` (relative ones are relative to it) or `file`
            (the last part of the uri), `x0`, `y0`, `x1`, `y1`, and optionally `class_id`.
        manifest: of the run.

    Raises:
        RunError: the file cannot be read, has no such columns, has boxes that are none, or names
            files that several images have.
    """
    table = _read_table(source)
    key = "uri" if "uri" in table.column_names else "file"
    missing = [name for name in (key, *_CORNERS) if name not in table.column_names]
    if missing:
        raise RunError(f"boxes {source} have no column {', '.join(missing)}; see the README")
    boxes = np.stack(
        [pd.to_numeric(table[name].to_pandas(), errors="coerce") for name in _CORNERS], axis=1
    ).astype(np.float64)
    wrong = ~(boxes[:, :2] <= boxes[:, 2:]).all(1)
    if wrong.any():
        first = table.slice(int(wrong.argmax()), 1).to_pylist()[0]
        raise RunError(
            f"boxes {source}: {wrong.sum()} rows are no boxes (x0 <= x1, y0 <= y1), first {first}"
        )
    if len(boxes) and boxes.max() <= 1:
        raise RunError(
            f"boxes {source} all lie between 0 and 1: they are shares of the image, it seems; "
            "multiply x0 and x1 by its width, y0 and y1 by its height"
        )
    if key == "uri":
        keys, images = absolute_uris(table["uri"], source), manifest["uri"]
    else:
        keys, images = table["file"].cast(pa.string()), _file_names(manifest["uri"])
        _refuse_ambiguous(images, manifest["uri"], keys, source)
    classes = _numbers(table["class_id"], source) if "class_id" in table.column_names else None
    del table  # the uris of ten million boxes take as much as all that follows
    box, row = _pairs(keys, images)
    labels = manifest["label"]
    labelled = labels.is_valid().to_numpy()[row]
    fits = labelled
    if classes is not None:
        said = classes.take(pa.array(box))
        same = pc.equal(said, labels.take(pa.array(row))).fill_null(True)
        fits = labelled & same.to_numpy()
    kept, image_ids = box[fits], manifest["image_id"].to_numpy()[row[fits]]
    order = np.lexsort((kept, image_ids))
    found = TrueBoxes(image_ids[order], boxes[kept[order]])

    def only(some: np.ndarray) -> int:
        """The boxes that are among these and not the kept: an image may be there twice."""
        return int(np.count_nonzero(_marked(some, len(boxes)) & ~_marked(kept, len(boxes))))

    return found, {
        "boxes of images that are not in the run": len(boxes) - len(np.unique(box)),
        "boxes of images without a label": only(box[~labelled]),
        "boxes of other classes than the label": only(box[labelled & ~fits]),
        "images without a label": manifest["label"].null_count,
        "labelled images without a box": len(manifest)
        - manifest["label"].null_count
        - len(np.unique(found.image_ids)),
    }


def _pairs(keys: pa.ChunkedArray, images: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes go with which images, by equal keys: the rows of both, box by box.

    A join of Arrow's takes many times the memory, and at ten million rows does not end.
    """
    names = pc.unique(images)
    are_distinct = len(names) == len(images)  # as a rule, and a lookup takes seconds
    codes = np.arange(len(names)) if are_distinct else pc.index_in(images, names).to_numpy()
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(names))
    wanted = pc.index_in(keys, names)
    box = np.flatnonzero(wanted.is_valid().to_numpy())
    code = wanted.drop_null().to_numpy()
    times = counts[code]
    within = np.arange(times.sum()) - np.repeat(times.cumsum() - times, times)
    begins = counts.cumsum() - counts
    return np.repeat(box, times), order[np.repeat(begins[code], times) + within]


def _marked(places: np.ndarray, count: int) -> np.ndarray:
    marks = np.zeros(count, dtype=bool)
    marks[places] = True
    return marks


def read_masks(folder: str, manifest: pa.Table) -> tuple[MaskFiles, LeftOut]:
    """Find the masks of a run's images: `NAME.png` for an image `NAME.jpg`.

    Raises:
        RunError: there is no such folder, or two images have the same name.
    """
    try:
        filesystem, path = locate(folder)
        listed = filesystem.get_file_info(fs.FileSelector(path.rstrip("/")))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot list masks {folder}: {error}") from error
    files = pa.array([info.base_name for info in listed if info.extension == "png"], pa.string())
    names = _mask_names(manifest["uri"])
    _refuse_ambiguous(names, manifest["uri"], files, folder)
    found, labelled = pc.is_in(names, files), manifest["label"].is_valid()
    image_ids = manifest["image_id"].filter(pc.and_(found, labelled)).to_numpy()
    return MaskFiles(image_ids, absolute(folder)), {
        "masks of images that are not in the run": len(files)
        - pc.sum(pc.is_in(files, names)).as_py(),
        "images without a label": manifest["label"].null_count,
        "labelled images without a mask": pc.sum(pc.and_not(labelled, found)).as_py(),
    }


def _file_names(uris: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The last parts of uris; of images in a container, of their names there."""
    return pc.replace_substring_regex(uris, r"(?s)^(?:.*::)?(?:.*/)?", "")


def _mask_names(uris: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    stems = pc.replace_substring_regex(_file_names(uris), r"(?s)^(.+)\.[^.]*$", r"\1")
    return pc.binary_join_element_wise(stems, ".png", "")


def _read_table(source: str) -> pa.Table:
    try:
        return read_sheet(source, ["uri", "file", *_CORNERS, "class_id"]).table
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read boxes {source}: {error}") from error


def _numbers(class_ids: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    numbers, names = parse_labels(class_ids, f"boxes {source}")
    if names.null_count < len(names):
        raise RunError(f"boxes {source}: class_id must be numbers")
    return numbers


def _refuse_ambiguous(
    names: pa.ChunkedArray, uris: pa.ChunkedArray, named: pa.ChunkedArray, source: str
) -> None:
    """One image may be there for several labels; different images with one name may not."""
    images = pa.table({"name": names, "uri": uris})
    images = (
        images.filter(pc.is_in(names, pc.unique(named))).group_by(["name", "uri"]).aggregate([])
    )
    counts = images.group_by("name").aggregate([("uri", "count")])
    repeated = pc.min(counts.filter(pc.field("uri_count") > 1)["name"])
    if repeated.is_valid:
        first, second = sorted(images.filter(pc.field("name") == repeated)["uri"].to_pylist())[:2]
        raise RunError(
            f"{source} names files, but several images of the run have the same name, such as "
            f"{first} and {second}; name them by uri"
        )
