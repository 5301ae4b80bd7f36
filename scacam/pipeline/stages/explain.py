"""The stage that explains: pixels to what a network says, in plain numbers."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from scacam.pipeline.progress import Held, taken_up
from scacam.pipeline.stages.holder import Holder
from scacam.pipeline.stages.rows import SAID, Failure, list_column, said, set_failures, tensors
from scacam.tables import CHANNELS, embeddings_folder

if TYPE_CHECKING:
    import torch

    from scacam.networks import Network

__all__ = ["Explain"]

_LARGEST = 65504.0


class Explain(Holder):
    """One network, held by one actor: pixels to its classes and their raw maps.

    Adds the columns of `rows.said`, and the embedding of each image where that is wanted.
    """

    stage = "explain"

    def __init__(
        self,
        load: "Callable[[], Network]",
        *,
        methods: Sequence[str],
        top_k: int,
        explain_label: bool,
        embeddings: bool,
        compile: bool,
        **more: Any,
    ) -> None:
        """Take the network, to the GPU if the actor has one.

        Args:
            load: gets the network.
            methods: the methods to compute, of which unsupported ones are left out.
            top_k: how many classes to explain.
            explain_label: whether to explain the labelled class as well, which comes last; of an
                image without a label that is class 0.
            embeddings: whether to pass the pooled features on.
            compile: whether to compile the network; one that cannot be raises here.
            more: as `Holder` takes it.
        """
        from scacam.explainer import Explainer

        super().__init__(load, **more)
        self.explainer = Explainer(self.network, methods, top_k, CHANNELS)
        self.explain_label = explain_label
        name = self.network.name
        self.columns = {said(name, what): kind for what, kind in SAID.items()}
        self.columns |= {said(name, layer): pa.float32() for layer in self.explainer.layers}
        if embeddings:
            self.columns[embeddings_folder(name)] = pa.float16()
        if compile:
            self.network.module.compile()
            look = self.network.preprocessing
            shape = self.batch_size, *look.crop_size, look.channels
            self._explain(
                np.zeros(shape, dtype=np.uint8), np.zeros(self.batch_size, dtype=np.int64)
            )

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
                values = []
                for rows, columns in parts:
                    lengths[rows] = columns[name].shape[1]
                    values.append(pa.array(columns[name].reshape(-1)))
                batch = batch.append_column(name, list_column(values, lengths, kind))
            return batch

    def _explained(
        self, batch: pa.Table, deaths: Sequence[Held], failures: dict[int, Failure]
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Some rows at a time, those that are finite, and what is passed on of them."""
        samples = tensors(batch[f"pixels {self.sampling}"])
        labels = batch["label"].fill_null(-1).to_numpy()
        shown = self.shown(
            lambda chosen: self._explain(samples[chosen], labels[chosen]),
            lambda: self._explain(np.zeros_like(samples[:1]), labels[:1]),
            *(batch, deaths, failures),
        )
        for chosen, (finite, columns) in shown:
            if not finite.all():
                message = f"{self.network.name} gives logits or heatmaps that are not finite"
                for row in chosen[~finite]:
                    failures[int(row)] = Failure(self.stage, "not_finite", message)
                columns = {name: values[finite] for name, values in columns.items()}
            yield chosen[finite], columns

    def _explain(
        self, samples: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Which of some images are finite, and what the network says of them."""
        import torch

        images = self.images(samples)
        wanted = None
        if self.explain_label:
            wanted = torch.from_numpy(labels.clip(min=0)).long().to(self.device)
        explanation = self.explainer(images, wanted)
        probabilities = self.network.probabilities(explanation.logits)
        class_ids, channels = explanation.class_ids, explanation.channels
        assert channels is not None
        name = self.network.name
        numbers = {
            "class_id": class_ids.int(),
            "probability": probabilities.gather(1, class_ids).float(),
            "logit": explanation.logits.float().gather(1, class_ids),
            "channel_ids": channels.ids.short(),
            "channel_contributions": _halved(channels.contributions),
            "channel_cells": channels.cells.short(),
            **{
                layer: torch.stack(list(maps.values()), dim=2).float()
                for layer, maps in explanation.layers.items()
            },
        }
        found = {said(name, what): values.flatten(1) for what, values in numbers.items()}
        probable = found[said(name, "probability")].isfinite().all(1)
        maps = [found[said(name, layer)].isfinite().all(1) for layer in explanation.layers]
        found[embeddings_folder(name)] = _halved(explanation.pooled)
        finite = torch.stack([probable, *maps]).all(0)
        return finite.cpu().numpy(), {name: found[name].cpu().numpy() for name in self.columns}


def _halved(values: "torch.Tensor") -> "torch.Tensor":
    """In half precision, whose largest number stands for what is larger."""
    return values.clip(-_LARGEST, _LARGEST).half()
