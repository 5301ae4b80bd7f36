"""What the tables of images of a pass come to: its proof, the means over images, the curves."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from scacam.errors import RunError
from scacam.evaluation.intervals import Row, dealt, summarise
from scacam.evaluation.metrics import State
from scacam.evaluation.tables import placed
from scacam.runs.proof import Proof
from scacam.runs.shards import shards_of
from scacam.storage import locate
from scacam.storage.parquet import read_columns
from scacam.tables import INDEX
from scacam.trials.metrics import BASELINES, CURVES, METRICS
from scacam.trials.tables import (
    ERRORS,
    FAITHFULNESS,
    FAITHFULNESS_CURVES,
    FAITHFULNESS_DIFFERENCES,
    images_folder,
)

__all__ = ["TABLES", "prove", "summary"]

TABLES = {
    "faithfulness": FAITHFULNESS,
    "faithfulness_differences": FAITHFULNESS_DIFFERENCES,
    "faithfulness_curves": FAITHFULNESS_CURVES,
}
"""What a pass comes to, by the names of the tables in `OUT/metrics`."""


def prove(folder: str, image_ids: np.ndarray, networks: Mapping[str, int]) -> Proof:
    """Check that every image is once in the table of every network, or once in the errors.

    Args:
        folder: `OUT/metrics`.
        image_ids: of the images of the pass, sorted.
        networks: by name, how many rows an image has.

    Raises:
        RunError: it is not so.
    """
    filesystem, _ = locate(folder)
    index: list[dict[str, object]] = []
    errors: Counter[str] = Counter()

    def ids_in(inside: str, network: str | None, rows: int) -> np.ndarray:
        found = [np.empty(0, dtype=np.int64)]
        for shard in shards_of(folder, inside):
            columns = ["image_id"] if network else ["image_id", "error"]
            table = read_columns(filesystem, shard.path, columns)
            ids = table["image_id"].to_numpy()
            if len(ids):
                found.append(ids[::rows])
                counted = {"rows": len(ids), "images": len(found[-1]), "bytes": shard.size}
                ends = {"first_image_id": int(ids.min()), "last_image_id": int(ids.max())}
                path = f"{inside}/{shard.base_name}"
                index.append({"path": path, "network": network, **counted, **ends})
            if not network:
                errors.update(table["error"].to_pylist())
        return np.concatenate(found)

    failed = ids_in(ERRORS, None, 1)
    for network, rows in networks.items():
        found = ids_in(images_folder(network), network, rows)
        if not np.array_equal(np.sort(np.concatenate([found, failed])), image_ids):
            raise RunError(
                f"{folder} is not whole: {len(found):,} images tried by {network} and "
                f"{len(failed):,} errors are not the {len(image_ids):,} images of the pass"
            )
    return Proof(len(image_ids) - len(failed), errors, pa.Table.from_pylist(index, INDEX))


def summary(
    folder: str,
    network: str,
    methods: Mapping[str, tuple[str | None, str]],
    metrics: Sequence[str],
    image_ids: np.ndarray,
) -> dict[str, list[Row]]:
    """What the table of images of a network comes to: rows of `TABLES`, none without images.

    Args:
        folder: `OUT/metrics`.
        network: the network.
        methods: by the names of claimants their layer and method.
        metrics: names of those that were measured.
        image_ids: of all images of the run, sorted.

    Raises:
        RunError: a file has other methods.
    """
    places = {**methods, **{name: (None, name) for name in BASELINES}}
    claimants, listed = list(places), [method for _, method in places.values()]
    groups = dealt(len(image_ids))
    curves: dict[str, np.ndarray] = {}
    filesystem, _ = locate(folder)

    def states() -> Iterator[State]:
        for shard in shards_of(folder, images_folder(network)):
            columns = ["image_id", "method", *metrics, *CURVES]
            table = read_columns(filesystem, shard.path, columns)
            images = len(table) // len(claimants)
            if table["method"].to_pylist() != listed * images:
                raise RunError(f"{shard.path} has other methods than {', '.join(claimants)}")
            for name in CURVES:
                if not table[name].null_count:
                    flat = table[name].combine_chunks().flatten().to_numpy()
                    sums = flat.reshape(images, len(claimants), -1).sum(0, dtype=np.float64)
                    curves[name] = curves.get(name, 0) + sums
            values = {name: table[name].to_numpy().reshape(images, -1) for name in metrics}
            ids = table["image_id"].to_numpy()[:: len(claimants)]
            yield State.update(groups[np.searchsorted(image_ids, ids)], values)

    state = State.merge(states(), int(groups.max()) + 1)
    count = int(state.images.sum())
    if not count:
        return {name: [] for name in TABLES}
    rows, pairs = summarise(state, claimants, metrics, table=METRICS)
    points: list[Row] = [
        {"method": claimant, "curve": name, "share": share, "probability": probability}
        for name, sums in curves.items()
        for claimant, curve in zip(claimants, (sums / count).tolist(), strict=True)
        for share, probability in zip(_shares(name, len(curve)), curve, strict=True)
    ]
    return {
        name: placed(network, of_table, places)
        for name, of_table in zip(TABLES, (rows, pairs, points), strict=True)
    }


def _shares(curve: str, points: int) -> list[float]:
    """The shares of pixels at the points of a curve; ROAD's have no ends."""
    if curve in ("morf", "lerf"):
        return [point / (points + 1) for point in range(1, points + 1)]
    return [point / (points - 1) for point in range(points)]
