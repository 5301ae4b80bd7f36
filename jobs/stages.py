"""The stages of the explain job: each takes a batch of images and returns it with more columns.

One row is one image all the way. What goes wrong with an image is written into its row (`stage`,
`error`, `message`) and the later stages pass it by. The explanations of network N lie in the column
`explanations N`, for each image a list of structs as in `scacam.tables.EXPLANATION`.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from scacam.errors import ImageError
from scacam.images import Preprocessing, ViewName, decode, pixels, view_of
from scacam.localization import localize
from scacam.storage import read_bytes
from scacam.tables import EXPLANATION, pack_heatmaps, unpack_heatmaps

if TYPE_CHECKING:
    from scacam.networks import Network

__all__ = ["Decode", "Explain", "Localize", "explanations_column", "sampling_of"]

_READERS = 16
_FAILURE = pa.schema([("stage", pa.string()), ("error", pa.string()), ("message", pa.string())])
_LOCATION = ("peak_x", "peak_y", "box_x0", "box_y0", "box_x1", "box_y1")


def explanations_column(network: str) -> str:
    """The column of the stream that holds a network's explanations."""
    return f"explanations {network}"


def sampling_of(preprocessing: Preprocessing) -> Preprocessing:
    """The part of a preprocessing that decides the pixels: networks that share it share them."""
    channels = preprocessing.channels
    return replace(preprocessing, mean=(0.0,) * channels, std=(1.0,) * channels)


