"""The stage that tries maps: pixels and stored maps to how faithful these are."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.pipeline.progress import Held, taken_up
from scacam.pipeline.stages.holder import Holder
from scacam.pipeline.stages.rows import Failure, list_column, set_failures, tensors
from scacam.runs.results import Claimant, open_run
from scacam.trials.metrics import BASELINES
from scacam.trials.tables import IMAGE_FAITHFULNESS, PASS, images_folder

if TYPE_CHECKING:
    from scacam.networks import Network
    from scacam.trials.faithfulness import Faithfulness

__all__ = ["Try"]

_STORED = pa.schema(list(IMAGE_FAITHFULNESS)[2:])


class Try(Holder):
    """One network, held by one actor: pixels and stored maps to how faithful these are.

    Adds a column that is called as the folder of the results: of each image a list of structs.
    """

    stage = PASS

    def __init__(
        self,
        load: "Callable[[], Network]",
        *,
        run: str,
        claimants: Sequence[Claimant],
        top_k: int,
        metrics: Sequence[str],
        steps: int,
        **more: Any,
    ) -> None:
        """Take the network, to the GPU if the actor has one.

        Args:
            load: gets the network.
            run: the run whose maps are tried.
            claimants: those of this network whose maps are tried.
            top_k: how many classes of each image the run has, of networks with so many.
            metrics: names of metrics.
            steps: of the curves of deletion and insertion.
            more: as `Holder` takes it.
        """
        from scacam.trials.case import Tried
        from scacam.trials.faithfulness import Trials

        super().__init__(load, **more)
        self.run = open_run(run)
        self.claimants = claimants
        self.top_k = min(top_k, self.network.num_classes)
        tried = [Tried(one.name, one.method, one.layer) for one in claimants]
        self.trials = Trials(self.network, tried, metrics, steps, self.batch_size)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Try the maps of one block, some images at a time."""
        if not len(batch):
            return batch
        with taken_up(self.tally, f"try {self.network.name}", batch) as deaths:
            batch, found = self._tried(batch, deaths)
            lengths = np.zeros(len(batch), dtype=np.int64)
            structs = []
            for rows, faithfulness in found:
                structs.append(_structs(faithfulness, self.claimants))
                lengths[rows] = len(faithfulness.claimants)
            column = list_column(structs, lengths, pa.struct(_STORED))
            batch = self.without_pixels(batch)
            return batch.append_column(images_folder(self.network.name), column)

    def _tried(
        self, batch: pa.Table, deaths: Sequence[Held]
    ) -> "tuple[pa.Table, list[tuple[np.ndarray, Faithfulness]]]":
        """A block with what failed in it, and what was found of the rows that did not."""
        failures: dict[int, Failure] = {}
        ids = batch["image_id"].to_numpy()
        maps, class_ids, sizes = self._maps(ids)
        decoded = np.stack([batch[name].to_numpy() for name in ("width", "height")], axis=1)
        good = batch["error"].is_null().to_numpy()
        for row in np.flatnonzero(good & (decoded != sizes).any(1)):
            message = f"it was {sizes[row][0]} × {sizes[row][1]} pixels when it was explained"
            failures[int(row)] = Failure(self.stage, "changed", message)
        if failures:
            batch = set_failures(batch, failures)
            failures = {}
        samples = tensors(batch[f"pixels {self.sampling}"])

        def look(rows: np.ndarray, blank: bool = False) -> "Faithfulness":
            self.trials.batch_size = self.batch_size
            pixels = np.zeros_like(samples[rows]) if blank else samples[rows]
            chosen = {name: each[rows] for name, each in maps.items()}
            return self.trials.of_arrays(
                self.images(pixels), chosen, ids[rows].tolist(), class_ids[rows]
            )

        found = []
        first = np.zeros(1, dtype=np.int64)
        for rows, tried in self.shown(look, lambda: look(first, True), batch, deaths, failures):
            finite = np.isfinite(np.stack(list(tried.metrics.values()))).all((0, 2))
            for row in rows[~finite]:
                message = f"what {self.network.name} says of it is not finite"
                failures[int(row)] = Failure(self.stage, "not_finite", message)
            found.append((rows[finite], tried.of(finite)))
        return set_failures(batch, failures) if failures else batch, found

    def _maps(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """The stored maps of some images by claimant: `[N, top_k, h, w]`.

        And the top class of each, and its width and height as they were.
        """
        order = np.argsort(ids)
        classes = np.zeros(len(ids), dtype=np.int64)
        sizes = np.zeros((len(ids), 2), dtype=np.int32)
        maps = {
            one.name: np.zeros((len(ids), self.top_k, *one.map_shape), dtype=np.float16)
            for one in self.claimants
        }
        columns = ["image_id", "width", "height", "class_id", "rank", "method", "heatmap"]
        for layer in dict.fromkeys(one.layer for one in self.claimants):
            names = {one.method: one.name for one in self.claimants if one.layer == layer}
            where = (pc.field("rank") <= self.top_k) & pc.field("method").isin(list(names))
            table = self.run.explanations(
                self.network.name, None, columns, where, ids, layer=layer
            ).to_table()
            places = order[np.searchsorted(ids[order], table["image_id"].to_numpy())]
            ranks = table["rank"].to_numpy() - 1
            heatmaps = tensors(table["heatmap"])
            methods = np.array(table["method"].to_pylist(), dtype=object)
            for method, name in names.items():
                own = methods == method
                maps[name][places[own], ranks[own]] = heatmaps[own]
            top = ranks == 0
            classes[places[top]] = table["class_id"].to_numpy()[top]
            for axis, side in enumerate(("width", "height")):
                sizes[places[top], axis] = table[side].to_numpy()[top]
        return maps, classes, sizes


def _structs(found: "Faithfulness", methods: Sequence[Claimant]) -> pa.StructArray:
    """Image by image and claimant by claimant, as they are stored."""
    images, claimants = len(found.class_ids), len(found.claimants)
    columns: dict[str, Any] = {
        "method": [*(one.method for one in methods), *BASELINES] * images,
        "layer": [*(one.layer for one in methods), *[None] * len(BASELINES)] * images,
        "class_id": np.repeat(found.class_ids, claimants),
        "probability": np.repeat(found.probability, claimants),
        **{name: values.ravel() for name, values in found.metrics.items()},
        **{
            name: list(values.reshape(-1, values.shape[-1]))
            for name, values in found.curves.items()
        },
    }
    rows = images * claimants
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(rows, field.type)
        for field in _STORED
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(_STORED))
