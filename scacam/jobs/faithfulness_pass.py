"""A pass over the maps of a finished run: what is tried, its record, its stream, its proof."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from scacam.errors import RunError
from scacam.jobs.estimate import Estimate, timed
from scacam.jobs.options import seconds_per_image
from scacam.methods import METHODS as CAMS
from scacam.networks import Network, load_network
from scacam.pipeline.allotments import allot
from scacam.pipeline.checkpoint import done_before
from scacam.pipeline.cluster import await_nodes, keep_freed_memory, own_cores, start_ray
from scacam.pipeline.faithfulness import stages, try_all
from scacam.pipeline.stages.trial import Try
from scacam.runs.describe import describe_run
from scacam.runs.lifecycle import begin, complete
from scacam.runs.record import differences, read_record
from scacam.runs.results import Claimant, Run
from scacam.storage import delete, join
from scacam.tables import MANIFEST
from scacam.trials.metrics import BASELINES, passes
from scacam.trials.summary import TABLES, prove
from scacam.trials.tables import PASS, images_folder

__all__ = ["Task", "begun", "estimated", "reloaded", "sample", "tried"]

logger = logging.getLogger("scacam")

_SEED = 0
_SAMPLE_ON_CPU, _SAMPLE_ON_GPU = 2, 16


class Task(NamedTuple):
    """What is to be tried.

    Attributes:
        run: the run.
        manifest: its images that are tried, in the order of their ids.
        networks: those that are asked again.
        claimants: of each network, whose maps are tried.
        metrics: their names.
        steps: of deletion and insertion.
        batch_size: images per forward pass, if that was said.
    """

    run: Run
    manifest: pa.Table
    networks: Sequence[Network]
    claimants: Sequence[Sequence[Claimant]]
    metrics: Sequence[str]
    steps: int
    batch_size: int | None

    @property
    def folder(self) -> str:
        """Where its tables go."""
        return join(self.run.path, "metrics")

    def stages(self, tally: Any) -> tuple[Any, list[dict[str, Any]]]:
        """The stages of its stream, as `pipeline.faithfulness.stages`."""
        config = self.run.config
        arguments = {
            "top_k": config["top_k"],
            "metrics": self.metrics,
            "steps": self.steps,
            "bfloat16": config.get("bfloat16", False),
            "batch_size": self.batch_size,
        }
        return stages(
            self.run.path, config["view"], self.networks, self.claimants, arguments, tally
        )

    def described(self) -> dict[str, Any]:
        """What the record of the pass says before it."""
        methods = dict.fromkeys(one.method for each in self.claimants for one in each)
        return {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **describe_run(self.manifest, list(methods)),
            "networks": [
                {
                    "name": network.name,
                    "sha256": network.digest(),
                    "output_kind": network.output.kind,
                    "claimants": [one.name for one in claimants],
                }
                for network, claimants in zip(self.networks, self.claimants, strict=True)
            ],
            "metrics": list(self.metrics),
            "steps": self.steps,
        }


def sample(run: Run, images: int | None) -> pa.Table:
    """The images that were explained, or so many of them, drawn the same way every time."""
    explained = np.setdiff1d(run.image_ids, run.errors["image_id"].to_numpy())
    if not len(explained):
        raise RunError(f"{run.path}: no image was explained; its errors say why")
    drawn = np.random.default_rng(_SEED).permutation(explained)[:images]
    manifest = run.manifest
    for name in set(MANIFEST.names) - set(manifest.column_names):
        column = pa.nulls(len(manifest), MANIFEST.field(name).type)
        manifest = manifest.append_column(name, column)
    manifest = manifest.select(MANIFEST.names).cast(MANIFEST)
    places = np.searchsorted(run.image_ids, np.sort(drawn))
    return manifest.take(places)


def reloaded(run: Run, name: str) -> Network:
    """A network of a run. Raises RunError if its weights are others now."""
    if name not in run.networks:
        raise RunError(f"{run.path} has no network {name!r}; it has {', '.join(run.networks)}")
    described = run.networks[name]
    weights = described["weights"]
    layers = [
        layer
        for layer, maps in described["layers"].items()
        if layer != described["target_layer"]
        and any(not CAMS[method].needs_finer_layer for method in maps["methods"])
    ]
    logger.info("loading %s, weights %s", name, weights)
    network = load_network(
        described.get("loaded_as") or name,
        "DEFAULT" if weights == "as made by the factory" else weights,
        target_layer=[*layers, described["target_layer"]],
        finer_layer=described.get("finer_layer"),
        output_kind=described.get("output_kind"),
        prompts=described.get("prompts"),
    )
    if network.digest() != described["sha256"]:
        raise RunError(
            f"{name} has other weights now than in the run in {run.path} ({weights}): its maps "
            "would be tried before another network; restore the weights, or explain anew"
        )
    return network


def begun(task: Task) -> dict[str, Any]:
    """The record of the pass, which is begun or continued.

    Raises:
        RunError: there is another one already; says in what it differs.
    """
    folder, wanted = join(task.folder, PASS), task.described()
    existing = read_record(folder)
    if existing is None:
        forget(task.folder)
    elif told := differences(existing, wanted):
        raise RunError(
            f"{task.folder} holds what another pass found; delete {folder} to make it anew. It "
            "differs in " + "; ".join(told[:5])
        )
    return begin(folder, wanted, task.manifest)


def forget(metrics: str) -> None:
    """Delete what an earlier pass wrote."""
    for name in ("faithfulness_images", PASS, *(f"{table}.parquet" for table in TABLES)):
        delete(join(metrics, name))


def tried(task: Task, record: dict[str, Any]) -> dict[str, Any]:
    """Try what is not tried yet, and prove the pass; its record."""
    start_ray()
    gpus = await_nodes(None)
    costs = [
        seconds_per_image(network) * passes(task.metrics, len(claimants), task.steps)
        for network, claimants in zip(task.networks, task.claimants, strict=True)
    ]
    images, done = len(task.manifest), done_before(join(task.folder, PASS))
    allotments = allot(costs, gpus, images - done).networks
    try_all(task.folder, images, done, task.networks, task.stages, costs, allotments)
    shown = {
        network.name: len(claimants) + len(BASELINES)
        for network, claimants in zip(task.networks, task.claimants, strict=True)
    }
    proof = prove(task.folder, task.manifest["image_id"].to_numpy(), shown)
    record |= {
        "status": "complete",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "tried": proof.explained,
        "errors": dict(proof.errors.most_common()),
    }
    complete(join(task.folder, PASS), record, proof)
    return record


def estimated(task: Task) -> Estimate:
    """What the pass would take, from a sample of the images that goes through in this process."""
    keep_freed_memory()  # as the workers do
    gpus = torch.cuda.device_count()
    most = _SAMPLE_ON_GPU if gpus else _SAMPLE_ON_CPU
    manifest = task.manifest
    rows = np.unique(np.linspace(0, len(manifest) - 1, most).astype(np.int64))
    decode, pools = task.stages(None)
    batch, decoding = timed(decode, manifest.take(rows))
    trying: dict[str, float] = {}
    output = 0
    for network, arguments in zip(task.networks, pools, strict=True):
        stage = Try(**arguments, load=partial(lambda network: network, network))
        batch, trying[f"try {network.name}"] = timed(stage, batch)
        output += batch[images_folder(network.name)].nbytes
    good = batch["error"].null_count
    if not good:
        first = f"{batch['uri'][0]}: {batch['message'][0]}"
        raise RunError(f"none of {len(batch)} sampled images can be tried; the first, {first}")
    sizes = manifest["size"].drop_null().to_numpy()
    return Estimate(
        images=len(manifest),
        failed=1 - good / len(batch),
        input_bytes=float(sizes.mean() * len(manifest)) if len(sizes) else 0.0,
        output_bytes=output / len(batch) * len(manifest),
        feeding={"decode": decoding},
        explaining=trying,
        sampled=len(rows),
        cores=own_cores(),
        gpus=gpus,
    )
