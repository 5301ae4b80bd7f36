"""The stage that holds a network: pixels to explanations, on a GPU where there is one."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from scacam.pipeline.progress import taken_up
from scacam.pipeline.rows import Failure, explanations_column, list_column, set_failures, tensors
from scacam.tables import EXPLANATION, pack_heatmaps

if TYPE_CHECKING:
    import torch

    from scacam.networks import Network

__all__ = ["Explain", "settle"]

_ATTEMPTS = 3
_BATCH_ON_CPU, _BATCH_ON_GPU = 16, 64
"""On one thread, torch leaves 1 × 1 convolutions to oneDNN from 16 images on: a third faster."""


class Explain:
    """One network, held by one actor: pixels to explanations without their locations."""

    def __init__(
        self,
        load: "Callable[[], Network]",
        *,
        methods: Sequence[str],
        top_k: int,
        explain_label: bool,
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
            methods: the methods to compute, of which unsupported ones are left out.
            top_k: how many classes to explain.
            explain_label: whether to explain the labelled class as well.
            sampling: which `pixels` column the network looks at.
            bfloat16: whether to run the network in that precision, in place of its own.
            last_use: whether to drop that column, since no later network looks at it.
            batch_size: images per forward pass; None for what suits the device.
            is_last: whether no network comes after this one.
            tally: the `progress.Tally` actor.
        """
        from scacam.explainer import Explainer

        self.network = load()
        self.device, self.batch_size = settle(self.network, batch_size)
        if bfloat16:
            self.network.module.bfloat16()
        self.explainer = Explainer(self.network, methods, top_k)
        self.explain_label = explain_label
        self.sampling = sampling
        self.last_use = last_use
        self.is_last = is_last
        self.tally = tally

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Explain one block, some images at a time."""
        if not len(batch):
            return batch
        with taken_up(self.tally, f"explain {self.network.name}", batch) as attempts:
            rows = np.flatnonzero(batch["error"].is_null().to_numpy())
            failures: dict[int, Failure] = {}
            structs: list[pa.StructArray] = []
            lengths = np.zeros(len(batch), dtype=np.int64)
            if attempts < _ATTEMPTS:
                for done, struct, counts in self._explained(batch, rows, failures):
                    structs.append(struct)
                    lengths[done] = counts
            else:
                message = f"its block killed {attempts} processes of {self.network.name}"
                failures = dict.fromkeys(rows.tolist(), Failure("explain", "crashed", message))
            if failures:
                batch = set_failures(batch, failures)
            if self.last_use:
                batch = batch.drop_columns([f"pixels {self.sampling}", f"view {self.sampling}"])
            if self.is_last:
                self.tally.advance.remote(len(batch) - len(rows))
            column = list_column(structs, lengths)
            return batch.append_column(explanations_column(self.network.name), column)

    def _explained(
        self, batch: pa.Table, rows: np.ndarray, failures: dict[int, Failure]
    ) -> Iterator[tuple[np.ndarray, pa.StructArray, np.ndarray]]:
        """Some rows at a time, their explanations and how many of them each row has."""
        samples = tensors(batch[f"pixels {self.sampling}"])
        views = tensors(batch[f"view {self.sampling}"])
        labels = batch["label"].fill_null(-1).to_numpy()
        start, size = 0, self.batch_size
        while start < len(rows):
            chosen = rows[start : start + size]
            try:
                explained = self._explain(samples[chosen], labels[chosen])
            except (MemoryError, RuntimeError) as error:
                if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                    raise
                if size == 1:
                    failures[int(chosen[0])] = Failure("explain", "out_of_memory", str(error))
                    start += 1
                size = max(size // 2, 1)
                continue
            finite = np.isfinite(explained["heatmaps"]).all((1, 2, 3, 4))
            finite &= np.isfinite(explained["probabilities"]).all(1)
            message = f"{self.network.name} gives logits or heatmaps that are not finite"
            for row in chosen[~finite]:
                failures[int(row)] = Failure("explain", "not_finite", message)
            struct, counts = self._structs(explained, views[chosen], labels[chosen], finite)
            yield chosen, struct, counts
            start += len(chosen)
            if self.is_last:
                self.tally.advance.remote(len(chosen))

    def _explain(self, samples: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        pixels = torch.from_numpy(samples)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        images = self.network.normalize(pixels.to(self.device, non_blocking=True))
        # An image without a label gets class 0 explained, and that is left out again below.
        wanted = torch.from_numpy(labels.clip(min=0)).long().to(self.device)
        explanation = self.explainer(images, wanted if self.explain_label else None)
        probabilities = explanation.logits.float().softmax(1).gather(1, explanation.class_ids)
        maps = torch.stack([explanation.heatmaps[name] for name in self.explainer.methods], dim=2)
        return {
            "class_ids": explanation.class_ids.cpu().numpy(),
            "probabilities": probabilities.cpu().numpy(),
            "heatmaps": maps.float().cpu().numpy(),
        }

    def _structs(
        self,
        explained: dict[str, np.ndarray],
        views: np.ndarray,
        labels: np.ndarray,
        finite: np.ndarray,
    ) -> tuple[pa.StructArray, np.ndarray]:
        """The explanations of a batch as structs, and how many each image has."""
        class_ids = explained["class_ids"]
        count, classes = class_ids.shape
        methods = self.explainer.methods
        ranks = np.tile(np.arange(1, classes + 1), (count, 1))
        kept = np.tile(finite[:, None], (1, classes))
        only_label = ranks > self.explainer.top_k
        if self.explain_label:
            among_top = (class_ids[:, :-1] == labels[:, None]).any(1)
            kept[:, -1] &= (labels >= 0) & ~among_top
        chosen = np.repeat(kept.reshape(-1), len(methods))

        def per_row(values: np.ndarray) -> np.ndarray:
            return np.repeat(values.reshape(-1), len(methods))[chosen]

        maps = explained["heatmaps"]
        heatmaps, scales = pack_heatmaps(maps.reshape(-1, *maps.shape[-2:])[chosen])
        rows, height, width = heatmaps.shape
        ids = per_row(class_ids)
        absent = pa.nulls(rows, pa.float32())
        view_rows = np.repeat(views, classes * len(methods), axis=0)[chosen]
        columns = {
            **{name: view_rows[:, i] for i, name in enumerate(EXPLANATION.names[:4])},
            "class_id": ids.astype(np.int32),
            "class_name": [self.network.class_name(i) for i in ids],
            "rank": pa.array(per_row(ranks).astype(np.int16), mask=per_row(only_label)),
            "probability": per_row(explained["probabilities"]),
            "method": np.tile(np.array(methods, dtype=object), count * classes)[chosen],
            "heatmap": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1) * height * width, pa.int32()), heatmaps.reshape(-1)
            ),
            "map_height": np.full(rows, height, dtype=np.int16),
            "map_width": np.full(rows, width, dtype=np.int16),
            "scale": scales,
            **dict.fromkeys(EXPLANATION.names[-6:], absent),
        }
        struct = pa.table(columns, schema=EXPLANATION).to_struct_array().combine_chunks()
        return struct, kept.sum(1) * len(methods)


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
