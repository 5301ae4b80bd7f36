"""The stages of the evaluate job: from shards of explanations to measures, by image and method.

Of each image the maps of the labelled class are looked at, and no others. Whether the top class is
right as well is known from the rank of the labelled one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from scacam.evaluation.intervals import Row
from scacam.evaluation.measures import (
    BASELINES,
    FIXED_THRESHOLDS,
    SCORE_EDGES,
    Claim,
    Truth,
    baseline,
    baseline_map,
    baseline_sweep,
    energy_inside,
    fixed_ious,
    hits,
    ious_at,
    mask_in_view,
    peak_distance,
    positive_part,
    score_histograms,
    truth_in_view,
)
from scacam.evaluation.sweep import LEVELS, quantise, score_map, sweep
from scacam.evaluation.truth import BoxTruth, MaskTruth
from scacam.localization import localize
from scacam.storage import locate, read_bytes
from scacam.tables import IMAGE_SCORES

__all__ = ["MeasureBoxes", "MeasureMasks", "ScoreImages", "unpack_histograms", "unpack_hits"]

_VIEW = ("view_x0", "view_y0", "view_x1", "view_y1")
_COLUMNS = (
    *("image_id", "uri", "label", "width", "height", *_VIEW),
    *("class_id", "rank", "method", "heatmap"),
)

_HITS_BYTES = (4 * LEVELS + 7) // 8


class Labelled(NamedTuple):
    """What a shard says of one image and its labelled class.

    Attributes:
        image_id, uri, label: as in the manifest.
        size: width and height of the image.
        view: float `[4]`.
        top1: whether the labelled class is the top class.
        methods: the methods with a map of this class; none if it was not explained.
        heatmaps: `[methods, h, w]`, raw.
        relu: bool `[methods]`.
    """

    image_id: int
    uri: str
    label: int
    size: tuple[int, int]
    view: np.ndarray
    top1: bool
    methods: list[str]
    heatmaps: np.ndarray
    relu: np.ndarray

    @property
    def rectified(self) -> np.ndarray:
        """The heatmaps with the ReLU of their methods applied."""
        return np.where(self.relu[:, None, None], self.heatmaps.clip(min=0), self.heatmaps)


@dataclass(frozen=True)
class _Measure(ABC):
    """Reads shards and measures the images that have a truth.

    Attributes:
        load: gets the truth.
        methods: those of the network.
        with_relu: those whose maps get a ReLU first.
        input_size: height and width of the network's input.
    """

    load: Callable[[], Any]
    methods: Sequence[str]
    with_relu: Collection[str]
    input_size: tuple[int, int]
    schema: ClassVar[pa.Schema]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Measure the images of some shards; takes the column `shard`, their paths."""
        truth = self.load()
        rows = [
            {"image_id": image.image_id, **row}
            for shard in batch["shard"].to_pylist()
            for image in _labelled(shard, truth.wanted, self.with_relu)
            for row in self.rows(image, truth)
        ]
        return pa.Table.from_pylist(rows, self.schema)

    @abstractmethod
    def rows(self, image: Labelled, truth: Any) -> Iterator[Row]:
        """The measures of one image, one row per method and baseline."""

    def claims(self, image: Labelled) -> Iterator[tuple[str, Claim]]:
        """What each method, and each baseline, says of an image."""
        views = np.tile(image.view, (len(image.methods), 1))
        located = [
            localize(image.heatmaps, image.relu, views, self.input_size, threshold)
            for threshold in FIXED_THRESHOLDS
        ]
        fixed = np.stack([boxes for _, boxes in located], axis=1)
        for index, (method, heatmap) in enumerate(zip(image.methods, image.rectified, strict=True)):
            gray = quantise(score_map(heatmap))
            yield method, Claim(gray, fixed[index], located[0].peaks[index], positive_part(heatmap))
        for name in BASELINES:
            yield name, baseline(name, image.view)


class MeasureBoxes(_Measure):
    """Hits at all levels, and the other measures against boxes.

    They are null where the labelled class has no map, and where the view shows no object.
    """

    schema = pa.schema(
        [
            ("image_id", pa.int64()),
            ("method", pa.string()),
            ("mapped", pa.bool_()),
            ("inside", pa.int32()),
            ("outside", pa.int32()),
            ("top1", pa.bool_()),
            ("hits", pa.binary()),
            ("iou_15", pa.float64()),
            ("iou_20", pa.float64()),
            ("peak_distance", pa.float64()),
            ("energy", pa.float64()),
        ]
    )

    def rows(self, image: Labelled, truth: BoxTruth) -> Iterator[Row]:
        """As in `_Measure`."""
        shown = truth_in_view(truth.of(image.image_id), image.view)
        common = {
            "mapped": bool(image.methods),
            "inside": len(shown.boxes),
            "outside": shown.outside,
            "top1": image.top1,
        }
        if not image.methods or not len(shown.boxes):
            for method in (*self.methods, *BASELINES):
                yield {"method": method, **common}
            return
        for method, claim in self.claims(image):
            boxes = baseline_sweep(method) if method in BASELINES else sweep(claim.gray)
            right = np.packbits(hits(boxes, shown)).tobytes()
            yield {"method": method, **common, "hits": right, **_scores(claim, shown)}


