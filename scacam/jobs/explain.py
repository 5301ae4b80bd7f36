"""Explain a collection of images: class activation maps of every network, class and method.

    python jobs/explain.py --input photos/ --output out/ --networks resnet50 densenet161=w.pth

Every image of the input ends as explained by every network or as a row of the errors table.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import ray
import ray.data

from scacam.errors import RunError, ScacamError
from scacam.images import VIEWS
from scacam.inputs.manifest import Manifest, read_manifest, refuse_unknown_labels
from scacam.jobs.estimate import estimate
from scacam.jobs.options import (
    add_network_options,
    load_networks,
    parse_networks,
    seconds_per_image,
)
from scacam.methods import METHODS
from scacam.networks import Network
from scacam.pipeline.checkpoint import checkpoint
from scacam.pipeline.cluster import (
    TASK_CPUS,
    Allotment,
    allot,
    cores,
    root_cause,
    rows_per_shard,
    start_ray,
)
from scacam.pipeline.decode import Decode
from scacam.pipeline.explain import Explain
from scacam.pipeline.localize import Localize
from scacam.pipeline.progress import Counts, shares, shown, start_tally
from scacam.pipeline.rows import sampling_of
from scacam.pipeline.sink import ShardSink
from scacam.runs.describe import describe_network, describe_run
from scacam.runs.lifecycle import begin, complete, refuse_output, retry_errors
from scacam.runs.lock import locked
from scacam.runs.proof import Proof, prove
from scacam.storage import OUT_OF_REACH, join, locate

logger = logging.getLogger("scacam")

_STALLED_S = 900


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--input",
        required=True,
        help="folder or s3:// prefix of images, or a .csv or .parquet manifest (uri, label)",
    )
    parser.add_argument("--output", required=True, help="folder or s3:// prefix for the results")
    add_network_options(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=f"default: all that a network supports of {', '.join(METHODS)}",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes per image")
    parser.add_argument(
        "--explain-label", action="store_true", help="explain the labelled class as well"
    )
    parser.add_argument(
        "--view",
        choices=VIEWS,
        default="center_crop",
        help="what a network sees: its published centre crop, or the whole image squashed",
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="run the networks in half precision, bfloat16"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass")
    parser.add_argument("--limit", type=int, metavar="N", help="explain only the first N images")
    parser.add_argument(
        "--max-error-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="give up when more than this share of the images fails, from 0 to 1",
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
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it completed, with errors rows or without.

    1 when it completed but all images failed, or too many; 2 when it could not run or was stopped.
    """
    options = parse(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    try:
        return run(options)
    except ScacamError as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """From the options to the results."""
    check(options)
    if not options.dry_run:
        refuse_output(options.output)
    manifest = read_manifest(options.input, options.limit)
    networks = load_networks(options)
    check_networks(options, networks, manifest)
    if options.dry_run:
        return dry_run(options, manifest, networks)
    wanted = describe(options, manifest, networks)
    with locked(options.output):
        record = begin(options.output, wanted, manifest.table)
        if options.retry_errors:
            record = retry_errors(options.output, record)
        if record["status"] == "complete":
            print(f"{options.output} is complete: nothing to do")
            return 0
        images = len(manifest.table)
        del manifest  # of ten million images it takes 1 GB, and the run reads its own copy
        started = time.monotonic()
        start_ray()
        allotments = allot([seconds_per_image(network) for network in networks])
        counts = explain(options, images, networks, allotments)
        proof = prove(options.output, [network.name for network in networks], images)
        seconds = time.monotonic() - started
        record |= {
            "status": "complete",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(record.get("seconds", 0) + seconds, 1),
            "explained": proof.explained,
            "errors": dict(proof.errors),
        }
        complete(options.output, record, proof)
    print(summary(options.output, images, proof, counts, stage_capacities(networks, allotments)))
    failed = proof.errors.total() / images
    return 0 if proof.explained and failed <= options.max_error_rate else 1


def check(options: argparse.Namespace) -> None:
    """Refuse options that are wrong in themselves."""
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        raise RunError(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
    for name in ("top_k", "batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    parse_networks(options.networks)


def check_networks(
    options: argparse.Namespace, networks: Sequence[Network], manifest: Manifest
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
        if absent:
            logger.info("%s has no %s: no class weights", network.name, ", ".join(absent))


def describe(
    options: argparse.Namespace, manifest: Manifest, networks: Sequence[Network]
) -> dict[str, Any]:
    """What `run.json` says before the run."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "input": options.input,
        "ignored_files": manifest.ignored,
        **describe_run(manifest.table, options.methods),
        "networks": [describe_network(network, options.methods) for network in networks],
        "top_k": options.top_k,
        "explain_label": options.explain_label,
        "view": options.view,
        "bfloat16": options.bfloat16,
    }


def stages(
    options: argparse.Namespace, networks: Sequence[Network], tally: Any
) -> tuple[Decode, list[dict[str, Any]], Localize]:
    """The stages of the stream: of the networks' stages the arguments but for their network."""
    samplings = list(dict.fromkeys(sampling_of(network.preprocessing) for network in networks))
    uses = [samplings.index(sampling_of(network.preprocessing)) for network in networks]
    pools = [
        {
            "methods": options.methods,
            "top_k": options.top_k,
            "explain_label": options.explain_label,
            "sampling": sampling,
            "bfloat16": options.bfloat16,
            "last_use": sampling not in uses[index + 1 :],
            "batch_size": options.batch_size,
            "is_last": tally is not None and index == len(networks) - 1,
            "tally": tally,
        }
        for index, sampling in enumerate(uses)
    ]
    localize = Localize(
        {network.name: network.preprocessing.crop_size for network in networks},
        rectified=[name for name, method in METHODS.items() if method.relu],
        tally=tally,
    )
    return Decode(samplings, options.view, tally), pools, localize


def dry_run(options: argparse.Namespace, manifest: Manifest, networks: Sequence[Network]) -> int:
    """Say what the job would do, from a timed sample, and start nothing."""
    decode, pools, localize = stages(options, networks, None)
    for network, arguments in zip(networks, pools, strict=True):
        arguments["load"] = partial(lambda network: network, network)
    found = estimate(manifest.table, networks, decode, pools, localize)
    print(f"networks: {', '.join(network.name for network in networks)}")
    print(found.told(options.price_per_hour))
    return 0


def explain(
    options: argparse.Namespace,
    images: int,
    networks: Sequence[Network],
    allotments: Sequence[Allotment],
) -> Counts:
    """Stream the images that are not done yet through the networks into the shards.

    The pools are chained, and the pixels travel along until their last use: so each image is read
    and decoded once, and nothing waits for the whole collection.
    """
    rows = rows_per_shard(images, max(allotment.actors for allotment in allotments))
    tally = start_tally()
    decode, pools, localize = stages(options, networks, tally)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = _STALLED_S
    context.execution_no_progress_timeout_s = _STALLED_S
    context.retried_io_errors.append(OUT_OF_REACH)
    context.checkpoint_config = checkpoint(options.output)

    filesystem, manifest_path = locate(join(options.output, "manifest.parquet"))
    stream = ray.data.read_parquet(manifest_path, filesystem=filesystem, num_cpus=TASK_CPUS)
    stream = stream.repartition(target_num_rows_per_block=rows)
    stream = stream.map_batches(decode, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)
    for network, arguments, allotment in zip(networks, pools, allotments, strict=True):
        stream = stream.map_batches(
            Explain,
            fn_constructor_kwargs=arguments | {"load": partial(ray.get, ray.put(network))},
            compute=ray.data.ActorPoolStrategy(size=allotment.actors),
            batch_size=rows,
            batch_format="pyarrow",
            num_cpus=allotment.num_cpus,
            num_gpus=allotment.num_gpus or None,
        )
    stream = stream.map_batches(
        localize, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS
    )
    sink = ShardSink(
        options.output,
        {network.name: network.feature_shape[1:] for network in networks},
        tally,
        options.max_error_rate,
    )
    with shown(tally, images):
        try:
            stream.write_datasink(sink, ray_remote_args={"num_cpus": TASK_CPUS})
        except Exception as error:  # whatever stopped it, what is written stays, to be continued
            raise RunError(
                f"stopped: {root_cause(error)}; the same command continues it"
            ) from error
        finally:
            context.checkpoint_config = None
    return ray.get(tally.get.remote())


def stage_capacities(
    networks: Sequence[Network], allotments: Sequence[Allotment]
) -> dict[str, int]:
    """By stage, the processes or cores that it had."""
    pools = {
        f"explain {network.name}": allotment.actors
        for network, allotment in zip(networks, allotments, strict=True)
    }
    return {"decode": cores(), **pools, "localize": cores(), "write": cores()}


def summary(
    output: str, images: int, proof: Proof, counts: Counts, capacities: dict[str, int]
) -> str:
    """The last words of a job."""
    lines = [f"{proof.explained:,} of {images:,} images explained"]
    lines += [f"  {count:,} failed: {kind}" for kind, count in proof.errors.most_common()]
    if counts.written:
        busy = shares(counts, capacities)
        slowest = max(busy, key=lambda stage: busy[stage])
        lines += [
            f"{counts.written:,} now, in {counts.wall:,.0f} s: "
            f"{counts.written / counts.wall:,.1f} images/s; the bottleneck is {slowest}",
            "busy: " + ", ".join(f"{stage} {share:.0%}" for stage, share in busy.items()),
        ]
    return "\n".join([*lines, f"results: {output}"])


if __name__ == "__main__":
    sys.exit(main())
