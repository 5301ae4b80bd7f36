"""Explain a collection of images: class activation maps of every network, class and method.

    scacam explain --input photos/ --output out/ --networks resnet50 densenet161=w.pth

Every image of the input ends as explained by every network or as a row of the errors table.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from scacam.errors import RunError
from scacam.images import VIEWS, ViewName
from scacam.inputs.manifest import (
    Manifest,
    read_manifest,
    refuse_unknown_labels,
    resolve_labels,
)
from scacam.jobs.estimate import Plan, estimate
from scacam.jobs.options import (
    add_input_options,
    add_network_options,
    load_networks,
    parse_networks,
    refuse_below_one,
    seconds_per_image,
)
from scacam.methods import DEFAULT_METHODS, METHODS
from scacam.networks import Network
from scacam.pipeline.allotments import allot
from scacam.pipeline.checkpoint import done_before
from scacam.pipeline.cluster import await_nodes, ray_starting, start_ray
from scacam.pipeline.stream import explain, speed, stages
from scacam.pipeline.tasks import in_tasks
from scacam.runs import lifecycle
from scacam.runs.describe import class_weights, describe_network, describe_run
from scacam.runs.lifecycle import begin, complete, refuse_output
from scacam.runs.lock import locked
from scacam.runs.proof import prove
from scacam.storage.parquet import write_table

logger = logging.getLogger("scacam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the job, whose defaults are those of `run`."""
    add_input_options(parser)
    parser.add_argument("--output", required=True, help="folder or s3:// prefix for the results")
    add_network_options(parser)
    parser.add_argument(
        "--finer-layer",
        nargs="+",
        metavar="[NAME=]LAYER",
        help="the layer whose features extent_cam takes, of every network or of the one named "
        "(default: the last one of twice the target layer's resolution)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all that a network supports, but "
        f"{', '.join(name for name in METHODS if name not in DEFAULT_METHODS)})",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="classes per image (default: 5)")
    parser.add_argument(
        "--min-probability",
        type=float,
        metavar="P",
        help="leave out classes that are less probable, but for the most probable one "
        "(default: all of the top K)",
    )
    parser.add_argument(
        "--explain-label", action="store_true", help="explain the labelled class as well"
    )
    parser.add_argument(
        "--embeddings", action="store_true", help="store each image's pooled features as well"
    )
    parser.add_argument(
        "--view",
        choices=VIEWS,
        help="what a network sees: its published centre crop, or the whole image squashed "
        "(default: center_crop)",
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="run the networks in half precision, bfloat16"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first (torch.compile), in every process: it takes a minute or "
        "more, so for long runs",
    )
    parser.add_argument(
        "--gpu-decode",
        action="store_true",
        help="decode plain JPEGs on the GPUs as well (nvJPEG), where the cores cannot feed them; "
        "pixels differ a little from those of the cores",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass")
    parser.add_argument(
        "--max-error-rate",
        type=float,
        metavar="SHARE",
        help="give up when more than this share of the images fails, from 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="use N GPUs of a cluster, and wait until they are there (default: those there are)",
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="try the failed images of a complete run again"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be done, from a timed sample"
    )
    parser.add_argument(
        "--price-per-hour", type=float, metavar="PRICE", help="of this machine, for --dry-run"
    )


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        output: where it is.
        images: how many the manifest has.
        explained: how many of them every network explains.
        errors: how many failed, by kind.
        max_error_rate: the share of them that was still to be borne.
        told: what this job did of it, in words.
    """

    output: str
    images: int
    explained: int
    errors: Mapping[str, int]
    max_error_rate: float
    told: Sequence[str]

    @property
    def ok(self) -> bool:
        """Whether any image was explained, and no more failed than were to be borne."""
        failed = sum(self.errors.values())
        return self.explained > 0 and failed <= self.max_error_rate * self.images

    def __str__(self) -> str:
        lines = [f"{self.explained:,} of {self.images:,} images explained"]
        lines += [f"  {count:,} failed: {kind}" for kind, count in self.errors.items()]
        if not self.ok:
            lines.append(
                f"too many: once that is mended ({self.output}/errors says what it is of "
                "each image), --retry-errors tries them again"
            )
        return "\n".join([*lines, *self.told, f"results: {self.output}"])


def run(
    *,
    input: str,
    output: str,
    networks: Sequence[str],
    target_layer: Sequence[str] = (),
    finer_layer: Sequence[str] = (),
    categories: Sequence[str] = (),
    output_kind: Sequence[str] = (),
    prompts: Sequence[str] = (),
    methods: Sequence[str] = DEFAULT_METHODS,
    top_k: int = 5,
    min_probability: float | None = None,
    explain_label: bool = False,
    embeddings: bool = False,
    view: ViewName = "center_crop",
    bfloat16: bool = False,
    compile: bool = False,
    gpu_decode: bool = False,
    batch_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    max_error_rate: float = 0.5,
    gpus: int | None = None,
    retry_errors: bool = False,
    dry_run: bool = False,
    price_per_hour: float | None = None,
) -> Result | Plan:
    """Explain images as `scacam explain` does; its options are the keywords.

    Returns:
        What the run came to, or with `dry_run` what it would take.

    Raises:
        ScacamError: the job cannot run as asked, or was stopped; the same call continues it.
        OSError: a file or a store cannot be read or written.
    """
    options = SimpleNamespace(**locals() | {"methods": list(dict.fromkeys(methods))})
    check(options)
    if not dry_run:
        refuse_output(output)
    manifest = lifecycle.listed_before(output, asked(options)) or read_manifest(
        input, limit, image_column, label_column, in_tasks
    )
    if not dry_run:
        ray_starting()
    loaded = load_networks(networks, target_layer, categories, output_kind, finer_layer, prompts)
    manifest = resolve_labels(manifest, {network.name: network.categories for network in loaded})
    check_networks(options, loaded, manifest)
    if dry_run:
        return plan(options, manifest, loaded)
    if gpu_decode:  # before the output is begun, which would then ask for GPUs again
        start_ray()
        options.gpus = await_nodes(gpus)
        if not options.gpus:
            raise RunError(
                "--gpu-decode needs a GPU, and there is none here; leave it out, or on a cluster "
                "that is still growing wait for N of them with --gpus N"
            )
    wanted = describe(options, manifest, loaded)
    left_out = [manifest.left_out()] if manifest.ignored else []
    with locked(output):
        record = begin(output, wanted, manifest.table)
        if retry_errors:
            record = lifecycle.retry_errors(output, record)
        told = ["nothing to do: it was complete"]
        if record["status"] != "complete":
            images = len(manifest.table)
            del manifest  # of ten million images it takes 1 GB, and the run reads its own copy
            record, told = explain_all(options, record, images, loaded)
    counts = record["images"], record["explained"], record["errors"]
    return Result(output, *counts, max_error_rate, [*left_out, *told])


def explain_all(
    options: SimpleNamespace, record: dict[str, Any], images: int, networks: Sequence[Network]
) -> tuple[dict[str, Any], list[str]]:
    """Explain what is not explained yet, and prove the run; its record, and what was done."""
    started = time.monotonic()
    for network in networks:
        write_table(*class_weights(options.output, network))
    costs = [seconds_per_image(network) for network in networks]
    start_ray()
    gpus = await_nodes(options.gpus)
    done = done_before(options.output)
    allotments = allot(costs, gpus, images - done, options.gpu_decode)
    counts = explain(options, record, networks, costs, allotments, done)
    proof = prove(options.output, record["networks"], images, record["embeddings"])
    seconds = time.monotonic() - started
    record |= {
        "status": "complete",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(record.get("seconds", 0) + seconds, 1),
        "explained": proof.explained,
        "errors": dict(proof.errors.most_common()),
    }
    complete(options.output, record, proof)
    return record, speed(counts, networks, allotments)


def check(options: SimpleNamespace) -> None:
    """Refuse options that are wrong in themselves."""
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        raise RunError(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
    refuse_below_one(top_k=options.top_k, batch_size=options.batch_size, limit=options.limit)
    if not 0 <= options.max_error_rate <= 1:
        raise RunError(f"--max-error-rate must be from 0 to 1, not {options.max_error_rate:g}")
    if options.min_probability is not None and not 0 < options.min_probability < 1:
        raise RunError(
            f"--min-probability must lie between 0 and 1, not be {options.min_probability:g}"
        )
    if options.gpus is not None and options.gpus < 0:
        raise RunError(f"--gpus must be at least 0, not {options.gpus}")
    parse_networks(options.networks)


def check_networks(
    options: SimpleNamespace, networks: Sequence[Network], manifest: Manifest
) -> None:
    """Refuse what cannot be explained, and say what will be left out."""
    labels = manifest.table["label"]
    if options.explain_label and labels.null_count == len(labels):
        raise RunError(f"--explain-label needs labels, and {options.input} has none")
    for network in networks:
        refuse_unknown_labels(manifest.table, network.num_classes, network.name)
        absent = [name for name in options.methods if not network.supports(name)]
        if len(absent) == len(options.methods):
            raise RunError(f"{network.name} supports none of the methods {', '.join(absent)}")
        finer = [name for name in absent if METHODS[name].needs_finer_layer]
        attending = [name for name in absent if METHODS[name].needs_attention != "none"]
        weighing = [name for name in absent if name not in (*finer, *attending)]
        for names, what in (
            (weighing, "linear head"),
            (finer, "finer layer"),
            (attending, "class token whose attention could be had"),
        ):
            if names:
                logger.info("%s has no %s: no %s", network.name, ", ".join(names), what)


def asked(options: SimpleNamespace) -> dict[str, Any]:
    """What decides which images a run is about."""
    names = ("input", "image_column", "label_column", "limit")
    return {name: getattr(options, name) for name in names}


def describe(
    options: SimpleNamespace, manifest: Manifest, networks: Sequence[Network]
) -> dict[str, Any]:
    """What `run.json` says before the run."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **asked(options),
        "ignored_files": sum(manifest.ignored.values()),
        "left_out": dict(manifest.ignored),
        **describe_run(manifest.table, options.methods),
        "networks": [describe_network(network, options.methods) for network in networks],
        "top_k": options.top_k,
        "min_probability": options.min_probability,
        "explain_label": options.explain_label,
        "embeddings": options.embeddings,
        "view": options.view,
        "bfloat16": options.bfloat16,
        "compile": options.compile,
        "gpu_decode": options.gpu_decode,
    }


def plan(options: SimpleNamespace, manifest: Manifest, networks: Sequence[Network]) -> Plan:
    """Say what the job would do, from a timed sample, and start nothing."""
    decode, pools, localize = stages(options, networks, None)
    for network, arguments in zip(networks, pools, strict=True):
        arguments["load"] = partial(lambda network: network, network)
    found = estimate(manifest.table, networks, decode, pools, localize)
    return Plan([network.name for network in networks], found, options.price_per_hour)
