"""Explain a collection of images: class activation maps of every network, class and method.

    python jobs/explain.py --input photos/ --output out/ --networks resnet50 densenet161=w.pth

Every image of the input ends as explained by every network or as a row of the errors table.
"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import ray
import ray.data
from cluster import TASK_CPUS, allot, rows_per_shard, start_ray
from inputs import Manifest, read_manifest, refuse_unknown_labels, write_manifest
from progress import Tally, shown
from record import (
    describe_methods,
    describe_network,
    prove,
    refuse_other_run,
    versions,
    write_record,
)
from sink import ShardSink, Written
from stages import Decode, Explain, Localize, sampling_of

from scacam.errors import RunError, ScacamError
from scacam.images import VIEWS
from scacam.methods import METHODS
from scacam.networks import Network, load_network

logger = logging.getLogger("scacam")

_BATCH_ON_CPU, _BATCH_ON_GPU = 8, 64
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
    parser.add_argument(
        "--networks",
        required=True,
        nargs="+",
        metavar="NAME[=WEIGHTS]",
        help="torchvision's or scacam's name of a network, or package.module:factory; "
        "WEIGHTS is a published name, a checkpoint or 'random' (default: DEFAULT)",
    )
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
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass")
    parser.add_argument("--limit", type=int, metavar="N", help="explain only the first N images")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it completed, with errors rows or without."""
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
    refuse_other_run(options.output)
    manifest = read_manifest(options.input, options.limit)
    networks = load_networks(options.networks)
    check_networks(options, networks, manifest)

    record = describe(options, manifest, networks)
    manifest_path = write_manifest(manifest, options.output)
    write_record(options.output, record)
    start_ray()
    started = time.monotonic()
    written = explain(options, manifest_path, len(manifest.table), networks)
    seconds = time.monotonic() - started

    prove(options.output, [network.name for network in networks], len(manifest.table))
    record |= {
        "status": "complete",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "explained": written.explained,
        "errors": dict(written.errors),
    }
    write_record(options.output, record)
    print(summary(options.output, len(manifest.table), written, seconds))
    return 0 if written.explained else 1


def check(options: argparse.Namespace) -> None:
    """Refuse options that are wrong in themselves."""
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        raise RunError(f"unknown method {unknown[0]!r}; known are {', '.join(METHODS)}")
    for name in ("top_k", "batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RunError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    names = [network.partition("=")[0] for network in options.networks]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise RunError(f"network {repeated[0]!r} is there twice; one run holds it once")


def load_networks(specifications: Sequence[str]) -> list[Network]:
    """Load each `NAME[=WEIGHTS]`."""
    networks = []
    for specification in specifications:
        name, _, weights = specification.partition("=")
        logger.info("loading %s", specification)
        networks.append(load_network(name, weights or "DEFAULT"))
    return networks


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
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "input": options.input,
        "images": len(manifest.table),
        "ignored_files": manifest.ignored,
        "networks": [describe_network(network, options.methods) for network in networks],
        "methods": describe_methods(options.methods),
        "top_k": options.top_k,
        "explain_label": options.explain_label,
        "view": options.view,
    }


def explain(
    options: argparse.Namespace, manifest_path: str, images: int, networks: Sequence[Network]
) -> Written:
    """Stream the images through the networks into the shards."""
    allotment = allot(len(networks))
    rows = rows_per_shard(images, allotment)
    batch_size = options.batch_size or (_BATCH_ON_GPU if allotment.num_gpus else _BATCH_ON_CPU)
    samplings = list(dict.fromkeys(sampling_of(network.preprocessing) for network in networks))
    uses = [samplings.index(sampling_of(network.preprocessing)) for network in networks]

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = _STALLED_S
    context.execution_no_progress_timeout_s = _STALLED_S

    tally = Tally.remote()  # type: ignore[attr-defined]
    stream = ray.data.read_parquet(manifest_path, num_cpus=TASK_CPUS)
    stream = stream.repartition(target_num_rows_per_block=rows)
    stream = stream.map_batches(
        Decode(samplings, options.view),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
    )
    for index, (network, sampling) in enumerate(zip(networks, uses, strict=True)):
        last = index == len(networks) - 1
        stream = stream.map_batches(
            Explain,
            fn_constructor_kwargs={
                "load": partial(ray.get, ray.put(network)),
                "methods": options.methods,
                "top_k": options.top_k,
                "explain_label": options.explain_label,
                "sampling": sampling,
                "last_use": sampling not in uses[index + 1 :],
                "batch_size": batch_size,
                "tally": tally if last else None,
            },
            compute=ray.data.ActorPoolStrategy(size=allotment.actors),
            batch_size=rows,
            batch_format="pyarrow",
            num_cpus=allotment.num_cpus,
            num_gpus=allotment.num_gpus or None,
        )
    stream = stream.map_batches(
        Localize(
            {network.name: network.preprocessing.crop_size for network in networks},
            rectified=[name for name, method in METHODS.items() if method.relu],
        ),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=TASK_CPUS,
    )
    sink = ShardSink(
        options.output, {network.name: network.feature_shape[1:] for network in networks}
    )
    with shown(tally, images):
        stream.write_datasink(sink, ray_remote_args={"num_cpus": TASK_CPUS})
    return sink.written


def summary(output: str, images: int, written: Written, seconds: float) -> str:
    """The last words of a job."""
    lines = [f"{written.explained:,} of {images:,} images explained"]
    lines += [f"  {count:,} failed: {kind}" for kind, count in written.errors.most_common()]
    lines += [f"{images / seconds:,.1f} images/s in {seconds:,.0f} s", f"results: {output}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
