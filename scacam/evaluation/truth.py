"""Ground truth of the images of a run: their true boxes or masks, matched by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pyarrow import fs

from scacam.errors import RunError
from scacam.inputs.manifest import read_manifest
from scacam.storage import join, locate

__all__ = ["BoxTruth", "MaskTruth", "read_boxes", "read_masks"]

_CORNERS = ["x0", "y0", "x1", "y1"]


@dataclass(frozen=True)
class BoxTruth:
    """True boxes of the labelled class.

    Attributes:
        offsets: int64 `[images + 1]`, where the boxes of each image of the manifest begin.
        boxes: float64 `[N, 4]`, in pixels of the original images.
        left_out: what was left out, and how much of it.
    """

    offsets: np.ndarray
    boxes: np.ndarray
    left_out: Mapping[str, int]

    @property
    def wanted(self) -> np.ndarray:
        """Which images can be evaluated: bool `[images]`."""
        return np.diff(self.offsets) > 0

    def of(self, image_id: int) -> np.ndarray:
        """The boxes of one image."""
        return self.boxes[self.offsets[image_id] : self.offsets[image_id + 1]]

    def rows(self) -> Iterator[dict[str, float]]:
        """Rows as in `tables.TRUE_BOXES`."""
        ids = np.repeat(np.arange(len(self.wanted)), np.diff(self.offsets))
        for image_id, box in zip(ids.tolist(), self.boxes.tolist(), strict=True):
            yield {"image_id": image_id, **dict(zip(_CORNERS, box, strict=True))}


@dataclass(frozen=True)
class MaskTruth:
    """True masks, one file per image.

    Attributes:
        folder: where they are.
        wanted: which images can be evaluated: bool `[images]`.
        left_out: as for boxes.
    """

    folder: str
    wanted: np.ndarray
    left_out: Mapping[str, int]

    def of(self, uri: str) -> str:
        """The path of the mask of an image."""
        return join(self.folder, _mask_name(uri))


def read_boxes(source: str, manifest: pa.Table) -> BoxTruth:
    """Read the boxes of a run's images.

    Args:
        source: a `.csv` or `.parquet` file with `uri` (relative ones are relative to it) or `file`
            (the last part of the uri), `x0`, `y0`, `x1`, `y1`, and optionally `class_id`.
        manifest: of the run.

    Raises:
        RunError: the file cannot be read, has no such columns, has boxes that are none, or names
            files that several images have.
    """
    boxes = _read_table(source)
    images = manifest.to_pandas()
    key = "uri" if "uri" in boxes else "file"
    missing = [name for name in (key, *_CORNERS) if name not in boxes]
    if missing:
        raise RunError(f"boxes {source} have no column {', '.join(missing)}; see the README")
    boxes[_CORNERS] = boxes[_CORNERS].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    wrong = boxes[_CORNERS].isna().any(axis=1)
    wrong |= (boxes.x1 < boxes.x0) | (boxes.y1 < boxes.y0)
    if wrong.any():
        first = boxes[wrong].iloc[0].to_dict()
        raise RunError(
            f"boxes {source}: {wrong.sum()} rows are no boxes (x0 <= x1, y0 <= y1), first {first}"
        )
    if key == "uri":
        boxes["uri"] = read_manifest(source).table["uri"].to_pandas()
    else:
        images["file"] = images.uri.map(_file_name)
        _refuse_ambiguous(images, boxes.file, source)
    columns = [name for name in (key, "class_id") if name in boxes]
    merged = boxes[columns].reset_index(names="box").merge(images, on=key, how="left")
    in_run, labelled = merged.image_id.notna(), merged.label.notna()
    fits = labelled.copy()
    if "class_id" in merged:
        fits &= merged.class_id.isna() | (merged.class_id == merged.label)
    kept = merged[fits].astype({"image_id": np.int64}).sort_values("image_id", kind="stable")
    counts = np.bincount(kept.image_id, minlength=len(images))

    def only(rows: pd.Series) -> int:
        """The boxes that are in these rows and not among the kept: an image may be there twice."""
        return len(set(merged.box[rows]) - set(kept.box))

    return BoxTruth(
        offsets=np.concatenate([[0], counts.cumsum()]),
        boxes=boxes[_CORNERS].to_numpy()[kept.box],
        left_out={
            "boxes of images that are not in the run": only(~in_run),
            "boxes of images without a label": only(in_run & ~labelled),
            "boxes of other classes than the label": only(labelled & ~fits),
            "images without a label": int(images.label.isna().sum()),
            "labelled images without a box": int((images.label.notna() & (counts == 0)).sum()),
        },
    )


def read_masks(folder: str, manifest: pa.Table) -> MaskTruth:
    """Find the masks of a run's images: `NAME.png` for an image `NAME.jpg`.

    Raises:
        RunError: there is no such folder, or two images have the same name.
    """
    try:
        filesystem, path = locate(folder)
        listed = filesystem.get_file_info(fs.FileSelector(path.rstrip("/")))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot list masks {folder}: {error}") from error
    names = pd.Series([info.base_name for info in listed if info.extension == "png"], dtype=str)
    images = manifest.to_pandas()
    images["file"] = images.uri.map(_mask_name)
    _refuse_ambiguous(images, names, folder)
    found, labelled = images.file.isin(names), images.label.notna()
    return MaskTruth(
        folder=folder,
        wanted=(found & labelled).to_numpy(),
        left_out={
            "masks of images that are not in the run": int((~names.isin(images.file)).sum()),
            "images without a label": int((~labelled).sum()),
            "labelled images without a mask": int((labelled & ~found).sum()),
        },
    )


def _file_name(uri: str) -> str:
    """The last part of a uri; of an image in a container, of its name there."""
    return uri.rpartition("::")[2].rpartition("/")[2]


def _mask_name(uri: str) -> str:
    file = _file_name(uri)
    return f"{file.rpartition('.')[0] or file}.png"


def _read_table(source: str) -> pd.DataFrame:
    try:
        filesystem, path = locate(source)
        with filesystem.open_input_file(path) as file:
            if path.lower().endswith(".csv"):
                return pyarrow.csv.read_csv(file).to_pandas()
            return pyarrow.parquet.read_table(file).to_pandas()
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read boxes {source}: {error}") from error


def _refuse_ambiguous(images: pd.DataFrame, files: pd.Series, source: str) -> None:
    """One image may be there for several labels; different images with one name may not."""
    distinct = images[images.file.isin(files)].drop_duplicates(["file", "uri"])
    repeated = distinct[distinct.duplicated("file", keep=False)]
    if len(repeated):
        first, second = repeated.sort_values("file").uri.iloc[:2]
        raise RunError(
            f"{source} names files, but several images of the run have the same name, such as "
            f"{first} and {second}; name them by uri"
        )
