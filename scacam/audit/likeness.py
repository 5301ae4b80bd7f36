"""How alike heatmaps of the same images are: those of two networks, of two methods, of two runs.

Arrays in, arrays out; only `top_maps` reads, and needs neither torch nor Ray.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.errors import RunError
from scacam.runs.results import Run

__all__ = [
    "COMPARISON",
    "Likeness",
    "Ranking",
    "TopMaps",
    "box_iou",
    "compare_runs",
    "energy",
    "likeness",
    "pair_networks",
    "standard_ranks",
    "top_maps",
]

_GRID = 16
_AT_ONCE = 4096

COMPARISON = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        ("image_id_a", pa.int64()),
        ("image_id_b", pa.int64()),
        ("network_a", pa.string()),
        ("network_b", pa.string()),
        ("method", pa.string()),
        ("label", pa.int32()),
        ("class_id_a", pa.int32()),
        ("class_id_b", pa.int32()),
        ("class_name_a", pa.string()),
        ("class_name_b", pa.string()),
        ("probability_a", pa.float32()),
        ("probability_b", pa.float32()),
        ("changed", pa.bool_()),
        ("moved", pa.float32()),
        ("rank_correlation", pa.float32()),
        ("box_iou", pa.float32()),
    ]
)
"""One row per image, pair of networks and method: the top classes of two runs, and their maps."""


class TopMaps(NamedTuple):
    """The heatmaps of the top class of N images, by one network and one method.

    Attributes:
        rows: the other columns of these explanations, by rising image id.
        heatmaps: float32 `[N, h, w]`, signed, before any ReLU, the largest magnitude of each 1.
    """

    rows: pa.Table
    heatmaps: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """One column as an array; what is null is NaN."""
        return self.rows[name].to_numpy()

    def rectangles(self, kind: str) -> np.ndarray:
        """`view` or `box` as float32 `[N, 4]`: x0, y0, x1, y1; NaN where there is none."""
        corners = [self.column(f"{kind}_{side}") for side in ("x0", "y0", "x1", "y1")]
        return np.stack(corners, axis=1).astype(np.float32)

    def of(self, image_ids: np.ndarray) -> "TopMaps":
        """Only these images, which must be among them, in this order."""
        places = np.searchsorted(self.column("image_id"), image_ids)
        return TopMaps(self.rows.take(places), self.heatmaps[places])


class Likeness(NamedTuple):
    """How alike two heatmaps of each of N images are. NaN where a map is constant or has no box.

    Attributes:
        moved: share of the positive map that lies elsewhere in the other one, 0 to 1: half the
            sum of the absolute differences of the two, each with sum 1.
        rank_correlation: Spearman's, of the raw maps, −1 to 1.
        box_iou: intersection over union of the boxes.
    """

    moved: np.ndarray
    rank_correlation: np.ndarray
    box_iou: np.ndarray


class Ranking:
    """The few rows with the largest scores of however many are added."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: list[dict[str, Any]] = []

    def add(self, scores: np.ndarray, rows: pa.Table, **columns: np.ndarray) -> None:
        """Add N rows with their scores and further columns; those with NaN scores do not count."""
        known = np.flatnonzero(np.isfinite(scores))
        best = known[np.argsort(-scores[known], kind="stable")[: self.size]]
        for place, row in zip(best, rows.take(best).to_pylist(), strict=True):
            extra = {name: float(values[place]) for name, values in columns.items()}
            self.entries.append({**row, "score": float(scores[place]), **extra})
        self.entries.sort(key=lambda entry: -entry["score"])
        del self.entries[self.size :]


def top_maps(run: Run, network: str, image_ids: np.ndarray) -> dict[str, TopMaps]:
    """Read the heatmaps of the top class of some images, by method, of which none may be missing.

    Images that are not in the run are left out.
    """
    if not len(image_ids):
        return {}
    field = pc.field("image_id")
    these = (field >= int(image_ids.min())) & (field <= int(image_ids.max()))
    if len(image_ids) <= image_ids.max() - image_ids.min():
        these = these & field.isin(pa.array(image_ids))
    table = run.explanations(network, where=(pc.field("rank") == 1) & these).to_table()
    found = {}
    for method in run.networks[network]["methods"]:
        rows = table.filter(pc.field("method") == method).sort_by("image_id")
        packed = rows["heatmap"].combine_chunks()
        values = packed.storage.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        found[method] = TopMaps(
            rows.drop_columns("heatmap"), values.reshape(len(rows), *packed.type.shape)
        )
    return found


def energy(heatmaps: np.ndarray) -> np.ndarray:
    """The positive part of maps `[..., h, w]`, divided by its sum; all zero where there is none."""
    positive = heatmaps.clip(min=0)
    total = positive.sum((-2, -1), keepdims=True)
    return positive / np.where(total > 0, total, 1)


def likeness(first: TopMaps, second: TopMaps) -> Likeness:
    """Compare the maps of the same images in the same order, where their views overlap."""
    views = first.rectangles("view"), second.rectangles("view")
    area = np.concatenate(
        [np.maximum(views[0], views[1])[:, :2], np.minimum(views[0], views[1])[:, 2:]], axis=1
    )
    raw = [
        _sampled(maps.heatmaps, view, area)
        for maps, view in zip((first, second), views, strict=True)
    ]
    shares = [energy(sample) for sample in raw]
    moved = np.abs(shares[0] - shares[1]).sum((1, 2)) / 2
    moved[~(shares[0].any((1, 2)) & shares[1].any((1, 2)))] = np.nan
    flat = [sample.reshape(len(sample), _GRID**2) for sample in raw]
    return Likeness(
        moved,
        (standard_ranks(flat[0]) * standard_ranks(flat[1])).sum(-1),
        box_iou(first.rectangles("box"), second.rectangles("box")),
    )


