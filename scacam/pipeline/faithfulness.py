"""The stream of the faithfulness job: images and stored maps through the networks into tables."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from scacam.images import ViewName
from scacam.pipeline.allotments import Allotment, rows_per_shard
from scacam.pipeline.chain import chained, links
from scacam.pipeline.checkpoint import Checkpoint, checkpoint, images_of
from scacam.pipeline.cluster import TASK_CPUS
from scacam.pipeline.progress import Counts, start_tally
from scacam.pipeline.sink import ShardSink
from scacam.pipeline.stages.decode import Decode
from scacam.pipeline.stages.rows import bytes_per_image
from scacam.pipeline.stages.trial import Try
from scacam.pipeline.stream import prepare, write
from scacam.runs.results import Claimant
from scacam.storage import join
from scacam.trials.tables import ERRORS, IMAGE_FAITHFULNESS, PASS, images_folder

if TYPE_CHECKING:
    from scacam.networks import Network

__all__ = ["stages", "try_all"]


class _Checkpoint(Checkpoint):
    folders = ("faithfulness_images", ERRORS)


class _Sink(ShardSink):
    """Writes a file per task and network: one row per image and claimant."""

    errors = ERRORS

    def unfolded(self, images: pa.Table, folder: str) -> pa.Table:
        """The rows of some images that belong into a folder, from the column of that name."""
        lists = images[folder].combine_chunks()
        parents = images.select(IMAGE_FAITHFULNESS.names[:2]).take(lists.value_parent_indices())
        rows = pa.Table.from_struct_array(lists.flatten())
        columns = [*parents.columns, *(rows[name] for name in IMAGE_FAITHFULNESS.names[2:])]
        return pa.table(columns, schema=IMAGE_FAITHFULNESS)


def stages(
    run: str,
    view: ViewName,
    networks: "Sequence[Network]",
    claimants: Sequence[Sequence[Claimant]],
    arguments: dict[str, Any],
    tally: Any,
) -> tuple[Decode, list[dict[str, Any]]]:
    """The stages of the stream: of the networks' stages the arguments but for their network."""
    samplings, chain = links(networks, tally)
    pools = [
        {**arguments, **link, "run": run, "claimants": each}
        for link, each in zip(chain, claimants, strict=True)
    ]
    return Decode(samplings, view, tally), pools


def try_all(
    metrics: str,
    images: int,
    done: int,
    networks: "Sequence[Network]",
    made: Callable[[Any], tuple[Decode, list[dict[str, Any]]]],
    costs: Sequence[float],
    allotments: Sequence[Allotment],
) -> Counts:
    """Stream the images of a pass that are not done yet through the networks into its tables.

    Args:
        metrics: `OUT/metrics`, absolute, below which the pass is.
        images: how many it has.
        done: of these, how many were done before.
        networks: the networks.
        made: `stages`, given the tally.
        costs: seconds that an image takes each network on one core.
        allotments: what each network gets.
    """
    tally = start_tally()
    decode, pools = made(tally)
    left = max(1, images - done)
    rows = rows_per_shard(left, bytes_per_image(decode.samplings), costs, allotments)
    prepare(checkpoint(join(metrics, PASS), _Checkpoint), costs)
    stream = images_of(join(metrics, PASS), TASK_CPUS, images, rows)
    stream = stream.map_batches(decode, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)
    stream = chained(stream, Try, networks, pools, allotments, left, rows)
    folders = dict.fromkeys((images_folder(network.name) for network in networks), (0, 0))
    sink = _Sink(metrics, folders, tally, max_error_rate=1.0)
    return write(stream, sink, tally, images, done)
