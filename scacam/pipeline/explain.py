"""The stage that holds a network: pixels to explanations, on a GPU where there is one."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from scacam.pipeline.progress import BLANK, Held, fall, hold, taken_up
from scacam.pipeline.rows import Failure, list_column, set_failures, tensors
from scacam.tables import (
    CHANNELS,
    EXPLANATION,
    PREDICTION,
    embeddings_folder,
    explanations_folder,
    pack_heatmaps,
    predictions_folder,
)

if TYPE_CHECKING:
    import torch

    from scacam.networks import Network

__all__ = ["Explain", "Holder", "settle"]

_Seen = TypeVar("_Seen")

_BATCH_ON_CPU, _BATCH_ON_GPU = 16, 64
"""On one thread, torch leaves 1 × 1 convolutions to oneDNN from 16 images on: a third faster."""

_LARGEST = 65504.0
_DEATHS_PROVE = 2
"""So many processes that died while they looked at one image alone, and the image is to blame."""

_LACKS_MEMORY = re.compile(
    "can't allocate memory|not enough memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)
_LOST_GPU = re.compile("(CUDA|CUDA driver|cuDNN|HIP) error")


class _Explained(NamedTuple):
    """What the network says of N images and K classes of each.

    Attributes:
        class_ids, probabilities, logits: `[N, K]`.
        heatmaps: by layer, `[N, K, methods, h, w]`.
        channels: ids, contributions and cells of those that add most, `[N, K, M]` each.
        pooled: `[N, C]`, in half precision.
    """

    class_ids: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray
    heatmaps: dict[str, np.ndarray]
    channels: tuple[np.ndarray, np.ndarray, np.ndarray]
    pooled: np.ndarray


_Lists = dict[str, tuple[pa.Array, np.ndarray]]
"""What is passed on of some images, by column: the values of all, and how many each has."""


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
        self.network = load()
        self.device, self.batch_size = settle(self.network, batch_size)
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
        """A block without what no later network looks at."""
        if not self.last_use:
            return batch
        return batch.drop_columns([f"pixels {self.sampling}", f"view {self.sampling}"])

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
                if _is_lost_gpu(error):
                    self._fall(error)
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
            self.tally.advance.remote(images)

    def _probe(self, look_at_blank: Callable[[], object]) -> None:
        """Look at a blank image: if that, too, ends the process, no image is to blame."""
        hold(self.tally, BLANK)
        try:
            look_at_blank()
        except Exception as error:
            if _is_lost_gpu(error):
                self._fall(error)

    def _fall(self, error: Exception) -> None:
        """End this process, in which no later CUDA call can succeed; Ray starts another."""
        if self.tally is None:
            raise error
        fall(self.tally, _in_one_line(error))
        os._exit(1)


class Explain(Holder):
    """One network, held by one actor: pixels to explanations without their locations."""

    stage = "explain"

    def __init__(
        self,
        load: "Callable[[], Network]",
        *,
        methods: Sequence[str],
        top_k: int,
        explain_label: bool,
        embeddings: bool,
        min_probability: float | None = None,
        **more: Any,
    ) -> None:
        """Take the network, to the GPU if the actor has one.

        Args:
            load: gets the network.
            methods: the methods to compute, of which unsupported ones are left out.
            top_k: how many classes to explain.
            explain_label: whether to explain the labelled class as well.
            embeddings: whether to pass the pooled features on.
            min_probability: leave out classes that are less probable, but for the most probable
                one and the label.
            more: as `Holder` takes it.
        """
        from scacam.explainer import Explainer

        super().__init__(load, **more)
        self.explainer = Explainer(self.network, methods, top_k, CHANNELS)
        self.explain_label = explain_label
        self.min_probability = min_probability or 0
        name = self.network.name
        self.columns: dict[str, pa.DataType] = {
            explanations_folder(name, layer): pa.struct(EXPLANATION)
            for layer in self.explainer.layers
        }
        self.columns[predictions_folder(name)] = pa.struct(PREDICTION)
        if embeddings:
            self.columns[embeddings_folder(name)] = pa.float16()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Explain one block, some images at a time."""
        if not len(batch):
            return batch
        with taken_up(self.tally, f"explain {self.network.name}", batch) as deaths:
            failures: dict[int, Failure] = {}
            parts = list(self._explained(batch, deaths, failures))
            if failures:
                batch = set_failures(batch, failures)
            batch = self.without_pixels(batch)
            for name, kind in self.columns.items():
                lengths = np.zeros(len(batch), dtype=np.int64)
                for rows, lists in parts:
                    lengths[rows] = lists[name][1]
                column = list_column([lists[name][0] for _, lists in parts], lengths, kind)
                batch = batch.append_column(name, column)
            return batch

    def _explained(
        self, batch: pa.Table, deaths: Sequence[Held], failures: dict[int, Failure]
    ) -> Iterator[tuple[np.ndarray, _Lists]]:
        """Some rows at a time, and what is passed on of them."""
        samples = tensors(batch[f"pixels {self.sampling}"])
        views = tensors(batch[f"view {self.sampling}"])
        labels = batch["label"].fill_null(-1).to_numpy()
        shown = self.shown(
            lambda chosen: self._explain(samples[chosen], labels[chosen]),
            lambda: self._explain(np.zeros_like(samples[:1]), labels[:1]),
            *(batch, deaths, failures),
        )
        for chosen, explained in shown:
            finite = np.isfinite(explained.probabilities).all(1)
            for maps in explained.heatmaps.values():
                finite &= np.isfinite(maps).all((1, 2, 3, 4))
            message = f"{self.network.name} gives logits or heatmaps that are not finite"
            for row in chosen[~finite]:
                failures[int(row)] = Failure(self.stage, "not_finite", message)
            kept = self._kept(explained, labels[chosen], finite)
            yield chosen, self._lists(explained, views[chosen], kept)

    def _explain(self, samples: np.ndarray, labels: np.ndarray) -> "_Explained":
        import torch

        images = self.images(samples)
        # An image without a label gets class 0 explained, and that is left out again below.
        wanted = torch.from_numpy(labels.clip(min=0)).long().to(self.device)
        explanation = self.explainer(images, wanted if self.explain_label else None)
        probabilities = self.network.probabilities(explanation.logits)
        class_ids, channels = explanation.class_ids, explanation.channels
        assert channels is not None
        return _Explained(
            class_ids.cpu().numpy(),
            probabilities.gather(1, class_ids).cpu().numpy(),
            explanation.logits.float().gather(1, class_ids).cpu().numpy(),
            {
                layer: torch.stack(list(maps.values()), dim=2).float().cpu().numpy()
                for layer, maps in explanation.layers.items()
            },
            (
                channels.ids.short().cpu().numpy(),
                _halved(channels.contributions).cpu().numpy(),
                channels.cells.short().cpu().numpy(),
            ),
            _halved(explanation.pooled).cpu().numpy(),
        )

    def _kept(self, explained: "_Explained", labels: np.ndarray, finite: np.ndarray) -> np.ndarray:
        """Which classes of each image are stored: bool `[N, K]`."""
        kept = explained.probabilities >= self.min_probability
        kept[:, 0] = True
        if self.explain_label:
            labelled = explained.class_ids == labels[:, None]
            kept |= labelled
            kept[:, -1] = (labels >= 0) & ~labelled[:, :-1].any(1)
        return kept & finite[:, None]

    def _lists(self, explained: "_Explained", views: np.ndarray, kept: np.ndarray) -> _Lists:
        """What is passed on, by column: the values, and how many of them each image has."""
        name, classes = self.network.name, kept.sum(1)
        found: _Lists = {}
        for layer, methods in self.explainer.layers.items():
            structs = self._structs(explained, layer, views, kept)
            found[explanations_folder(name, layer)] = structs, classes * len(methods)
        found[predictions_folder(name)] = self._predictions(explained, kept), classes
        count, channels = explained.pooled.shape
        vectors = pa.array(explained.pooled.reshape(-1)), np.full(count, channels)
        found[embeddings_folder(name)] = vectors
        return found

    def _predictions(self, explained: "_Explained", kept: np.ndarray) -> pa.StructArray:
        """The classes of a batch, as structs."""
        ranks = np.tile(np.arange(1, kept.shape[1] + 1), (len(kept), 1))[kept]
        of_label = ranks > self.explainer.top_k
        named = (ranks == 1) | of_label
        ids = explained.class_ids[kept]
        many = explained.channels[0].shape[2]
        offsets = pa.array(
            np.concatenate([[0], (many * named).cumsum()]),
            pa.int32(),
            mask=np.append(~named, [False]),
        )
        channels = (
            pa.ListArray.from_arrays(offsets, values[kept][named].reshape(-1))
            for values in explained.channels
        )
        columns = (
            ids.astype(np.int32),
            [self.network.class_name(i) for i in ids],
            pa.array(ranks.astype(np.int16), mask=of_label),
            explained.probabilities[kept],
            explained.logits[kept],
            *channels,
        )
        return pa.table(list(columns), schema=PREDICTION).to_struct_array().combine_chunks()

    def _structs(
        self, explained: "_Explained", layer: str, views: np.ndarray, kept: np.ndarray
    ) -> pa.StructArray:
        """The explanations of a batch by a layer, as structs."""
        count, classes = kept.shape
        methods = self.explainer.layers[layer]
        ranks = np.tile(np.arange(1, classes + 1), (count, 1))
        only_label = ranks > self.explainer.top_k
        chosen = np.repeat(kept.reshape(-1), len(methods))

        def per_row(values: np.ndarray) -> np.ndarray:
            return np.repeat(values.reshape(-1), len(methods))[chosen]

        maps = explained.heatmaps[layer]
        heatmaps, scales = pack_heatmaps(maps.reshape(-1, *maps.shape[-2:])[chosen])
        rows, height, width = heatmaps.shape
        ids = per_row(explained.class_ids)
        absent = pa.nulls(rows, pa.float32())
        view_rows = np.repeat(views, classes * len(methods), axis=0)[chosen]
        columns = {
            **{name: view_rows[:, i] for i, name in enumerate(EXPLANATION.names[:4])},
            "class_id": ids.astype(np.int32),
            "class_name": [self.network.class_name(i) for i in ids],
            "rank": pa.array(per_row(ranks).astype(np.int16), mask=per_row(only_label)),
            "probability": per_row(explained.probabilities),
            "method": np.tile(np.array(methods, dtype=object), count * classes)[chosen],
            "heatmap": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1) * height * width, pa.int32()), heatmaps.reshape(-1)
            ),
            "map_height": np.full(rows, height, dtype=np.int16),
            "map_width": np.full(rows, width, dtype=np.int16),
            "scale": scales,
            **dict.fromkeys(EXPLANATION.names[-6:], absent),
        }
        return pa.table(columns, schema=EXPLANATION).to_struct_array().combine_chunks()


def settle(network: "Network", batch_size: int | None) -> "tuple[torch.device, int]":
    """Move a network to where this process runs it.

    Args:
        network: the network.
        batch_size: how many images to run at once; None for what suits the device.

    Returns:
        The device, and how many images to run at once.
    """
    import torch

    if torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)  # there are as many actors as cores
    network.module.to(device)
    return device, batch_size or (_BATCH_ON_GPU if device.type == "cuda" else _BATCH_ON_CPU)


def _halved(values: "torch.Tensor") -> "torch.Tensor":
    """In half precision, whose largest number stands for what is larger."""
    return values.clip(-_LARGEST, _LARGEST).half()


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