def _sampled(heatmaps: np.ndarray, views: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Bilinear samples of maps `[N, h, w]` on an even grid over areas `[N, 4]` of the images."""
    steps = (np.arange(_GRID) + 0.5) / _GRID
    matrices = []
    for axis, length in ((1, heatmaps.shape[1]), (0, heatmaps.shape[2])):
        low, high = area[:, axis, None], area[:, axis + 2, None]
        start, end = views[:, axis, None], views[:, axis + 2, None]
        cells = (low + steps * (high - low) - start) / (end - start) * length - 0.5
        cells = cells.clip(0, length - 1)[..., None]
        matrices.append((1 - np.abs(cells - np.arange(length))).clip(min=0))
    return matrices[0] @ heatmaps @ matrices[1].transpose(0, 2, 1)


def standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis with mean 0 and length 1; NaN where all values are equal.

    Equal values share the mean of their ranks. The sum of the product of two is Spearman's rank
    correlation.
    """
    # Ties are ranked in order from the left and in order from the right; the mean is the same.
    left = values.argsort(-1, kind="stable").argsort(-1, kind="stable")
    right = values[..., ::-1].argsort(-1, kind="stable").argsort(-1, kind="stable")[..., ::-1]
    centred = (left + right) / 2 - (values.shape[-1] - 1) / 2
    length = np.sqrt((centred**2).sum(-1, keepdims=True))
    return centred / np.where(length > 0, length, np.nan)


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of half-open boxes `[..., 4]`; NaN where there is no box."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clip(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


def pair_networks(first: Run, second: Run) -> list[tuple[str, str]]:
    """Which network of one run is compared with which of the other.

    Those of the same name; or the only ones of the runs, whatever their names.

    Raises:
        RunError: there is no such pair.
    """
    if len(first.networks) == len(second.networks) == 1:
        return [(next(iter(first.networks)), next(iter(second.networks)))]
    pairs = [(name, name) for name in first.networks if name in second.networks]
    if not pairs:
        raise RunError(
            f"no network is in both runs: {first.path} has {', '.join(first.networks)}; "
            f"{second.path} has {', '.join(second.networks)}"
        )
    return pairs


def compare_runs(first: Run, second: Run) -> Iterator[pa.Table]:
    """Compare what two runs say of the same images, matched by uri, a few thousand at a time.

    Returns:
        Tables of the schema `COMPARISON`, each of one pair of networks and one method.

    Raises:
        RunError: no network, method or image is in both runs.
    """
    networks = pair_networks(first, second)
    methods = [name for name in first.methods if name in second.methods]
    if not methods:
        raise RunError(f"no method is in both {first.path} and {second.path}")
    images = _shared_images(first, second)
    if not len(images):
        raise RunError(f"no uri is in both {first.path} and {second.path}")
    return _comparisons((first, second), networks, methods, images)


def _comparisons(
    runs: tuple[Run, Run],
    networks: list[tuple[str, str]],
    methods: list[str],
    images: np.ndarray,
) -> Iterator[pa.Table]:
    for start in range(0, len(images), _AT_ONCE):
        ids = images[start : start + _AT_ONCE].T
        for names in networks:
            found = [top_maps(*wanted) for wanted in zip(runs, names, ids, strict=True)]
            for method in methods:
                if all(method in maps for maps in found):
                    maps = [each[method] for each in found]
                    both = np.isin(ids[0], maps[0].column("image_id"))
                    both &= np.isin(ids[1], maps[1].column("image_id"))
                    yield _comparison(maps[0].of(ids[0][both]), maps[1].of(ids[1][both]), names)


def _shared_images(first: Run, second: Run) -> np.ndarray:
    """The ids of the images that are in both runs, by uri: int64 `[N, 2]`, by rising first id."""
    if first.manifest["uri"].equals(second.manifest["uri"]):
        ids = first.manifest["image_id"].to_numpy()
        return np.stack([ids, second.manifest["image_id"].to_numpy()], axis=1)
    place = pc.index_in(first.manifest["uri"], second.manifest["uri"].combine_chunks())
    found = first.manifest.filter(pc.is_valid(place))
    others = second.manifest["image_id"].take(place.drop_null())
    return np.stack([found["image_id"].to_numpy(), others.to_numpy()], axis=1)


def _comparison(first: TopMaps, second: TopMaps, networks: tuple[str, str]) -> pa.Table:
    alike = likeness(first, second)
    count = len(first.rows)
    columns = {"uri": first.rows["uri"], "method": first.rows["method"]}
    columns["label"] = first.rows["label"]
    for suffix, maps, network in zip("ab", (first, second), networks, strict=True):
        columns[f"network_{suffix}"] = pa.repeat(network, count)
        for name in ("image_id", "class_id", "class_name", "probability"):
            columns[f"{name}_{suffix}"] = maps.rows[name]
    columns["changed"] = pc.not_equal(columns["class_id_a"], columns["class_id_b"])
    for name, values in alike._asdict().items():
        columns[name] = pa.array(values.astype(np.float32), from_pandas=True)
    return pa.table({name: columns[name] for name in COMPARISON.names}).cast(COMPARISON)
