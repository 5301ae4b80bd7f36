"""Relate the two class activation weights, class weight and averaged gradient, over a data set.

    python jobs/caw.py --input photos/ --output out/ --networks resnet18 squeezenet1_1 densenet161

Takes each image for the class that a network says it is. Writes OUT/metrics/caw.parquet, one row
per network and class, and says where the relation is linear. OUT may be the output of a run.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import ray
import ray.data

from scacam.audit.caw import Weights, verdict
from scacam.errors import RunError, ScacamError
from scacam.inputs.manifest import read_manifest
from scacam.jobs.options import add_network_options, load_networks, seconds_per_image
from scacam.pipeline.cluster import TASK_CPUS, allot, rows_per_shard, start_ray
from scacam.pipeline.decode import Decode
from scacam.pipeline.explain import settle
from scacam.pipeline.progress import shown, start_tally, taken_up
from scacam.pipeline.rows import sampling_of, tensors
from scacam.runs.lock import locked
from scacam.storage import join
from scacam.storage.parquet import write_table

if TYPE_CHECKING:
    from scacam.networks import Network

logger = logging.getLogger("scacam")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", required=True, help="images or a manifest, as for jobs/explain")
    parser.add_argument("--output", required=True, help="folder or s3:// prefix for the results")
    add_network_options(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass")
    parser.add_argument("--limit", type=int, metavar="N", help="look only at the first N images")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it completed, 1 when every image failed, 2 when it could not run."""
    options = parse(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    try:
        return run(options)
    except ScacamError as error:
        print(f"caw: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """From the options to the table."""
    for name in ("batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    manifest = read_manifest(options.input, options.limit).table
    networks = load_networks(options)
    path = join(options.output, "metrics/caw.parquet")
    with locked(options.output):
        start_ray()
        weights, errors = weigh(options, manifest, networks)
        tables = [of_network.table() for of_network in weights]
        write_table(path, pa.concat_tables(tables))
    print(summary(weights, errors, len(manifest), path))
    return 0 if any(of_network.images for of_network in weights) else 1


def weigh(
    options: argparse.Namespace, manifest: pa.Table, networks: Sequence["Network"]
) -> tuple[list[Weights], Counter[str]]:
    """Stream the images through the networks; returns their weights and the errors by kind."""
    allotments = allot([seconds_per_image(network) for network in networks])
    samplings = list(dict.fromkeys(sampling_of(network.preprocessing) for network in networks))
    ray.data.DataContext.get_current().enable_progress_bars = False
    tally = start_tally()
    rows = rows_per_shard(len(manifest), max(allotment.actors for allotment in allotments))
    stream = ray.data.from_arrow(manifest).repartition(target_num_rows_per_block=rows)
    stream = stream.map_batches(
        Decode(samplings, "center_crop", tally),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
    )
    for index, (network, allotment) in enumerate(zip(networks, allotments, strict=True)):
        stream = stream.map_batches(
            Observe,
            fn_constructor_kwargs={
                "load": partial(ray.get, ray.put(network)),
                "sampling": samplings.index(sampling_of(network.preprocessing)),
                "batch_size": options.batch_size,
                "is_last": index == len(networks) - 1,
                "tally": tally,
            },
            compute=ray.data.ActorPoolStrategy(size=allotment.actors),
            batch_size=rows,
            batch_format="pyarrow",
            num_cpus=allotment.num_cpus,
            num_gpus=allotment.num_gpus or None,
        )
    weights = [_weights_of(network) for network in networks]
    errors: Counter[str] = Counter()
    with shown(tally, len(manifest)):
        block: pa.Table
        for block in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            errors.update(block["error"].drop_null().to_pylist())
            for of_network in weights:
                ids = block[f"class {of_network.network}"].to_numpy()
                averaged = tensors(block[f"averaged {of_network.network}"])
                of_network.add(ids[ids >= 0], averaged[ids >= 0])
    return weights, errors


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


class Observe:
    """One network, held by one actor: pixels to the predicted class and its averaged gradients.

    Adds `class NAME`, -1 where there is none, and `averaged NAME`, tensors `[C]`.
    """

    def __init__(
        self,
        load: "Callable[[], Network]",
        *,
        sampling: int,
        batch_size: int | None,
        is_last: bool,
        tally: Any,
    ) -> None:
        """Take the network, to the GPU if the actor has one.

        Args:
            load: gets the network.
            sampling: which `pixels` column the network looks at.
            batch_size: images per forward pass; None for what suits the device.
            is_last: whether no network comes after this one.
            tally: the `progress.Tally` actor.
        """
        self.network = load()
        self.device, self.batch_size = settle(self.network, batch_size)
        self.sampling = sampling
        self.is_last = is_last
        self.tally = tally

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Observe one block, some images at a time."""
        with taken_up(self.tally, f"observe {self.network.name}", batch):
            rows = np.flatnonzero(batch["error"].is_null().to_numpy())
            samples = tensors(batch[f"pixels {self.sampling}"])
            ids = np.full(len(batch), -1, dtype=np.int64)
            averaged = np.zeros((len(batch), self.network.feature_shape[0]), dtype=np.float32)
            for start in range(0, len(rows), self.batch_size):
                chosen = rows[start : start + self.batch_size]
                ids[chosen], averaged[chosen] = self._observed(samples[chosen])
            ids[~np.isfinite(averaged).all(1)] = -1
            if self.is_last:
                self.tally.advance.remote(len(batch))
        batch = batch.append_column(f"class {self.network.name}", pa.array(ids))
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(averaged)
        batch = batch.append_column(f"averaged {self.network.name}", column)
        if self.is_last:
            pixels = [name for name in batch.column_names if name.startswith(("pixels ", "view "))]
            batch = batch.drop_columns(pixels)
        return batch

    def _observed(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        from scacam.explainer import observe
        from scacam.methods.gradients import averaged

        images = self.network.normalize(torch.from_numpy(samples).to(self.device))
        seen = observe(self.network, images, top_k=1)
        alpha = averaged(seen.gradients)[:, 0]
        return seen.class_ids[:, 0].cpu().numpy(), alpha.float().cpu().numpy()


def summary(weights: Sequence[Weights], errors: Counter[str], images: int, path: str) -> str:
    """The last words of the job."""
    lines = []
    for of_network in weights:
        lines.append(f"{of_network.network}: {verdict(of_network.head, of_network.cells)}")
        found = {name: v for name, v in of_network.summary().items() if v is not None}
        if "ratio" in found:
            lines.append(
                f"  measured on {of_network.images:,} images: w / α = {found['ratio']:.5g}, spread "
                f"over channels {found['ratio_spread_channels']:.2g}, over images "
                f"{found['ratio_spread_images']:.2g}; correlation {found['correlation']:.4f}"
            )
    lines += [f"{count:,} of {images:,} images failed: {kind}" for kind, count in errors.items()]
    return "\n".join([*lines, f"results: {path}"])


if __name__ == "__main__":
    sys.exit(main())
