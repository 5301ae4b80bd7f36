"""The stream of the explain job: images through all stages, from the manifest to the shards."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from scacam.errors import RunError
from scacam.methods import METHODS
from scacam.pipeline.allotments import Allotments, rows_per_shard
from scacam.pipeline.chain import chained, links, pool
from scacam.pipeline.checkpoint import checkpoint, images_of
from scacam.pipeline.cluster import TASK_CPUS, cores, root_cause
from scacam.pipeline.progress import Counts, shares, shown, start_tally
from scacam.pipeline.sink import ShardSink
from scacam.pipeline.stages.decode import Decode, DecodeOnGpu
from scacam.pipeline.stages.explain import Explain
from scacam.pipeline.stages.localize import Localize, Speaker
from scacam.pipeline.stages.rows import bytes_per_image
from scacam.storage import OUT_OF_REACH, absolute
from scacam.tables import embeddings_folder, predictions_folder

if TYPE_CHECKING:
    from scacam.networks import Network

__all__ = ["explain", "prepare", "speed", "stages", "write"]

_STALLED_S = 900
_SLOWER = 10
"""How many times longer than it should an image may take, before that passes for a standstill."""


def stages(
    options: SimpleNamespace, networks: Sequence["Network"], tally: Any
) -> tuple[Decode, list[dict[str, Any]], Localize]:
    """The stages of the stream: of the networks' stages the arguments but for their network."""
    samplings, chain = links(networks, tally)
    pools = [
        {
            **link,
            "methods": options.methods,
            "top_k": options.top_k,
            "explain_label": options.explain_label,
            "embeddings": options.embeddings,
            "bfloat16": options.bfloat16,
            "compile": options.compile,
            "batch_size": options.batch_size,
        }
        for link in chain
    ]
    speakers = [
        Speaker(
            network.name,
            [network.class_name(class_id) for class_id in range(network.num_classes)],
            min(options.top_k, network.num_classes),
            link["sampling"],
            network.preprocessing.crop_size,
            {
                layer: (methods, network.map_shape(layer))
                for layer, methods in network.methods_by_layer(options.methods).items()
            },
        )
        for network, link in zip(networks, chain, strict=True)
    ]
    rectified = [name for name, method in METHODS.items() if method.relu]
    kept = options.explain_label, options.min_probability or 0.0
    localize = Localize(speakers, rectified, *kept, tally)
    decode = (DecodeOnGpu if options.gpu_decode else Decode)(samplings, options.view, tally)
    return decode, pools, localize


def prepare(checkpoint: CheckpointConfig, costs: Sequence[float]) -> None:
    """Set Ray Data's context for a stream that can be continued: no wait without end, no bars.

    Args:
        checkpoint: of what is done.
        costs: seconds that an image takes each network on one core.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = max(_STALLED_S, int(_SLOWER * max(costs)))
    if OUT_OF_REACH not in context.retried_io_errors:
        context.retried_io_errors.append(OUT_OF_REACH)
    context.checkpoint_config = checkpoint


def explain(
    options: SimpleNamespace,
    record: dict[str, Any],
    networks: Sequence["Network"],
    costs: Sequence[float],
    allotments: Allotments,
    done: int,
) -> Counts:
    """Stream the images that are not done yet, all but so many, through the networks into shards.

    The pools are chained, and the pixels travel along until their last use: so each image is read
    and decoded once, and nothing waits for the whole collection. Decoding has a pool as well where
    it is done on GPUs, and otherwise tasks.
    """
    output = absolute(options.output)
    tally = start_tally()
    decode, pools, localize = stages(options, networks, tally)
    image_bytes = bytes_per_image(decode.samplings)
    images = record["images"]
    left = max(1, images - done)
    rows = rows_per_shard(left, image_bytes, costs, allotments.networks)

    prepare(checkpoint(output), costs)
    stream = images_of(output, TASK_CPUS, images, rows)
    if allotments.decoding is None:
        stream = stream.map_batches(
            decode, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS
        )
    else:
        stream = stream.map_batches(
            type(decode),
            fn_constructor_args=(decode.samplings, decode.view, decode.tally),
            **pool(allotments.decoding, left, rows),
        )
    stream = chained(stream, Explain, networks, pools, allotments.networks, left, rows)
    stream = stream.map_batches(
        localize, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS
    )
    further = [predictions_folder, *([embeddings_folder] if options.embeddings else [])]
    sink = ShardSink(
        output,
        localize.map_shapes,
        tally,
        options.max_error_rate,
        record.get("explained", 0),  # by a complete run, whose errors are tried again
        [folder(network.name) for network in networks for folder in further],
    )
    return write(stream, sink, tally, images, done)


def write(stream: ray.data.Dataset, sink: ShardSink, tally: Any, images: int, done: int) -> Counts:
    """Run a stream of images into its sink; returns what the tally counted.

    Args:
        stream: of those that are not done yet.
        sink: where they go.
        tally: the `progress.Tally` actor.
        images: how many the run has.
        done: of these, how many were done before.

    Raises:
        RunError: it was stopped, whatever by; what is written stays, to be continued.
    """
    with shown(tally, images, done):
        try:
            stream.write_datasink(sink, ray_remote_args={"num_cpus": TASK_CPUS})
        except Exception as error:
            raise RunError(
                f"stopped: {root_cause(error)}; the same command continues it"
            ) from error
        finally:
            ray.data.DataContext.get_current().checkpoint_config = None
    return ray.get(tally.get.remote())


def speed(counts: Counts, networks: Sequence["Network"], allotments: Allotments) -> list[str]:
    """How fast it went and what held it up, in words."""
    if not counts.written:
        return []
    pools = {
        f"explain {network.name}": allotment.actors
        for network, allotment in zip(networks, allotments.networks, strict=True)
    }
    decoders = cores() if allotments.decoding is None else allotments.decoding.actors
    busy = shares(counts, {"decode": decoders, **pools, "localize": cores(), "write": cores()})
    slowest = max(busy, key=lambda stage: busy[stage])
    return [
        f"{counts.written:,} now, in {counts.wall:,.0f} s: "
        f"{counts.written / counts.wall:,.1f} images/s; the bottleneck is {slowest}",
        "busy: " + ", ".join(f"{stage} {share:.0%}" for stage, share in busy.items()),
    ]
