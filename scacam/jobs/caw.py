"""Relate the two class activation weights, class weight and averaged gradient, over a data set.

    scacam caw --input photos/ --output out/ --networks resnet18 squeezenet1_1 densenet161

Takes each image for the class that a network says it is. Writes OUT/metrics/caw.parquet, one row
per network and class, and says where the relation is linear. OUT may be the output of a run. The
same command continues a job that was stopped, from the last minute that it kept a copy of.
"""

import argparse
import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from scacam.errors import RunError
from scacam.inputs.manifest import read_manifest
from scacam.jobs.options import (
    add_input_options,
    add_network_options,
    load_networks,
    refuse_below_one,
    seconds_per_image,
)
from scacam.methods.caw import Weights, verdict
from scacam.pipeline.allotments import allot, rows_per_shard
from scacam.pipeline.chain import chained, links
from scacam.pipeline.cluster import TASK_CPUS, await_nodes, root_cause, start_ray
from scacam.pipeline.progress import shown, start_tally, taken_up
from scacam.pipeline.stages.decode import Decode
from scacam.pipeline.stages.holder import Holder
from scacam.pipeline.stages.rows import Failure, bytes_per_image, set_failures, tensors
from scacam.pipeline.tasks import in_tasks
from scacam.runs.describe import describe_network, describe_run
from scacam.runs.lock import locked
from scacam.storage import delete, join, patiently, read_bytes, write_bytes
from scacam.storage.parquet import write_table

if TYPE_CHECKING:
    from scacam.networks import Network


logger = logging.getLogger("scacam")

_SAVED_EVERY_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job, whose defaults are those of `run`."""
    add_input_options(parser)
    parser.add_argument("--output", required=True, help="folder or s3:// prefix for the results")
    add_network_options(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass")


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        path: the table.
        weights: of each network.
        images: how many there are.
        errors: how many failed, by kind.
    """

    path: str
    weights: Sequence[Weights]
    images: int
    errors: Counter[str]

    @property
    def ok(self) -> bool:
        """Whether any image was looked at."""
        return any(of_network.images for of_network in self.weights)

    def __str__(self) -> str:
        lines = []
        for of_network in self.weights:
            lines.append(f"{of_network.network}: {verdict(of_network.head, of_network.cells)}")
            found = {name: v for name, v in of_network.summary().items() if v is not None}
            if "ratio" in found:
                lines.append(
                    f"  measured on {of_network.images:,} images: w / α = {found['ratio']:.5g}, "
                    f"spread over channels {found['ratio_spread_channels']:.2g}, over images "
                    f"{found['ratio_spread_images']:.2g}; correlation {found['correlation']:.4f}"
                )
        lines += [
            f"{count:,} of {self.images:,} images failed: {kind}"
            for kind, count in self.errors.items()
        ]
        return "\n".join([*lines, f"results: {self.path}"])


def run(
    *,
    input: str,
    output: str,
    networks: Sequence[str],
    target_layer: Sequence[str] = (),
    categories: Sequence[str] = (),
    output_kind: Sequence[str] = (),
    prompts: Sequence[str] = (),
    batch_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
) -> Result:
    """Relate the weights of networks over images; the options are those of `scacam caw`.

    Raises:
        ScacamError: the job cannot run as asked.
        OSError: the results cannot be written.
    """
    refuse_below_one(batch_size=batch_size, limit=limit)
    manifest = read_manifest(input, limit, image_column, label_column, in_tasks).table
    loaded = load_networks(networks, target_layer, categories, output_kind, prompts=prompts)
    path = join(output, "metrics/caw.parquet")
    with locked(output):
        seen = Seen.before(join(output, "metrics/caw.partial.npz"), manifest, loaded)
        left = manifest.filter(pa.array(~seen.done))
        if len(left):
            start_ray()
            try:
                weigh(left, loaded, batch_size, seen)
            except Exception as error:
                raise RunError(
                    f"stopped: {root_cause(error)}; the same command continues it"
                ) from error
        tables = [of_network.table() for of_network in seen.weights]
        write_table(path, pa.concat_tables(tables))
        delete(seen.path)
    return Result(path, seen.weights, len(manifest), seen.errors)


