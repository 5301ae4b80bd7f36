"""Try the heatmaps of a run: are they true to what the networks do, do they pass sanity checks?

    scacam faithfulness --run out/ --images 1000

A second pass over a finished run. The stored maps of the top class rank the pixels of an image, and
the networks are run again on the image changed in that order, and with other weights. Writes
OUT/metrics.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pyarrow as pa

from scacam.errors import RunError
from scacam.evaluation.intervals import Row
from scacam.evaluation.tables import named
from scacam.evaluation.words import percent
from scacam.jobs.estimate import Estimate
from scacam.jobs.faithfulness_pass import Task, begun, estimated, reloaded, sample, tried
from scacam.jobs.options import refuse_below_one
from scacam.runs.lock import locked
from scacam.runs.results import Claimant, Run, open_run
from scacam.storage import join
from scacam.storage.parquet import write_table
from scacam.trials.metrics import METRICS, chosen, leads, verdict
from scacam.trials.summary import TABLES, summary


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
        for metric, best, second in leads(rows, pairs):
            by = percent(second.value, second.low, second.high, "+.1f")
            noise = "within noise" if second.noise else "more than noise"
            yield f"{metric.title}: {best}, from {second.method} by {by}, {noise}"
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
