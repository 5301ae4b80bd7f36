"""The first stage: reads and decodes each image once, resamples it once per distinct sampling."""

import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from scacam.errors import ImageError, RunError
from scacam.images import Preprocessing, Seen, ViewName, see
from scacam.images.jpegs import PlainJpeg, plain_jpeg, see_together
from scacam.inputs.containers import Place, read_together, together
from scacam.pipeline.progress import taken_up
from scacam.pipeline.stages.holder import leave_lost_gpu
from scacam.pipeline.stages.rows import Failure, set_failures
from scacam.storage import PATIENCE_S, is_transient, read_ahead, read_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["Decode", "DecodeOnGpu"]

_TOGETHER = 128
_PIXELS_TOGETHER = 1 << 26
"""Of JPEGs that a GPU decodes at once, with 3 bytes for each: little of what a GPU has."""

_FOR_ONE = 0.25
"""The share of the patience with a store that one image gets, if the store gives others."""

_given: dict[str, str] = {}
"""By bucket, or for the whole web, the uri of the image that this process could read last."""


@dataclass(frozen=True)
class Decode:
    """Adds to rows of the manifest what the networks need to see.

    These are `width`, `height`, the failure columns and, for sampling i, `pixels i` (uint8 tensors
    `[height, width, channels]`, zero where the image failed) and `view i`.
    """

    samplings: Sequence[Preprocessing]
    view: ViewName
    tally: Any

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Decode one block."""
        if not len(batch):
            return batch
        with taken_up(self.tally, "decode", batch) as attempts:
            return self._decoded(batch, died=bool(attempts))

    def _decoded(self, batch: pa.Table, died: bool) -> pa.Table:
        count = len(batch)
        sizes = np.zeros((count, 2), dtype=np.int32)
        views = [np.zeros((count, 4), dtype=np.float32) for _ in self.samplings]
        samples = [
            np.zeros((count, *sampling.crop_size, sampling.channels), dtype=np.uint8)
            for sampling in self.samplings
        ]
        failures: dict[int, Failure] = {}
        files = _read(batch, failures)
        with _isolated() if died else _here() as run:
            for row, data, before in Decode._seen(self, files) if died else self._seen(files):
                try:
                    sizes[row], seen = before or run(see, data, self.samplings, self.view)
                    for index, (view, sample) in enumerate(seen):
                        views[index][row] = view
                        samples[index][row] = sample
                except ImageError as error:
                    failures[row] = Failure("decode", error.kind, str(error))
                except Exception as error:  # whatever it is, the other images have no part in it
                    failures[row] = Failure("decode", "failed", f"{type(error).__name__}: {error}")
        found: dict[str, Any] = {name: batch[name] for name in batch.column_names}
        found |= {"width": sizes[:, 0], "height": sizes[:, 1]}
        for index, (view, sample) in enumerate(zip(views, samples, strict=True)):
            found[f"view {index}"] = pa.FixedShapeTensorArray.from_numpy_ndarray(view)
            found[f"pixels {index}"] = pa.FixedShapeTensorArray.from_numpy_ndarray(sample)
        return set_failures(pa.table(found), failures)

    def _seen(self, files: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes, Seen | None]]:
        """Rows with their bytes, and what is seen already of those for which `see` is spared."""
        for row, data in files:
            yield row, data, None


class DecodeOnGpu(Decode):
    """The same, but that plain JPEGs are decoded and resampled many at a time, on the actor's GPU.

    What is none, and what the GPU refuses, is decoded as it is without one, and so is a block that
    a process died of. An actor without a GPU decodes them in the same way on the CPU.
    """

    @cached_property
    def device(self) -> "torch.device":
        """Where JPEGs are decoded. Raises RunError if this torchvision decodes none there."""
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # there are as many actors as cores
            return torch.device("cpu")
        device = torch.device("cuda")
        try:
            see_together([_smallest_jpeg()], self.samplings, self.view, device)
        except Exception as error:
            leave_lost_gpu(error, self.tally)
            reason = str(error).strip().partition("\n")[0]
            raise RunError(
                f"no JPEG can be decoded on a GPU here: {reason}; install a torchvision that has "
                "nvJPEG, or leave --gpu-decode out"
            ) from error
        return device

    def _seen(self, files: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes, Seen | None]]:
        plain: dict[int, PlainJpeg] = {}
        held = 0
        for row, data in files:
            jpeg = plain_jpeg(data)
            if jpeg is None:
                yield row, data, None
                continue
            area = jpeg.width * jpeg.height
            if len(plain) == _TOGETHER or held + area > _PIXELS_TOGETHER:
                yield from self._seen_plain(plain)
                plain, held = {}, 0
            plain[row] = jpeg
            held += area
        yield from self._seen_plain(plain)

    def _seen_plain(self, plain: dict[int, PlainJpeg]) -> Iterator[tuple[int, bytes, Seen | None]]:
        seen = self._tried(list(plain.values()))
        for (row, jpeg), one in zip(plain.items(), seen, strict=True):
            yield row, jpeg.data, one

    def _tried(self, jpegs: Sequence[PlainJpeg]) -> Sequence[Seen | None]:
        """What is seen of some, in halves if together they raise; None of one that does alone."""
        import torch

        if not jpegs:
            return []
        device = self.device
        try:
            return see_together(jpegs, self.samplings, self.view, device)
        except Exception as error:
            leave_lost_gpu(error, self.tally)
        if device.type == "cuda":  # nvJPEG does not say what became of the GPU
            try:
                torch.cuda.synchronize()
            except Exception as error:
                leave_lost_gpu(error, self.tally)
        if len(jpegs) == 1:
            return [None]
        half = len(jpegs) // 2
        return [*self._tried(jpegs[:half]), *self._tried(jpegs[half:])]


def _smallest_jpeg() -> PlainJpeg:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return PlainJpeg(buffer.getvalue(), 16, 16, is_gray=False)


def _read(batch: pa.Table, failures: dict[int, Failure]) -> Iterator[tuple[int, bytes]]:
    """Row by row the bytes of the images; why they cannot be had is added to the failures."""
    reader = _Reader()
    columns = [batch[name].to_pylist() for name in Place._fields]
    groups = together(map(Place, *columns))
    for row, content in enumerate(chain.from_iterable(read_ahead(reader.read, groups))):
        if isinstance(content, ImageError):
            failures[row] = Failure("read", content.kind, str(content))
        else:
            yield row, content


@contextmanager
def _here() -> Iterator[Callable[..., Any]]:
    """Run functions in this process."""
    yield lambda function, *arguments: function(*arguments)


@contextmanager
def _isolated() -> Iterator[Callable[..., Any]]:
    """Run functions in a process of their own, since an image may have killed the last one.

    Raises ImageError in place of dying.
    """
    child = [ProcessPoolExecutor(1, get_context("spawn"))]

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return child[0].submit(function, *arguments).result()
        except BrokenProcessPool as error:
            child[0] = ProcessPoolExecutor(1, get_context("spawn"))
            raise ImageError("crashed", "decoding it killed the process") from error

    try:
        yield run
    finally:
        child[0].shutdown()


class _Reader:
    """Reads images; its patience with a store that fails is shared by all reads of a block."""

    def __init__(self) -> None:
        self.deadlines: dict[str, float] = {}
        """Of stores that gave nothing since they failed."""

    def read(self, group: Sequence[Place]) -> Sequence[bytes | ImageError]:
        """The bytes of images that are one group of `together`, or why they cannot be had."""
        found = self._read(group)
        if not isinstance(found, ImageError):
            return found
        if len(group) == 1:
            return [found]
        return [content for place in group for content in self.read([place])]

    def _read(self, group: Sequence[Place]) -> list[bytes] | ImageError:
        """The same, as far as all can be had.

        Raises:
            RunError: the store is out of reach: for `PATIENCE_S` it gave nothing.
        """
        uri, wait = group[0].uri, 0.5
        store = _store(uri)
        given_up: float | None = None
        while True:
            try:
                content = read_together(group)
            except FileNotFoundError:
                return ImageError("missing", "there is no such file")
            except PermissionError as error:
                return ImageError("forbidden", str(error))
            except Exception as error:
                if not is_transient(error):
                    return ImageError("unreadable", str(error) or type(error).__name__)
                now = time.monotonic()
                given_up = given_up or now + _FOR_ONE * PATIENCE_S
                deadline = self.deadlines.setdefault(store, now + PATIENCE_S)
                if now + wait > min(given_up, deadline):
                    if not _is_out(uri):
                        return ImageError("unreadable", str(error))
                    if now + wait > deadline:
                        raise RunError(
                            f"the input has been out of reach for {PATIENCE_S:g} s: {error}"
                        ) from error
                time.sleep(wait)
                wait = min(2 * wait, 10.0)
            else:
                self.deadlines.pop(store, None)
                _given[_whole(store)] = uri
                return content


def _store(uri: str) -> str:
    """The bucket or host of an image; the local disk has no name."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if separator else ""


def _whole(store: str) -> str:
    """What is out of reach as one: a bucket, but of the web no single host, only all of it."""
    return "http" if store.startswith("http") else store


def _is_out(uri: str) -> bool:
    """Whether what holds an image no longer gives what it gave before.

    Where it never gave anything a bucket is out of reach, and a host of the web is not there.
    """
    whole = _whole(_store(uri))
    given = _given.get(whole)
    if given is None:
        return whole != "http"
    container, _, _ = given.rpartition("::")
    try:
        read_bytes(container or given, 0, 1)
    except Exception as error:
        return is_transient(error)
    return False
