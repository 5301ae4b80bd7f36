"""Try the heatmaps of a run: are they true to what the networks do, do they pass sanity checks?

    scacam faithfulness --run out/ --images 1000

A second pass over a finished run. The stored maps of the top class rank the pixels of an image, and
the networks are run again on the image changed in that order, and with other weights. Writes
OUT/metrics.
"""

import argparse
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from scacam.errors import RunError
from scacam.evaluation.intervals import Row, lead
from scacam.evaluation.tables import named
from scacam.evaluation.words import percent
from scacam.jobs.estimate import Estimate, timed
from scacam.jobs.options import refuse_below_one, seconds_per_image
from scacam.methods import METHODS as CAMS
from scacam.networks import Network, load_network
from scacam.pipeline.cluster import allot, await_nodes, keep_freed_memory, start_ray
from scacam.pipeline.faithfulness import Try, stages, try_all
from scacam.runs.describe import describe_run
from scacam.runs.lifecycle import begin, complete
from scacam.runs.lock import locked
from scacam.runs.record import differences, read_record
from scacam.runs.results import Claimant, Run, open_run
from scacam.storage import delete, join
from scacam.storage.parquet import write_table
from scacam.tables import MANIFEST
from scacam.trials.metrics import BASELINES, METRICS, SANITY, chosen, passes, verdict
from scacam.trials.summary import TABLES, prove, summary
from scacam.trials.tables import PASS, images_folder

logger = logging.getLogger("scacam")

