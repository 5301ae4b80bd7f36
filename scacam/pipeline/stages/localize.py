"""The stage after the networks, on CPU workers: what they say, as it will be stored.

To every heatmap come its peak and its box.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scacam.localization import localize
from scacam.pipeline.progress import taken_up
from scacam.pipeline.stages.rows import SAID, Failure, list_column, said, set_failures, tensors
from scacam.tables import (
    EXPLANATION,
    PREDICTION,
    explanations_folder,
    pack_heatmaps,
    predictions_folder,
)

__all__ = ["Localize", "Speaker"]

_VIEW, _LOCATION = EXPLANATION.names[:4], EXPLANATION.names[-6:]
_CHANNELS = PREDICTION.names[-3:]


class Speaker(NamedTuple):
    """What is known of a network where it is not.

    Attributes:
        name: its name.
        class_names: of all its classes.
        top_k: how many of them are explained of each image.
        sampling: which `view` column says what it looked at.
        input_size: height and width of its input.
        layers: by layer the methods, and height and width of their maps.
    """

    name: str
    class_names: Sequence[str]
    top_k: int
    sampling: int
    input_size: tuple[int, int]
    layers: Mapping[str, tuple[Sequence[str], tuple[int, int]]]


class _Classes(NamedTuple):
    """The K classes of those N images that have not failed.

    Attributes:
        images: bool, which images of the block those are.
        ids, probabilities: `[N, K]`.
        kept: bool `[N, K]`, which are stored.
    """

    images: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray
    kept: np.ndarray

    def lists(self, structs: pa.StructArray, of_each: int = 1) -> pa.ListArray:
        """A column of the block, from so many structs of each class that is stored."""
        lengths = np.zeros(len(self.images), dtype=np.int64)
        lengths[self.images] = of_each * self.kept.sum(1)
        return list_column([structs], lengths, structs.type)


@dataclass(frozen=True)
class Localize:
    """Turns what networks say of images into lists of explanations and predictions."""

    speakers: Sequence[Speaker]
    rectified: Collection[str]
    """The methods that apply a ReLU before they localize."""
    explain_label: bool
    min_probability: float
    """Classes that are less probable are left out, but for the most probable one and the label."""
    tally: Any

    @property
    def map_shapes(self) -> dict[str, tuple[int, int]]:
        """Height and width of the heatmaps, by the folder of explanations."""
        return {
            explanations_folder(speaker.name, layer): shape
            for speaker in self.speakers
            for layer, (_, shape) in speaker.layers.items()
        }

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Tabulate one block."""
        if not len(batch):
            return batch
        with taken_up(self.tally, "localize", batch):
            try:
                return self._localized(batch)
            except Exception:  # some image's map raises; the others have no part in it
                return self._one_by_one(batch)

    def _one_by_one(self, batch: pa.Table) -> pa.Table:
        images: list[pa.Table] = []
        failures: dict[int, Failure] = {}
        for row in range(len(batch)):
            image = batch.slice(row, 1)
            try:
                image = self._localized(image)
            except Exception as error:
                if not image["error"][0].is_valid:  # else an earlier stage has said why
                    message = f"{type(error).__name__}: {error}"
                    failures[row] = Failure("localize", "failed", message)
                image = self._localized(_silenced(image, self.speakers))
            images.append(image)
        return set_failures(pa.concat_tables(images), failures)

    def _localized(self, batch: pa.Table) -> pa.Table:
        for speaker in self.speakers:
            classes = self._classes(batch, speaker)
            predictions = classes.lists(_predictions(batch, speaker, classes))
            batch = batch.append_column(predictions_folder(speaker.name), predictions)
            for layer, (methods, _) in speaker.layers.items():
                structs = self._explanations(batch, speaker, classes, layer)
                lists = classes.lists(structs, len(methods))
                batch = batch.append_column(explanations_folder(speaker.name, layer), lists)
            batch = batch.drop_columns(_columns_of(speaker))
        return batch

    def _classes(self, batch: pa.Table, speaker: Speaker) -> _Classes:
        """The classes of a block's images, and which are stored."""
        images = pc.list_value_length(batch[said(speaker.name, "class_id")]).to_numpy() > 0
        shape = int(images.sum()), speaker.top_k + self.explain_label
        ids, probabilities = (
            _values(batch, speaker, what).reshape(shape) for what in ("class_id", "probability")
        )
        kept = probabilities >= self.min_probability
        kept[:, 0] = True
        if self.explain_label:
            labels = batch["label"].fill_null(-1).to_numpy()[images]
            labelled = ids == labels[:, None]
            kept |= labelled
            kept[:, -1] = (labels >= 0) & ~labelled[:, :-1].any(1)
        return _Classes(images, ids, probabilities, kept)

    def _explanations(
        self, batch: pa.Table, speaker: Speaker, classes: _Classes, layer: str
    ) -> pa.StructArray:
        """The explanations by a layer, image by image, class by class and method by method."""
        methods, (height, width) = speaker.layers[layer]
        of_each = len(methods)
        maps = _values(batch, speaker, layer).reshape(*classes.kept.shape, of_each, height, width)
        heatmaps, scales = pack_heatmaps(maps[classes.kept].reshape(-1, height, width))
        rows = len(heatmaps)
        views = tensors(batch[f"view {speaker.sampling}"])[classes.images]
        views = views.repeat(of_each * classes.kept.sum(1), axis=0)
        names = np.array(methods, dtype=object)
        relu = np.array([name in self.rectified for name in methods])
        peaks, boxes = localize(heatmaps, np.resize(relu, rows), views, speaker.input_size)
        located = np.concatenate([peaks, boxes], axis=1)
        ids, class_names, ranks, probabilities = _class_columns(speaker, classes, of_each)
        cells = pa.array(np.arange(rows + 1) * height * width, pa.int32())
        columns = {
            **{name: views[:, i] for i, name in enumerate(_VIEW)},
            "class_id": ids,
            "class_name": class_names,
            "rank": ranks,
            "probability": probabilities,
            "method": np.resize(names, rows),
            "heatmap": pa.ListArray.from_arrays(cells, heatmaps.reshape(-1)),
            "map_height": np.full(rows, height, dtype=np.int16),
            "map_width": np.full(rows, width, dtype=np.int16),
            "scale": scales,
            **{
                name: pa.array(located[:, i], pa.float32(), mask=np.isnan(located[:, i]))
                for i, name in enumerate(_LOCATION)
            },
        }
        return _structs(columns, EXPLANATION)