def unpack_hits(column: pa.ChunkedArray) -> np.ndarray:
    """The column `hits` as bool `[rows, 4, 255]`, False where it is null."""
    packed = b"".join(column.fill_null(bytes(_HITS_BYTES)).to_pylist())
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8).reshape(-1, _HITS_BYTES), axis=1)
    return bits[:, : 4 * LEVELS].reshape(-1, 4, LEVELS).astype(bool)


@dataclass(frozen=True)
class ScoreImages(_Measure):
    """The table of images: overlaps at the levels that are best on the data set.

    Attributes:
        levels: by method, those of MaxBoxAcc and of MaxBoxAccV2 at IoU 0.5.
    """

    levels: Mapping[str, tuple[int, int]]
    schema = IMAGE_SCORES

    def rows(self, image: Labelled, truth: BoxTruth) -> Iterator[Row]:
        """As in `_Measure`."""
        shown = truth_in_view(truth.of(image.image_id), image.view)
        if not image.methods or not len(shown.boxes):
            return
        for method, claim in self.claims(image):
            best, best_any = ious_at(claim.gray, self.levels[method], shown)
            yield {
                "uri": image.uri,
                "class_id": image.label,
                "method": method,
                "top1": image.top1,
                "iou": best,
                "iou_any": best_any,
                **_scores(claim, shown),
            }


class MeasureMasks(_Measure):
    """Histograms of scores inside and outside of masks, null where there is nothing to measure."""

    schema = pa.schema(
        [
            ("image_id", pa.int64()),
            ("method", pa.string()),
            ("mapped", pa.bool_()),
            ("readable", pa.bool_()),
            ("histograms", pa.binary()),
        ]
    )

    def rows(self, image: Labelled, truth: MaskTruth) -> Iterator[Row]:
        """As in `_Measure`."""
        mask = _decode_mask(read_bytes(truth.of(image.uri)))
        common = {"mapped": bool(image.methods), "readable": mask is not None}
        if mask is None or not image.methods:
            for method in (*self.methods, *BASELINES):
                yield {"method": method, **common}
            return
        shown = mask_in_view(mask, image.size, image.view)
        maps = dict(zip(image.methods, image.rectified, strict=True))
        for method, heatmap in {**maps, **{name: baseline_map(name) for name in BASELINES}}.items():
            counts = score_histograms(score_map(heatmap), shown).astype(np.uint16)
            yield {"method": method, **common, "histograms": counts.tobytes()}


def unpack_histograms(column: pa.ChunkedArray) -> np.ndarray:
    """The column `histograms`, which has no nulls, as uint16 `[rows, 2, 1002]`."""
    packed = b"".join(column.to_pylist())
    return np.frombuffer(packed, dtype=np.uint16).reshape(-1, 2, len(SCORE_EDGES) - 1)


def _decode_mask(data: bytes) -> np.ndarray | None:
    """The pixels of a gray image; None if it is none."""
    if not data:
        return None
    mask = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    return mask if mask is not None and mask.ndim == 2 else None


def _scores(claim: Claim, truth: Truth) -> Row:
    iou_15, iou_20 = fixed_ious(claim.fixed, truth)
    return {
        "iou_15": iou_15,
        "iou_20": iou_20,
        "peak_distance": peak_distance(claim.peak, truth),
        "energy": energy_inside(claim.energy, truth),
    }


def _labelled(shard: str, wanted: np.ndarray, with_relu: Collection[str]) -> Iterator[Labelled]:
    """The wanted images of a shard, each with the maps of its labelled class."""
    filesystem, path = locate(shard)
    with filesystem.open_input_file(path) as file:
        table = pyarrow.parquet.ParquetFile(file).read(_COLUMNS)
    table = table.filter(pa.array(wanted[table["image_id"].to_numpy()]))
    if not len(table):
        return
    ids, firsts = np.unique(table["image_id"].to_numpy(), return_index=True)
    images = table.drop_columns(["heatmap"]).take(firsts).to_pylist()
    maps = table.filter(pc.equal(table["class_id"], table["label"]))
    heatmaps = maps["heatmap"].combine_chunks().to_numpy_ndarray().astype(np.float32)
    methods = np.array(maps["method"].to_pylist(), dtype=object)
    relu = np.array([method in with_relu for method in methods], dtype=bool)
    top1 = maps["rank"].fill_null(0).to_numpy() == 1
    owners = maps["image_id"].to_numpy()
    for image_id, image in zip(ids.tolist(), images, strict=True):
        own = np.flatnonzero(owners == image_id)
        yield Labelled(
            image_id,
            image["uri"],
            image["label"],
            (image["width"], image["height"]),
            np.array([image[name] for name in _VIEW], dtype=np.float32),
            bool(top1[own].any()),
            methods[own].tolist(),
            heatmaps[own],
            relu[own],
        )
