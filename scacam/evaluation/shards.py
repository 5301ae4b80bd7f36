"""From shards of explanations to sums over their images: what the tasks of an evaluation do.

Of each image the maps of the labelled class are looked at, and no others. Whether the top class is
right as well is known from the rank of the labelled one.

Against boxes there are two passes. The first counts hits at all thresholds; once the best ones are
known, the second measures every image at these, so that no state holds all thresholds of all
groups.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.evaluation.bounds import reached
from scacam.evaluation.measures import (
    FIXED_THRESHOLDS,
    MEASURES,
    Claim,
    InView,
    baseline,
    baseline_map,
    baseline_sweep,
    in_view,
    mask_in_view,
    positive_part,
    score_histograms,
)
from scacam.evaluation.metrics import SWEPT, State, hits, swept, values
from scacam.evaluation.sweep import (
    LEVELS,
    RIGHT_IOU,
    Sweep,
    best_ious,
    quantise,
    score_map,
    search,
)
from scacam.evaluation.tables import IMAGE_SCORES
from scacam.evaluation.truth import MaskFiles, TrueBoxes
from scacam.localization import localize
from scacam.storage import join, locate, read_bytes
from scacam.storage.parquet import read_columns, write_table
from scacam.tables import stacked

__all__ = ["CountHits", "MeasureMasks", "Part", "ScoreImages"]

_VIEW = ("view_x0", "view_y0", "view_x1", "view_y1")
_COLUMNS = (
    *("image_id", "uri", "label", "width", "height", *_VIEW),
    *("class_id", "rank", "method", "heatmap"),
)


_SWEPT = [(metric.name, overlap) for metric, overlap in SWEPT]
_LARGEST = _SWEPT.index(("max_box_acc", RIGHT_IOU))
_LIMITS = sorted({overlap for _, overlap in SWEPT})
_ANY = _SWEPT.index(("max_box_acc_v2", RIGHT_IOU))


class Labelled(NamedTuple):
    """What a shard says of one image and its labelled class.

    Attributes:
        image_id, uri, label: as in the manifest.
        size: width and height of the image.
        view: float `[4]`.
        top1: whether the labelled class is the top class.
        heatmaps: `[methods, h, w]`, raw; None if this class was not explained.
    """

    image_id: int
    uri: str
    label: int
    size: tuple[int, int]
    view: np.ndarray
    top1: bool
    heatmaps: np.ndarray | None


class Part(NamedTuple):
    """What a shard comes to.

    Attributes:
        counts: its images that have a truth, by what became of them.
        state: the sums over those that count.
    """

    counts: Counter[str]
    state: State


@dataclass(frozen=True)
class _Stage(ABC):
    """Reads a shard and sums up its images that have a truth.

    M are the methods, and behind them the baselines.

    Attributes:
        load: gets the truth, and the groups of all images, `[images]`.
        layer: whose shards these are.
        methods: those of the layer.
        baselines: of `measures.BASELINES`, those to be measured beside them.
        with_relu: those whose maps get a ReLU first.
        input_size: height and width of the network's input.
    """

    load: Callable[[], tuple[Any, np.ndarray]]
    layer: str
    methods: Sequence[str]
    baselines: Sequence[str]
    with_relu: Collection[str]
    input_size: tuple[int, int]

    def __call__(self, shard: str) -> Part:
        """Measure the images of one shard."""
        truth, groups = self.load()
        counts: Counter[str] = Counter()
        images, found = [], []
        for image in _labelled(shard, truth.image_ids, self.methods):
            counts["images"] += 1
            counts["unmapped"] += image.heatmaps is None
            measured = self.measure(image, truth, counts)
            if measured is not None:
                images.append(image)
                found.append(measured)
        if not images:
            return Part(counts, State.update(np.empty(0, np.int64), {}))
        columns = {name: np.stack([one[name] for one in found]) for name in found[0]}
        chosen = groups[[image.image_id for image in images]]
        return Part(counts, self.summed(shard, images, columns, chosen))

    @abstractmethod
    def measure(
        self, image: Labelled, truth: Any, counts: Counter[str]
    ) -> dict[str, np.ndarray] | None:
        """What is measured of an image, `[M, …]` each; None, and counted, if it does not count."""

    @abstractmethod
    def summed(
        self,
        shard: str,
        images: Sequence[Labelled],
        columns: dict[str, np.ndarray],
        groups: np.ndarray,
    ) -> State:
        """The sums over N images of what was measured of them, `[N, M, …]` each."""

    @property
    def relu(self) -> np.ndarray:
        """Whether the maps of each method get a ReLU: bool `[methods]`."""
        return np.array([method in self.with_relu for method in self.methods], dtype=bool)

    def _distinct(self, keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """The first of each key, and for each key which of these it has; behind them the baselines.

        Networks that pool globally have several methods with the same maps.
        """
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        order = sorted(first.values())
        places = [order.index(first[key]) for key in keys]
        return order, places + [len(order) + index for index in range(len(self.baselines))]


class CountHits(_Stage):
    """Against boxes, the first pass: how many images have a hit, at each threshold.

    The state has one group and `hits`, `[M, 2, 4, 255]`, of the metrics of `metrics.SWEPT` and of
    their twins. An image without a map of its labelled class has none.
    """

    def measure(
        self, image: Labelled, truth: TrueBoxes, counts: Counter[str]
    ) -> dict[str, np.ndarray] | None:
        """As in `_Stage`."""
        shown = in_view(truth.of(image.image_id), image.view)
        counts["outside"] += shown.outside
        if not len(shown.boxes):
            counts["blind"] += 1
            return None
        if image.heatmaps is None:
            return {
                "hits": np.zeros(
                    (len(self.methods) + len(self.baselines), len(SWEPT), LEVELS), bool
                )
            }
        maps = _rectified(image.heatmaps, self.relu)
        first, places = self._distinct([heatmap.tobytes() for heatmap in maps])
        grays = [quantise(score_map(maps[index])) for index in first]
        overlaps = [reached(gray, shown.pixels, _LIMITS) for gray in grays]
        overlaps += [best_ious(baseline_sweep(name), shown.pixels) for name in self.baselines]
        found = [hits({"iou": largest, "iou_any": best}) for largest, best in overlaps]
        return {"hits": np.stack(found)[places]}

    def summed(
        self,
        shard: str,
        images: Sequence[Labelled],
        columns: dict[str, np.ndarray],
        groups: np.ndarray,
    ) -> State:
        """As in `_Stage`."""
        right = np.array([image.top1 for image in images])[:, None, None, None]
        both = np.stack([columns["hits"], columns["hits"] & right], axis=2)
        return State.update(np.zeros_like(groups), {"hits": both})


@dataclass(frozen=True)
class ScoreImages(_Stage):
    """Against boxes, the second pass: the sums of all metrics, and the table of images.

    Attributes:
        levels: int `[M, 2, 4]`, where the metrics of `metrics.SWEPT` and their twins are best.
        known: whether all images have a map of their labelled class.
        folder: where the table goes, a file for each shard.
    """

    levels: np.ndarray
    known: bool
    folder: str

    def measure(
        self, image: Labelled, truth: TrueBoxes, counts: Counter[str]
    ) -> dict[str, np.ndarray] | None:
        """As in `_Stage`: the `MEASURES`, and `best`, the overlaps at these levels."""
        shown = in_view(truth.of(image.image_id), image.view)
        if not len(shown.boxes):
            return None
        if image.heatmaps is None:
            nothing = np.full(self.levels.shape, np.nan)
            return {"best": nothing, **dict.fromkeys(MEASURES, nothing[:, 0, 0])}
        relu, views = self.relu, np.tile(image.view, (len(self.methods), 1))
        first, places = self._distinct(
            [
                b"".join((heatmap.tobytes(), flag.tobytes(), levels.tobytes()))
                for heatmap, flag, levels in zip(image.heatmaps, relu, self.levels, strict=False)
            ]
        )
        heatmaps, relu = image.heatmaps[first], relu[first]
        located = [
            localize(heatmaps, relu, views[first], self.input_size, threshold)
            for threshold in FIXED_THRESHOLDS
        ]
        fixed = np.stack([boxes for _, boxes in located], axis=1)
        claims, best = [], []
        for index, heatmap in enumerate(_rectified(heatmaps, relu)):
            gray, peak = quantise(score_map(heatmap)), located[0].peaks[index]
            claims.append(Claim(fixed[index], peak, positive_part(heatmap)))
            levels = self.levels[first[index]]
            distinct, where = np.unique(levels, return_inverse=True)
            boxes = search(gray, distinct.tolist())
            best.append(_overlaps(boxes, shown, where.reshape(levels.shape)))
        for name, levels in zip(self.baselines, self.levels[len(self.methods) :], strict=True):
            claims.append(baseline(name, image.view))
            best.append(_overlaps(baseline_sweep(name), shown, levels))
        columns = {
            name: np.array([measure(claim, shown) for claim in claims])
            for name, measure in MEASURES.items()
        }
        return {
            name: column[places] for name, column in {**columns, "best": np.stack(best)}.items()
        }

    def summed(
        self,
        shard: str,
        images: Sequence[Labelled],
        columns: dict[str, np.ndarray],
        groups: np.ndarray,
    ) -> State:
        """As in `_Stage`; also writes the table."""
        self._write(shard, images, columns)
        top1 = np.array([image.top1 for image in images])
        best = columns.pop("best")
        return State.update(groups, values("boxes", columns, top1, best))

    def _write(
        self, shard: str, images: Sequence[Labelled], columns: dict[str, np.ndarray]
    ) -> None:
        """A row per image and method, of the images with a map of their labelled class."""
        mapped = [index for index, image in enumerate(images) if image.heatmaps is not None]
        if not mapped:
            return
        methods = [*self.methods, *self.baselines]
        layers = [*[self.layer] * len(self.methods), *[None] * len(self.baselines)]
        best = columns["best"][:, :, 0 if self.known else 1]
        scores = {"iou": best[..., _LARGEST], "iou_any": best[..., _ANY], **columns}
        rows: dict[str, Any] = {
            "image_id": np.repeat([images[index].image_id for index in mapped], len(methods)),
            "uri": [images[index].uri for index in mapped for _ in methods],
            "class_id": np.repeat([images[index].label for index in mapped], len(methods)),
            "method": methods * len(mapped),
            "layer": layers * len(mapped),
            "top1": np.repeat([images[index].top1 for index in mapped], len(methods)),
        }
        rows |= {name: scores[name][mapped].ravel() for name in IMAGE_SCORES.names[len(rows) :]}
        arrays = [pa.array(rows[field.name], field.type) for field in IMAGE_SCORES]
        # Those of other layers are called alike, and a name that begins with _ would be hidden.
        name = shard.rpartition("/")[2].replace(".parquet", f"-{self.layer}.parquet")
        write_table(join(self.folder, name), pa.table(arrays, schema=IMAGE_SCORES))


class MeasureMasks(_Stage):
    """Against masks: the sums of all metrics."""

    def measure(
        self, image: Labelled, truth: MaskFiles, counts: Counter[str]
    ) -> dict[str, np.ndarray] | None:
        """As in `_Stage`: the histograms of scores."""
        mask = _decode_mask(read_bytes(truth.of(image.uri)))
        if mask is None:
            counts["unreadable"] += 1
        if mask is None or image.heatmaps is None:
            return None
        shown = mask_in_view(mask, image.size, image.view)
        maps = [*_rectified(image.heatmaps, self.relu), *map(baseline_map, self.baselines)]
        found = [score_histograms(score_map(heatmap), shown) for heatmap in maps]
        return {"histograms": np.stack(found).astype(np.uint32)}

    def summed(
        self,
        shard: str,
        images: Sequence[Labelled],
        columns: dict[str, np.ndarray],
        groups: np.ndarray,
    ) -> State:
        """As in `_Stage`."""
        top1 = np.array([image.top1 for image in images])
        return State.update(groups, values("masks", columns, top1))


def _labelled(shard: str, wanted: np.ndarray, methods: Sequence[str]) -> Iterator[Labelled]:
    """The images of a shard whose ids are wanted, each with the maps of its labelled class."""
    table = read_columns(*locate(shard), _COLUMNS)
    table = table.filter(pa.array(_are_in(table["image_id"].to_numpy(), wanted)))
    ids, firsts = np.unique(table["image_id"].to_numpy(), return_index=True)
    if not len(ids):
        return
    images = table.drop_columns(["heatmap"]).take(firsts).to_pylist()
    views = stacked(table, _VIEW)[firsts]
    maps = table.filter(pc.equal(table["class_id"], table["label"]))
    heatmaps = maps["heatmap"].combine_chunks().to_numpy_ndarray().astype(np.float32)
    places = {method: place for place, method in enumerate(methods)}
    order = np.array([places[method] for method in maps["method"].to_pylist()], dtype=np.int64)
    top1 = maps["rank"].fill_null(0).to_numpy() == 1
    owners = maps["image_id"].to_numpy()
    for image, image_id, view in zip(images, ids.tolist(), views, strict=True):
        own = np.flatnonzero(owners == image_id)
        yield Labelled(
            image_id,
            image["uri"],
            image["label"],
            (image["width"], image["height"]),
            view,
            bool(top1[own].any()),
            heatmaps[own[np.argsort(order[own])]] if len(own) else None,
        )


def _are_in(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which ids are among sorted ones, of which there may be millions: bool `[N]`."""
    places = np.searchsorted(wanted, ids).clip(max=len(wanted) - 1)
    return wanted[places] == ids


def _rectified(heatmaps: np.ndarray, relu: np.ndarray) -> np.ndarray:
    """Maps `[methods, h, w]` with the ReLU of their methods applied."""
    return np.where(relu[:, None, None], heatmaps.clip(min=0), heatmaps)


def _overlaps(boxes: Sweep, shown: InView, levels: np.ndarray) -> np.ndarray:
    """The overlaps of `metrics.SWEPT`, each at a level of its own: `[2, 4]`, as the levels."""
    largest, any_contour = best_ious(boxes, shown.pixels)
    by_level = swept({"iou": largest[levels], "iou_any": any_contour[levels]})
    return np.diagonal(by_level, axis1=-2, axis2=-1)


def _decode_mask(data: bytes) -> np.ndarray | None:
    """The pixels of a gray image; None if it is none."""
    if not data:
        return None
    mask = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    return mask if mask is not None and mask.ndim == 2 else None