@dataclass
class Seen:
    """What the images so far come to; a copy is kept, so that the same command continues.

    Attributes:
        path: where the copy lies.
        of: a digest of the images and networks that it is of.
        weights: of each network.
        errors: how many images failed, by kind.
        done: bool, image by image.
    """

    path: str
    of: str
    weights: Sequence[Weights]
    errors: Counter[str]
    done: np.ndarray

    @classmethod
    def before(cls, path: str, manifest: pa.Table, networks: Sequence["Network"]) -> "Seen":
        """What an earlier job left that was stopped and was of the same; else nothing yet."""
        asked = describe_run(manifest, []), [describe_network(network, []) for network in networks]
        of = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        weights = [_weights_of(network) for network in networks]
        seen = cls(path, of, weights, Counter(), np.zeros(len(manifest), dtype=bool))
        try:
            found = np.load(io.BytesIO(read_bytes(path)))
        except FileNotFoundError:
            return seen
        if str(found["of"]) == of:
            seen.done = found["done"]
            seen.errors.update(found["errors"].tolist())
            for index, of_network in enumerate(weights):
                names = of_network.state()
                of_network.restore({name: found[f"{index} {name}"] for name in names})
            logger.info("%d of %d images were seen before", seen.done.sum(), len(manifest))
        return seen

    def add(self, block: pa.Table) -> None:
        """Add the images of a block; one that failed anywhere adds to no network."""
        self.done[block["image_id"].to_numpy()] = True
        self.errors.update(block["error"].drop_null().to_pylist())
        good = block["error"].is_null().to_numpy()
        for of_network in self.weights:
            ids = block[f"class {of_network.network}"].to_numpy()
            averaged = tensors(block[f"averaged {of_network.network}"])
            of_network.add(ids[good], averaged[good])

    def save(self) -> None:
        """Keep a copy."""
        states: dict[str, Any] = {
            f"{index} {name}": values
            for index, of_network in enumerate(self.weights)
            for name, values in of_network.state().items()
        }
        errors = np.array([*self.errors.elements()], dtype=str)
        content = io.BytesIO()
        np.savez(content, of=np.array(self.of), done=self.done, errors=errors, **states)
        patiently(lambda: write_bytes(self.path, content.getvalue()))


def weigh(
    manifest: pa.Table, networks: Sequence["Network"], batch_size: int | None, seen: Seen
) -> None:
    """Stream images through the networks, and add them to what was seen."""
    costs = [seconds_per_image(network) for network in networks]
    images = len(manifest)
    allotments = allot(costs, await_nodes(None), images).networks
    ray.data.DataContext.get_current().enable_progress_bars = False
    tally = start_tally()
    samplings, chain = links(networks, tally)
    rows = rows_per_shard(images, bytes_per_image(samplings), costs, allotments)
    stream = ray.data.from_arrow(manifest).repartition(target_num_rows_per_block=rows)
    stream = stream.map_batches(
        Decode(samplings, "center_crop", tally),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
    )
    pools = [{**link, "bfloat16": False, "batch_size": batch_size} for link in chain]
    stream = chained(stream, Observe, networks, pools, allotments, images, rows)
    saved = time.monotonic()
    with shown(tally, images):
        block: pa.Table
        for block in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            if not len(block):
                continue
            seen.add(block)
            if time.monotonic() - saved >= _SAVED_EVERY_S:
                seen.save()
                saved = time.monotonic()


def _weights_of(network: "Network") -> Weights:
    class_weights = network.class_weights
    _, height, width = network.feature_shape
    return Weights(
        network.name,
        head=network.head.kind,
        cells=height * width,
        class_weights=None if class_weights is None else class_weights.numpy(),
        categories=network.categories,
    )


class Observe(Holder):
    """One network, held by one actor: pixels to the predicted class and its averaged gradients.

    Adds `class NAME`, -1 where there is none, and `averaged NAME`, tensors `[C]`.
    """

    stage = "observe"

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Observe one block, some images at a time."""
        if not len(batch):
            return batch
        with taken_up(self.tally, f"observe {self.network.name}", batch) as deaths:
            failures: dict[int, Failure] = {}
            samples = tensors(batch[f"pixels {self.sampling}"])
            ids = np.full(len(batch), -1, dtype=np.int64)
            averaged = np.zeros((len(batch), self.network.feature_shape[0]), dtype=np.float32)
            shown = self.shown(
                lambda chosen: self._observed(samples[chosen]),
                lambda: self._observed(np.zeros_like(samples[:1])),
                *(batch, deaths, failures),
            )
            for chosen, seen in shown:
                ids[chosen], averaged[chosen] = seen
            for row in np.flatnonzero(~np.isfinite(averaged).all(1)).tolist():
                message = f"{self.network.name} gives gradients that are not finite"
                failures[row] = Failure(self.stage, "not_finite", message)
        if failures:
            batch = set_failures(batch, failures)
        batch = batch.append_column(f"class {self.network.name}", pa.array(ids))
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(averaged)
        batch = batch.append_column(f"averaged {self.network.name}", column)
        return self.without_pixels(batch)

    def _observed(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from scacam.explainer import observe
        from scacam.methods.gradients import averaged

        seen = observe(self.network, self.images(samples), top_k=1)
        alpha = averaged(seen.gradients)[:, 0]
        return seen.class_ids[:, 0].cpu().numpy(), alpha.float().cpu().numpy()
