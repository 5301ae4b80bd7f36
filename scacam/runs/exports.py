"""What a run knows of its images, in the form that other tools take.

Arrays for scikit-learn and cleanlab, samples for FiftyOne. The shards are read as they come: what
is in memory is what is returned, and of samples a few.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from scipy import sparse

from scacam.errors import RunError
from scacam.runs.results import Row, Run

if TYPE_CHECKING:
    import fiftyone

__all__ = ["embeddings", "probabilities", "samples"]

_AT_ONCE = 256


def embeddings(run: Run, network: str) -> tuple[np.ndarray, np.ndarray]:
    """The pooled features of all images that were explained.

    Returns:
        The ids of the images, int64 `[N]`, rising, and their features, float16 `[N, C]`.

    Raises:
        RunError: there is no such network, or the run kept no embeddings.
    """
    scanner = run.embeddings(network, ["image_id", "embedding"])
    ids_only = run.embeddings(network, ["image_id"])
    if scanner is None or ids_only is None:
        raise RunError(f"{run.path} has no embeddings of {network}: explain with --embeddings")
    ids = np.sort(ids_only.to_table()["image_id"].to_numpy())
    width = scanner.projected_schema.field("embedding").type.list_size
    found = np.empty((len(ids), width), dtype=np.float16)
    for batch in scanner.to_batches():
        places = np.searchsorted(ids, batch["image_id"].to_numpy())
        found[places] = batch["embedding"].flatten().to_numpy().reshape(-1, width)
    return ids, found


def probabilities(run: Run, network: str) -> tuple[np.ndarray, sparse.csr_array]:
    """The probabilities of the explained classes of all images that were explained.

    Returns:
        The ids of the images, int64 `[N]`, rising, and float32 `[N, classes]` with a place for each
        explained class; `.toarray()` has 0 for the others. With `--explain-label` the label's are
        among them.

    Raises:
        RunError: there is no such network, or the run is older than its predictions.
    """
    scanner = run.predictions(network, ["image_id", "class_id", "probability"])
    if scanner is None:
        raise RunError(f"{run.path} has no predictions of {network}: an older version wrote it")
    table = scanner.to_table()
    ids, rows = np.unique(table["image_id"].to_numpy(), return_inverse=True)
    classes = int(run.networks[network]["num_classes"])
    at = rows, table["class_id"].to_numpy()
    found = sparse.coo_array((table["probability"].to_numpy(), at), shape=(len(ids), classes))
    return ids, found.tocsr()


def samples(run: Run, network: str, method: str = "sca_cam") -> "Iterator[fiftyone.Sample]":
    """Samples for FiftyOne, one per image, made as they are asked for.

    >>> fiftyone.Dataset("resnet50").add_samples(exports.samples(run, "resnet50"))

    Each has the top class as `prediction`, the label's number as `label_id` where there is one, the
    map on the image as `heatmap`, its box as `box`, the embedding as `embedding` if the run kept
    it, and as tags the findings of `scacam audit` that it shows, such as "border: tench".

    Args:
        run: the run.
        network: whose answers.
        method: whose maps and boxes, of the target layer where several layers have it.

    Raises:
        RunError: there is no such network or method.
    """
    import fiftyone

    tags = _tags(run, network)
    layers = [one.layer for one in run.claimants(network) if one.method == method]
    target = run.networks[network]["target_layer"]
    layer = target if target in layers else next(iter(layers), None)
    scanner = run.explanations(network, method, where=pc.field("rank") == 1, layer=layer)
    for whole in scanner.to_batches():
        for start in range(0, len(whole), _AT_ONCE):
            batch = whole.slice(start, _AT_ONCE)
            vectors = _vectors(run, network, batch["image_id"].to_numpy())
            for row in batch.to_pylist():
                heatmap = np.nan_to_num(run.heatmap(row, on_image=True).clip(min=0))
                sample = fiftyone.Sample(
                    row["uri"],
                    tags=tags.get(row["image_id"], []),
                    prediction=fiftyone.Classification(
                        label=row["class_name"], confidence=row["probability"]
                    ),
                    heatmap=fiftyone.Heatmap(
                        map=heatmap, range=[0, float(heatmap.max(initial=0)) or 1.0]
                    ),
                    box=fiftyone.Detections(
                        detections=[
                            fiftyone.Detection(label=row["class_name"], bounding_box=box)
                            for box in _boxes(row)
                        ]
                    ),
                )
                if row["label"] is not None:
                    sample["label_id"] = row["label"]
                if row["image_id"] in vectors:
                    sample["embedding"] = vectors[row["image_id"]]
                yield sample


def _boxes(row: Row) -> list[list[float]]:
    """The box of an explanation, if it has one: left, top, width and height, as shares."""
    if row["box_x0"] is None:
        return []
    x0, y0, x1, y1 = (float(row[f"box_{end}"]) for end in ("x0", "y0", "x1", "y1"))
    width, height = row["width"], row["height"]
    return [[x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]]


def _vectors(run: Run, network: str, image_ids: np.ndarray) -> dict[int, np.ndarray]:
    """The embeddings of some images, by their ids."""
    scanner = run.embeddings(network, ["image_id", "embedding"], image_ids=image_ids)
    rows = [] if scanner is None else scanner.to_table().to_pylist()
    return {row["image_id"]: np.array(row["embedding"], dtype=np.float32) for row in rows}


def _tags(run: Run, network: str) -> dict[int, list[str]]:
    """By image what the audit found that it shows, of the classes that stand out."""
    findings, images = run.metrics("findings"), run.metrics("findings_images")
    found: dict[int, list[str]] = defaultdict(list)
    if findings is None or images is None:
        return found
    where = (pc.field("network") == network) & pc.field("stands_out")
    names = {
        row["finding"]: f"{row['kind']}: {row['class_name']}"
        for row in findings.to_table(filter=where).to_pylist()
    }
    shown = pc.field("finding").isin(list(names))
    for row in images.to_table(["image_id", "finding"], filter=shown).to_pylist():
        found[row["image_id"]].append(names[row["finding"]])
    return found