def _class_columns(
    speaker: Speaker, classes: _Classes, of_each: int
) -> tuple[np.ndarray, pa.Array, pa.Array, np.ndarray]:
    """Of the classes that are stored, so many times each: ids, names, ranks, probabilities."""
    kept = classes.kept
    ids = classes.ids[kept].repeat(of_each)
    ranks = np.tile(np.arange(1, kept.shape[1] + 1, dtype=np.int16), (len(kept), 1))
    ranks = ranks[kept].repeat(of_each)
    names = pa.array(speaker.class_names, pa.string()).take(pa.array(ids))
    of_label = pa.array(ranks, mask=ranks > speaker.top_k)
    return ids, names, of_label, classes.probabilities[kept].repeat(of_each)


def _predictions(batch: pa.Table, speaker: Speaker, classes: _Classes) -> pa.StructArray:
    """The predictions, image by image; with channels those of the top class and of the label."""
    kept = classes.kept
    ids, names, ranks, probabilities = _class_columns(speaker, classes, 1)
    named = pc.fill_null(pc.equal(ranks, 1), True).to_numpy(zero_copy_only=False)
    columns = {
        "class_id": ids,
        "class_name": names,
        "rank": ranks,
        "probability": probabilities,
        "logit": _values(batch, speaker, "logit").reshape(kept.shape)[kept],
    }
    for what in _CHANNELS:
        values = _values(batch, speaker, what)
        many = values.size // max(kept.size, 1)
        offsets = np.concatenate([[0], (many * named).cumsum()])
        columns[what] = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32(), mask=np.append(~named, False)),
            values.reshape(*kept.shape, many)[kept][named].reshape(-1),
        )
    return _structs(columns, PREDICTION)


def _structs(columns: Mapping[str, Any], schema: pa.Schema) -> pa.StructArray:
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.StructArray.from_arrays(arrays, fields=list(schema))


def _columns_of(speaker: Speaker) -> list[str]:
    return [said(speaker.name, what) for what in (*SAID, *speaker.layers)]


def _values(batch: pa.Table, speaker: Speaker, what: str) -> np.ndarray:
    return batch[said(speaker.name, what)].combine_chunks().flatten().to_numpy()


def _silenced(batch: pa.Table, speakers: Sequence[Speaker]) -> pa.Table:
    """The block as if no network had said anything of it."""
    nothing = np.zeros(len(batch), dtype=np.int64)
    for speaker in speakers:
        for name in _columns_of(speaker):
            index = batch.schema.get_field_index(name)
            kind = batch.schema.field(name).type.value_type
            batch = batch.set_column(index, name, list_column([], nothing, kind))
    return batch
