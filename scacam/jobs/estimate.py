"""The dry run: what a job would do, how long it would take and how large its output would be."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import torch

from scacam.errors import RunError
from scacam.inputs.containers import read_image
from scacam.networks import Network
from scacam.pipeline.cluster import keep_freed_memory, own_cores
from scacam.pipeline.stages.decode import Decode, DecodeOnGpu
from scacam.pipeline.stages.explain import Explain
from scacam.pipeline.stages.localize import Localize
from scacam.tables import SHARDED, unfolded

__all__ = ["Estimate", "Plan", "estimate", "timed"]

_SAMPLE_ON_CPU, _SAMPLE_ON_GPU = 16, 256


class Estimate(NamedTuple):
    """What a sample of the images says of all of them.

    Attributes:
        images: how many there are.
        failed: the share of the sample that could not be explained.
        input_bytes, output_bytes: of all images.
        feeding: by stage, seconds of a core per image, also where there are GPUs.
        explaining: by stage, seconds per image of a GPU where there is one, else of a core.
        sampled: how many images were timed.
        cores, gpus: of this machine.
    """

    images: int
    failed: float
    input_bytes: float
    output_bytes: float
    feeding: dict[str, float]
    explaining: dict[str, float]
    sampled: int
    cores: int
    gpus: int

    @property
    def fed(self) -> float:
        """Seconds of a core per image, beside what a GPU would do."""
        return sum(self.feeding.values())

    @property
    def explained(self) -> float:
        """Seconds of a core or GPU per image, for all that a GPU would do."""
        return sum(self.explaining.values())

    @property
    def hours(self) -> float:
        """How long all images take on this machine, its cores and GPUs all busy."""
        cores = self.fed / self.cores if self.gpus else (self.fed + self.explained) / self.cores
        return self.images * max(cores, self.explained / self.gpus if self.gpus else 0) / 3600

    def told(self, price_per_hour: float | None) -> str:
        """In words, with the cost if the price of this machine per hour is known."""
        machine = f"{self.cores} cores" + (f" and {self.gpus} GPUs" if self.gpus else "")
        stages = self.feeding | self.explaining
        lines = [
            f"images: {self.images:,}, about {_bytes(self.input_bytes)} to read",
            f"output: about {_bytes(self.output_bytes)}, "
            f"{self.output_bytes / self.images:,.0f} bytes per image",
            "milliseconds per image: "
            + ", ".join(f"{name} {1000 * value:,.1f}" for name, value in stages.items()),
            f"time: about {_time(3600 * self.hours)} on {machine} like these",
        ]
        if self.gpus:
            needed = self.fed / self.explained
            lines.append(
                f"GPUs: one explains {1 / self.explained:,.0f} images/s and needs {needed:,.1f} "
                "cores to feed it"
            )
            even = needed * self.gpus
            if self.cores < even:
                lines.append(
                    f"warning: {self.cores} cores cannot feed {self.gpus} GPUs, which will be "
                    f"{self.cores / even:.0%} busy; add nodes without GPUs, {even:,.0f} cores in "
                    "all make it even"
                )
            else:
                lines.append(
                    f"pace: the GPUs set it; {self.cores} cores could feed "
                    f"{self.cores / needed:,.1f} of them"
                )
        else:
            lines.append(
                f"GPUs: none here; a core can feed {1 / self.fed:,.0f} images/s to a GPU elsewhere"
            )
        if self.failed:
            lines.append(f"errors: {self.failed:.0%} of the sampled images cannot be explained")
        if price_per_hour is not None:
            cost = self.hours * price_per_hour
            lines.append(f"cost: about {cost:,.2f} at {price_per_hour:g} per hour of {machine}")
        return "\n".join([*lines, f"(from a timed sample of {self.sampled} images)"])


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        networks: their names.
        estimate: from a timed sample.
        price_per_hour: of this machine, if it is known.
    """

    networks: Sequence[str]
    estimate: Estimate
    price_per_hour: float | None
    ok: ClassVar[bool] = True

    def __str__(self) -> str:
        names = ", ".join(self.networks)
        return f"networks: {names}\n{self.estimate.told(self.price_per_hour)}"


def estimate(
    manifest: pa.Table,
    networks: Sequence[Network],
    decode: Decode,
    explain: Sequence[dict[str, Any]],
    localize: Localize,
) -> Estimate:
    """Send a sample of the images through the stages, in this process.

    Args:
        manifest: the images.
        networks: the networks.
        decode: the first stage.
        explain: by network, the arguments of its stage.
        localize: the last stage.

    Raises:
        RunError: none of the sampled images can be explained, or a GPU is to decode them and this
            machine has none.
    """
    keep_freed_memory()  # as the workers do
    gpus = torch.cuda.device_count()
    sample = _SAMPLE_ON_GPU if gpus else _SAMPLE_ON_CPU
    rows = np.unique(np.linspace(0, len(manifest) - 1, sample).astype(np.int64))
    batch = manifest.take(rows)
    feeding: dict[str, float] = {}
    explaining: dict[str, float] = {}

    if isinstance(decode, DecodeOnGpu):
        if not gpus:
            raise RunError(
                "--gpu-decode needs a GPU, and this machine has none; leave it out, or plan on a "
                "machine that has one"
            )
        decode(batch)  # the first pass starts nvJPEG
        batch, explaining["decode on the GPU"] = timed(decode, batch)
    else:
        batch, feeding["decode"] = timed(decode, batch)
    for network, arguments in zip(networks, explain, strict=True):
        stage = Explain(**arguments)
        stage(batch)  # the first pass pays for allocations
        batch, explaining[f"explain {network.name}"] = timed(stage, batch)
    batch, feeding["localize"] = timed(localize, batch)
    good = batch.filter(pc.is_null(batch["error"]))
    if not len(good):
        first = f"{batch['uri'][0]}: {batch['message'][0]}"
        raise RunError(f"none of {len(batch)} sampled images can be explained; the first, {first}")
    share = len(good) / len(batch)
    folders = [name for name in good.column_names if name.partition("/")[0] in SHARDED]
    shards = (unfolded(good, folder, localize.map_shapes) for folder in folders)
    output = sum(map(_stored, shards)) / len(batch)
    return Estimate(
        images=len(manifest),
        failed=1 - share,
        input_bytes=_input_bytes(manifest, good),
        output_bytes=output * len(manifest),
        feeding=feeding,
        explaining=explaining,
        sampled=len(rows),
        cores=own_cores(),
        gpus=gpus,
    )


def timed(stage: Callable[[pa.Table], pa.Table], batch: pa.Table) -> tuple[pa.Table, float]:
    """What a stage makes of a batch, and its seconds per image."""
    began = time.perf_counter()
    after = stage(batch)
    return after, (time.perf_counter() - began) / len(batch)


def _stored(rows: pa.Table) -> int:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer, compression="zstd")
    return buffer.tell()


def _input_bytes(manifest: pa.Table, sample: pa.Table) -> float:
    if not manifest["size"].null_count:
        return pc.sum(manifest["size"]).as_py()
    rows = sample.select(["uri", "offset", "size"]).to_pylist()
    sizes = [row["size"] or len(read_image(row["uri"], row["offset"])) for row in rows]
    return len(manifest) * sum(sizes) / len(sizes)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