_SEED = 0
_SAMPLE_ON_CPU, _SAMPLE_ON_GPU = 2, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job, whose defaults are those of `run`."""
    parser.add_argument("--run", required=True, metavar="OUT", help="the output of an explain job")
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="try N images, drawn at random and always the same (default: all)",
    )
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="of the run (default: all)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the run (default: all)")
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help=f"default: all of {', '.join(METRICS)}"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of deletion and insertion (default: 20)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be done, from a timed sample"
    )
    parser.add_argument(
        "--price-per-hour", type=float, metavar="PRICE", help="of this machine, for --dry-run"
    )


@dataclass
class Result:
    """The metrics of a pass; as text, how the methods compare and which fail the sanity checks.

    Attributes:
        path: the folder of the tables.
        images: how many the pass is about.
        errors: how many of them failed, by kind.
        remarks: what was left out.
        rows: of the tables, by their names.
    """

    path: str
    images: int
    errors: Mapping[str, int]
    remarks: list[str]
    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in TABLES})

    @property
    def ok(self) -> bool:
        """Whether any image could be tried."""
        return bool(self.rows["faithfulness"])

    def __str__(self) -> str:
        failed = sum(self.errors.values())
        lines = [f"{self.images - failed:,} of {self.images:,} images tried", *self.remarks]
        lines += [f"  {count:,} failed: {kind}" for kind, count in self.errors.items()]
        for network in dict.fromkeys(row["network"] for row in self.rows["faithfulness"]):
            lines += self._of_network(network)
        return "\n".join([*lines, "", f"tables: {self.path}"])

    def _of_network(self, network: str) -> Iterator[str]:
        """The means, by what the best method of each metric leads, and the sanity checks."""
        rows, pairs = (
            [row for row in self.rows[table] if row["network"] == network]
            for table in ("faithfulness", "faithfulness_differences")
        )
        rows, pairs = named(rows, rows), named(rows, pairs)
        cells = {(row["method"], row["metric"]): row["value"] for row in rows}
        methods = list(dict.fromkeys(row["method"] for row in rows))
        measured = {row["metric"] for row in rows}
        shown = [metric for name, metric in METRICS.items() if metric.brief and name in measured]
        width = max(map(len, methods))
        arrows = [f"{one.title} {'↑' if one.higher_is_better else '↓'}" for one in shown]
        yield f"\n{network}, in %; ↑ more is better, ↓ less is"
        yield " " * width + "".join(f"  {title}" for title in arrows)
        for method in methods:
            told = (
                f"{100 * cells[method, metric.name]:>{len(title)}.1f}"
                for metric, title in zip(shown, arrows, strict=True)
            )
            yield f"{method:<{width}}  " + "  ".join(told)
        yield ""
        for metric in shown:
            if metric.name in SANITY:  # where nothing is more or less than passed
                continue
            best = lead(rows, pairs, metric.name, metric.higher_is_better, BASELINES)
            others = [] if best is None else [o for o in best.others if o.method not in BASELINES]
            if best is None or not others:
                continue
            second = min(others, key=lambda other: abs(other.value))
            by = percent(second.value, second.low, second.high, "+.1f")
            noise = "within noise" if second.noise else "more than noise"
            yield f"{metric.title}: {best.best}, from {second.method} by {by}, {noise}"
        yield ""
        yield from verdict(rows)


@dataclass(frozen=True)
class Plan:
    """What a pass would take.

    Attributes:
        claimants: whose maps would be tried, by network.
        estimate: from a timed sample.
        price_per_hour: of this machine, if it is known.
    """

    claimants: Mapping[str, Sequence[Claimant]]
    estimate: Estimate
    price_per_hour: float | None
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        lines = [
            f"{network}: " + ", ".join(one.name for one in claimants)
            for network, claimants in self.claimants.items()
        ]
        return "\n".join([*lines, self.estimate.told(self.price_per_hour)])


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
            "top_k": min([config["top_k"], *(network.num_classes for network in self.networks)]),
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


def run(
    *,
    run: str,
    images: int | None = None,
    networks: Sequence[str] = (),
    methods: Sequence[str] = (),
    metrics: Sequence[str] = (),
    steps: int = 20,
    batch_size: int | None = None,
    dry_run: bool = False,
    price_per_hour: float | None = None,
) -> Result | Plan:
    """Try the maps of a run as `scacam faithfulness` does; its options are the keywords.

    Returns:
        What it came to, or with `dry_run` what it would take.

    Raises:
        ScacamError: the run is not there or not complete, its networks have other weights now, it
            has nothing of what is asked for, or the pass was stopped; the same call continues it.
        OSError: a file or a store cannot be read or written.
    """
    refuse_below_one(images=images, steps=steps, batch_size=batch_size)
    opened = open_run(run)
    if opened.config.get("status") != "complete":
        raise RunError(f"the run in {run} is not complete; complete it first")
    wanted, remarks = metrics_of(opened, metrics)
    names = list(dict.fromkeys(networks)) or list(opened.networks)
    claimants = [claimants_of(opened, name, methods) for name in names]
    manifest = sample(opened, images)
    loaded = [reloaded(opened, name) for name in names]
    task = Task(opened, manifest, loaded, claimants, wanted, steps, batch_size)
    if dry_run:
        return Plan(dict(zip(names, claimants, strict=True)), estimated(task), price_per_hour)
    with locked(run):
        record = begun(task)
        if record["status"] != "complete":
            record = tried(task, record)
        result = Result(task.folder, record["images"], record["errors"], remarks)
        for network, each in zip(loaded, claimants, strict=True):
            places = {one.name: (one.layer, one.method) for one in each}
            found = summary(task.folder, network.name, places, wanted, opened.image_ids)
            for name, rows in found.items():
                result.rows[name] += rows
        for name, schema in TABLES.items():
            table = pa.Table.from_pylist(result.rows[name], schema)
            write_table(join(task.folder, f"{name}.parquet"), table)
    return result


def metrics_of(run: Run, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The metrics to measure, and what is to be said of them."""
    wanted = chosen(names or None)
    if run.config["top_k"] > 1 and run.config.get("min_probability") is None:
        return [metric.name for metric in wanted], []
    if names and any(metric.needs == "random_logit" for metric in wanted):
        raise RunError(
            f"random_logit needs as many classes of every image, more than one; {run.path} has not"
        )
    left = [metric.name for metric in wanted if metric.needs != "random_logit"]
    return left, ["left out: random_logit, which needs as many classes of every image"]


def claimants_of(run: Run, network: str, methods: Sequence[str]) -> list[Claimant]:
    """Whose maps of a network are tried. Raises RunError for what the run does not have."""
    claimants = run.claimants(network)
    for method in methods:
        if not any(one.method == method for one in claimants):
            known = ", ".join(dict.fromkeys(one.method for one in claimants))
            raise RunError(f"{run.path} has no {method!r} of {network}; it has {known}")
    return [one for one in claimants if not methods or one.method in methods]


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
    images = len(task.manifest)
    try_all(task.folder, images, task.networks, task.stages, costs, allot(costs, gpus, images))
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
        batch, trying[network.name] = timed(stage, batch)
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
        cores=os.cpu_count() or 1,
        gpus=gpus,
        verb="try",
    )
