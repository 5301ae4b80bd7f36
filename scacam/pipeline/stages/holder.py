"""A network in the hands of one actor, on a GPU where there is one: who is to blame if it fails."""

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import ray

from scacam.pipeline.progress import BLANK, Held, advance, fall, hold
from scacam.pipeline.stages.rows import Failure

if TYPE_CHECKING:
    import torch

    from scacam.networks import Network

__all__ = ["Holder", "leave_lost_gpu"]

_Seen = TypeVar("_Seen")

_BATCH_ON_CPU, _BATCH_ON_GPU = 16, 64
"""On one thread, torch leaves 1 × 1 convolutions to oneDNN from 16 images on: a third faster."""

_DEATHS_PROVE = 2
"""So many processes that died while they looked at one image alone, and the image is to blame."""

_LACKS_MEMORY = re.compile(
    "can't allocate memory|not enough memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)
_LOST_GPU = re.compile("(CUDA|CUDA driver|cuDNN|HIP) error")


class Holder:
    """A network in the hands of one actor, which is shown images some at a time.

    Attributes:
        stage: the stage that the images that fail have failed in.
    """

    stage: str

    def __init__(
        self,
        load: "Callable[[], Network]",
        *,
        sampling: int,
        bfloat16: bool,
        last_use: bool,
        batch_size: int | None,
        is_last: bool,
        tally: Any,
    ) -> None:
        """Take the network, to the GPU if the actor has one.

        Args:
            load: gets the network.
            sampling: which `pixels` column the network looks at.
            bfloat16: whether to run the network in that precision, in place of its own.
            last_use: whether to drop that column, since no later network looks at it.
            batch_size: images per forward pass; None for what suits the device.
            is_last: whether no network comes after this one.
            tally: the `progress.Tally` actor.
        """
        gc.disable()  # what torch makes as it loads is no garbage, and there is much of it
        self.network = load()
        gc.enable()
        self.device, self.batch_size = _settle(self.network, batch_size, tally is not None)
        if bfloat16:
            self.network.module.bfloat16()
        self.sampling = sampling
        self.last_use = last_use
        self.is_last = is_last
        self.tally = tally

    def images(self, samples: np.ndarray) -> "torch.Tensor":
        """Pixels as the network wants them, on its device."""
        import torch

        pixels = torch.from_numpy(samples)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return self.network.normalize(pixels.to(self.device, non_blocking=True))

    def without_pixels(self, batch: pa.Table) -> pa.Table:
        """A block without the pixels, if no later network looks at them."""
        return batch.drop_columns([f"pixels {self.sampling}"]) if self.last_use else batch

    def shown(
        self,
        look: Callable[[np.ndarray], _Seen],
        look_at_blank: Callable[[], object],
        batch: pa.Table,
        deaths: Sequence[Held],
        failures: dict[int, Failure],
    ) -> Iterator[tuple[np.ndarray, _Seen]]:
        """Some rows of a block at a time that have not failed, and what is seen of them.

        One row at a time where processes died of this block, or where the network raised
        something: so the image that is to blame is found, and its neighbours are looked at.

        Args:
            look: what is done with some rows.
            look_at_blank: the same with an image that is to blame for nothing.
            batch: the block.
            deaths: of processes that had it before.
            failures: by row, to be added to.
        """
        rows = np.flatnonzero(batch["error"].is_null().to_numpy())
        self.advance(len(batch) - len(rows))
        ids = batch["image_id"].to_numpy()
        blamed = Counter(death.image for death in deaths)
        if deaths:
            self._probe(look_at_blank)
        waiting = _one_by_one(rows) if deaths or not len(rows) else [rows]
        while waiting:
            chosen = waiting.pop()
            if len(chosen) > self.batch_size:
                waiting.append(chosen[self.batch_size :])
                chosen = chosen[: self.batch_size]
            if deaths:
                image = int(ids[chosen[0]])
                if blamed[image] >= _DEATHS_PROVE:
                    message = f"it killed {blamed[image]} processes of {self.network.name}"
                    failures[int(chosen[0])] = Failure(self.stage, "crashed", message)
                    self.advance(1)
                    continue
                hold(self.tally, image)
            try:
                seen = look(chosen)
            except Exception as error:
                leave_lost_gpu(error, self.tally)
                no_memory = _lacks_memory(error)
                if len(chosen) > 1:
                    if no_memory:
                        self.batch_size = len(chosen) // 2
                    waiting += [chosen] if no_memory else _one_by_one(chosen)
                    continue
                kind = "out_of_memory" if no_memory else "failed"
                failures[int(chosen[0])] = Failure(self.stage, kind, _in_one_line(error))
                self.advance(1)
                continue
            yield chosen, seen
            self.advance(len(chosen))

    def advance(self, images: int) -> None:
        """Tell the tally that the last network is through with some images."""
        if self.is_last:
            advance(self.tally, images)

    def _probe(self, look_at_blank: Callable[[], object]) -> None:
        """Look at a blank image: if that, too, ends the process, no image is to blame."""
        hold(self.tally, BLANK)
        try:
            look_at_blank()
        except Exception as error:
            leave_lost_gpu(error, self.tally)


def leave_lost_gpu(error: Exception, tally: Any) -> None:
    """End this process if an error says that it has lost its GPU; Ray starts another.

    No later CUDA call can succeed in it. Without a tally nobody starts another, and it is raised.
    """
    if _is_lost_gpu(error):
        if tally is None:
            raise error
        fall(tally, _in_one_line(error))
        os._exit(1)


def _settle(
    network: "Network", batch_size: int | None, in_pool: bool
) -> "tuple[torch.device, int]":
    """Move a network to where this process runs it.

    Args:
        network: the network.
        batch_size: how many images to run at once; None for what suits the device.
        in_pool: whether this process is an actor, which sees each GPU but may have been given none.

    Returns:
        The device, and how many images to run at once.
    """
    import torch

    given = not in_pool or ray.get_runtime_context().get_accelerator_ids()["GPU"]
    if given and torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)  # there are as many actors as cores
    network.module.to(device)
    for layer in network.module.modules():
        if isinstance(layer, torch.nn.Conv2d):  # as images are, or a GPU rearranges it in each pass
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return device, batch_size or (_BATCH_ON_GPU if device.type == "cuda" else _BATCH_ON_CPU)


def _one_by_one(rows: np.ndarray) -> list[np.ndarray]:
    """The rows each by itself, the first at the end, from where they are taken."""
    return list(rows[::-1, None])


def _lacks_memory(error: Exception) -> bool:
    """Whether fewer images at a time may do."""
    import torch

    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or bool(_LACKS_MEMORY.search(str(error)))


def _is_lost_gpu(error: Exception) -> bool:
    """Whether an error says that this process has lost its GPU, not that the network is wrong."""
    import torch

    if _lacks_memory(error):
        return False
    kind = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
    return isinstance(error, kind) or bool(_LOST_GPU.search(str(error)))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
