"""Two runs of the same images: how alike their maps are, one row per image."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.audit.likeness import alike, energy, sampled
from scacam.audit.maps import TopMaps, top_maps
from scacam.errors import RunError
from scacam.runs.record import same_classes
from scacam.runs.results import Claimant, Run

__all__ = ["COMPARISON", "Compared", "compare_runs", "pair_claimants", "pair_networks"]

_AT_ONCE = 4096

COMPARISON = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        ("image_id_a", pa.int64()),
        ("image_id_b", pa.int64()),
        ("network_a", pa.string()),
        ("network_b", pa.string()),
        ("method", pa.string()),
        ("layer_a", pa.string()),
        ("layer_b", pa.string()),
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
"""One row per image, pair of networks, method and pair of its layers: the top classes of two runs,
and their maps. `changed` is null where a class id does not mean the same to both networks."""


class Compared(NamedTuple):
    """Some images, by one pair of networks and of claimants.

    Attributes:
        table: of the schema `COMPARISON`.
        shares: the positive maps of both runs where their views overlap, each with sum 1:
            `[2, images, 16, 16]`.
    """

    table: pa.Table
    shares: np.ndarray


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


def pair_claimants(
    first: Run, second: Run, networks: tuple[str, str]
) -> list[tuple[Claimant, Claimant]]:
    """Which maps of one network are compared with which of the other: those of the same method.

    Of layers of the same name, else of the two target layers, else of the only layers that have
    the method, which may be called otherwise.
    """
    targets = [
        run.networks[name]["target_layer"]
        for run, name in zip((first, second), networks, strict=True)
    ]
    pairs = []
    for one in first.claimants(networks[0]):
        others = [each for each in second.claimants(networks[1]) if each.method == one.method]
        found = [each for each in others if each.layer == one.layer]
        if not found and one.layer == targets[0]:
            found = [each for each in others if each.layer == targets[1]]
        if not found and one.name == one.method:
            found = [each for each in others if each.name == one.name]
        pairs += [(one, each) for each in found]
    return pairs


def compare_runs(first: Run, second: Run) -> Iterator[Compared]:
    """Compare what two runs say of the same images, matched by uri, a few thousand at a time.

    Raises:
        RunError: no network, method or image is in both runs.
    """
    networks = pair_networks(first, second)
    claimants = {pair: pair_claimants(first, second, pair) for pair in networks}
    if not any(claimants.values()):
        raise RunError(f"no method is in both {first.path} and {second.path}")
    images = _shared_images(first, second)
    if not len(images):
        raise RunError(f"no uri is in both {first.path} and {second.path}")
    return _comparisons((first, second), claimants, images)


def _comparisons(
    runs: tuple[Run, Run],
    claimants: dict[tuple[str, str], list[tuple[Claimant, Claimant]]],
    images: np.ndarray,
) -> Iterator[Compared]:
    comparable = {
        pair: same_classes(*(run.networks[name] for run, name in zip(runs, pair, strict=True)))
        for pair in claimants
    }
    for start in range(0, len(images), _AT_ONCE):
        ids = images[start : start + _AT_ONCE].T
        for names, pairs in claimants.items():
            found = [top_maps(*wanted) for wanted in zip(runs, names, ids, strict=True)]
            for one, other in pairs:
                maps = [found[0][one.name], found[1][other.name]]
                both = np.isin(ids[0], maps[0].column("image_id"))
                both &= np.isin(ids[1], maps[1].column("image_id"))
                maps = [each.of(own[both]) for each, own in zip(maps, ids, strict=True)]
                yield _comparison(maps[0], maps[1], names, comparable[names])


def _shared_images(first: Run, second: Run) -> np.ndarray:
    """The ids of the images that are in both runs, by uri: int64 `[N, 2]`, by rising first id."""
    if first.manifest["uri"].equals(second.manifest["uri"]):
        ids = first.manifest["image_id"].to_numpy()
        return np.stack([ids, second.manifest["image_id"].to_numpy()], axis=1)
    place = pc.index_in(first.manifest["uri"], second.manifest["uri"].combine_chunks())
    found = first.manifest.filter(pc.is_valid(place))
    others = second.manifest["image_id"].take(place.drop_null())
    return np.stack([found["image_id"].to_numpy(), others.to_numpy()], axis=1)


def _comparison(
    first: TopMaps, second: TopMaps, networks: tuple[str, str], comparable: bool
) -> Compared:
    samples = sampled(first, second)
    shares = energy(samples)
    found = alike(samples, shares, (first.rectangles("box"), second.rectangles("box")))
    count = len(first.rows)
    columns = {"uri": first.rows["uri"], "method": first.rows["method"]}
    columns["label"] = first.rows["label"]
    for suffix, maps, network in zip("ab", (first, second), networks, strict=True):
        columns[f"network_{suffix}"] = pa.repeat(network, count)
        for name in ("layer", "image_id", "class_id", "class_name", "probability"):
            columns[f"{name}_{suffix}"] = maps.rows[name]
    columns["changed"] = pa.nulls(count, pa.bool_())
    if comparable:
        columns["changed"] = pc.not_equal(columns["class_id_a"], columns["class_id_b"])
    for name, values in found._asdict().items():
        columns[name] = pa.array(values.astype(np.float32), from_pandas=True)
    table = pa.table({name: columns[name] for name in COMPARISON.names}).cast(COMPARISON)
    return Compared(table, shares)