@dataclass(frozen=True)
class Decode:
    """Read and decode each image once; resample it once per distinct sampling.

    Adds `width`, `height`, the failure columns and, for sampling i, `pixels i` (uint8 tensors
    `[height, width, channels]`, zero where the image failed) and `view i`.
    """

    samplings: Sequence[Preprocessing]
    view: ViewName

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Decode one batch; takes and keeps the columns of the manifest."""
        count = len(batch)
        sizes = np.zeros((count, 2), dtype=np.int32)
        views = [np.zeros((count, 4), dtype=np.float32) for _ in self.samplings]
        samples = [
            np.zeros((count, *sampling.crop_size, sampling.channels), dtype=np.uint8)
            for sampling in self.samplings
        ]
        failures: dict[int, tuple[str, str, str]] = {}
        with ThreadPoolExecutor(_READERS) as readers:
            contents = readers.map(_read, batch["uri"].to_pylist())
            for row, content in enumerate(contents):
                try:
                    if isinstance(content, ImageError):
                        raise content
                    image = decode(content)
                    sizes[row] = image.size
                    for sampling, view, sample in zip(self.samplings, views, samples, strict=True):
                        view[row] = rectangle = view_of(*image.size, sampling, self.view)
                        sample[row] = pixels(image, rectangle, sampling)
                except ImageError as error:
                    stage = "read" if error is content else "decode"
                    failures[row] = (stage, error.kind, str(error))
        columns: dict[str, Any] = {name: batch[name] for name in batch.column_names}
        columns |= {"width": sizes[:, 0], "height": sizes[:, 1]}
        columns |= _failure_columns(count, failures)
        for index, (view, sample) in enumerate(zip(views, samples, strict=True)):
            columns[f"view {index}"] = pa.FixedShapeTensorArray.from_numpy_ndarray(view)
            columns[f"pixels {index}"] = pa.FixedShapeTensorArray.from_numpy_ndarray(sample)
        return pa.table(columns)


def _read(uri: str) -> bytes | ImageError:
    try:
        return read_bytes(uri)
    except FileNotFoundError:
        return ImageError("missing", "there is no such file")
    except PermissionError as error:
        return ImageError("forbidden", str(error))
    except (OSError, ValueError) as error:
        return ImageError("unreadable", str(error))


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
        last_use: bool,
        batch_size: int,
        tally: Any = None,
    ) -> None:
        """Take the network, to the GPU if the actor has one.

        Args:
            load: gets the network.
            methods: the methods to compute, of which unsupported ones are left out.
            top_k: how many classes to explain.
            explain_label: whether to explain the labelled class as well.
            sampling: which `pixels` column the network looks at.
            last_use: whether to drop that column, since no later network looks at it.
            batch_size: images per forward pass.
            tally: a `progress.Tally` actor to tell how many images are done, or None.
        """
        import torch

        from scacam.explainer import Explainer

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # as many actors as cores, each with one thread
        self.network = load()
        self.network.module.to(self.device)
        self.explainer = Explainer(self.network, methods, top_k)
        self.explain_label = explain_label
        self.sampling = sampling
        self.last_use = last_use
        self.batch_size = batch_size
        self.tally = tally

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Explain one block, `batch_size` images at a time."""
        failed = ~batch["error"].is_null().to_numpy()
        failures: dict[int, tuple[str, str, str]] = {}
        samples = _tensor(batch[f"pixels {self.sampling}"])
        views = _tensor(batch[f"view {self.sampling}"])
        labels = batch["label"].fill_null(-1).to_numpy()
        pieces: list[pa.StructArray] = []
        lengths = np.zeros(len(batch), dtype=np.int64)
        good = np.flatnonzero(~failed)
        for start in range(0, len(good), self.batch_size):
            rows = good[start : start + self.batch_size]
            explained = self._explain(samples[rows], labels[rows])
            finite = np.isfinite(explained["heatmaps"]).all((1, 2, 3, 4))
            finite &= np.isfinite(explained["probabilities"]).all(1)
            for row in rows[~finite]:
                message = f"{self.network.name} gives logits or heatmaps that are not finite"
                failures[int(row)] = ("explain", "not_finite", message)
            piece, counts = self._structs(explained, views[rows], labels[rows], finite)
            pieces.append(piece)
            lengths[rows] = counts
            if self.tally is not None:
                self.tally.add.remote(len(rows))
        if self.tally is not None and failed.any():
            self.tally.add.remote(int(failed.sum()))
        offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
        structs = pa.concat_arrays(pieces) if pieces else _no_explanations()
        lists = pa.ListArray.from_arrays(offsets, structs)
        if failures:
            failures |= {
                int(row): tuple(batch[name][int(row)].as_py() for name in _FAILURE.names)
                for row in np.flatnonzero(failed)
            }
            batch = batch.drop_columns(_FAILURE.names)
            for name, column in _failure_columns(len(batch), failures).items():
                batch = batch.append_column(name, column)
        if self.last_use:
            batch = batch.drop_columns([f"pixels {self.sampling}", f"view {self.sampling}"])
        return batch.append_column(explanations_column(self.network.name), lists)

    def _explain(self, samples: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        images = self.network.normalize(torch.from_numpy(samples).to(self.device))
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
        names = self.network.categories
        absent = pa.nulls(rows, pa.float32())
        view_rows = np.repeat(views, classes * len(methods), axis=0)[chosen]
        columns = {
            **{name: view_rows[:, i] for i, name in enumerate(EXPLANATION.names[:4])},
            "class_id": ids.astype(np.int32),
            "class_name": pa.nulls(rows, pa.string()) if names is None else [names[i] for i in ids],
            "rank": pa.array(per_row(ranks).astype(np.int16), mask=per_row(only_label)),
            "probability": per_row(explained["probabilities"]),
            "method": np.tile(np.array(methods, dtype=object), count * classes)[chosen],
            "heatmap": pa.ListArray.from_arrays(
                pa.array(np.arange(rows + 1) * height * width, pa.int32()), heatmaps.reshape(-1)
            ),
            "map_height": np.full(rows, height, dtype=np.int16),
            "map_width": np.full(rows, width, dtype=np.int16),
            "scale": scales,
            **dict.fromkeys(_LOCATION, absent),
        }
        struct = pa.table(columns, schema=EXPLANATION).to_struct_array().combine_chunks()
        return struct, kept.sum(1) * len(methods)


@dataclass(frozen=True)
class Localize:
    """Peak and box of every heatmap, on CPU workers."""

    input_sizes: dict[str, tuple[int, int]]
    """Height and width of the input, by network."""
    rectified: Collection[str]
    """The methods that apply a ReLU before they localize."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fill in the locations of one block."""
        for network, input_size in self.input_sizes.items():
            name = explanations_column(network)
            lists = batch[name].combine_chunks()
            rows = pa.Table.from_struct_array(lists.flatten())
            if len(rows):
                rows = _located(rows, input_size, self.rectified)
            structs = rows.cast(EXPLANATION).to_struct_array()
            structs = structs.combine_chunks() if structs.num_chunks else _no_explanations()
            lengths = lists.value_lengths().fill_null(0).to_numpy()
            offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
            index = batch.schema.get_field_index(name)
            batch = batch.set_column(index, name, pa.ListArray.from_arrays(offsets, structs))
        return batch


def _located(rows: pa.Table, input_size: tuple[int, int], rectified: Collection[str]) -> pa.Table:
    shape = (rows["map_height"][0].as_py(), rows["map_width"][0].as_py())
    packed = rows["heatmap"].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
    heatmaps = unpack_heatmaps(packed, rows["scale"].to_numpy())
    relu = np.array([name in rectified for name in rows["method"].to_pylist()])
    views = np.stack([rows[name].to_numpy() for name in EXPLANATION.names[:4]], axis=1)
    peaks, boxes = localize(heatmaps, relu, views, input_size)
    for name, values in zip(_LOCATION, np.concatenate([peaks, boxes], axis=1).T, strict=True):
        column = pa.array(values, pa.float32(), mask=np.isnan(values))
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def _failure_columns(count: int, failures: dict[int, tuple[str, str, str]]) -> dict[str, pa.Array]:
    rows = [failures.get(row, (None, None, None)) for row in range(count)]
    return {
        name: pa.array([row[index] for row in rows], pa.string())
        for index, name in enumerate(_FAILURE.names)
    }


def _tensor(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().to_numpy_ndarray()


def _no_explanations() -> pa.StructArray:
    return pa.array([], pa.struct(EXPLANATION))
