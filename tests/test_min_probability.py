"""Of independent labels those that are probable are explained, and at least the most probable."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from PIL import Image
from tiny_networks import colours

from scacam import Network
from scacam.errors import RunError
from scacam.jobs import explain as job
from scacam.methods import METHODS
from scacam.pipeline.stages.explain import Explain
from scacam.pipeline.stream import stages

COLOURS = {"yellow": (255, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def _explained(
    folder: Path, labels: list[int | None], min_probability: float | None
) -> list[list[tuple[int, int | None]]]:
    """Class and rank of the rows of each image, of one method."""
    plain = colours()
    network = Network(plain.module, preprocessing=plain.preprocessing, output_kind="sigmoid")
    uris = []
    for name, colour in COLOURS.items():
        uris.append(str(folder / f"{name}.png"))
        Image.new("RGB", (40, 40), colour).save(uris[-1])
    absent = pa.nulls(len(uris), pa.int64())
    columns = {"image_id": range(len(uris)), "uri": uris, "label": pa.array(labels, pa.int32())}
    table = pa.table(columns | {"offset": absent, "size": absent})
    options = SimpleNamespace(
        methods=["gap_cam"],
        top_k=3,
        explain_label=True,
        min_probability=min_probability,
        embeddings=False,
        view="center_crop",
        bfloat16=False,
        compile=False,
        gpu_decode=False,
        batch_size=16,
    )
    decode, (arguments,), localize = stages(options, [network], None)
    batch = localize(Explain(lambda: network, **arguments)(decode(table)))
    (column,) = (name for name in batch.column_names if name.startswith("explanations/"))
    rows = batch[column].to_pylist()
    return [[(row["class_id"], row["rank"]) for row in image] for image in rows]


def test_classes_above_a_threshold(tmp_path: Path) -> None:
    # Logits of red, green, blue and gray: yellow 5/3, 5/3, -7/3, 1/3; blue -4/3, -4/3, 8/3, 0.
    every = _explained(tmp_path, [None, None, None], None)
    assert [len(rows) for rows in every] == [3, 3, 3]
    probable = _explained(tmp_path, [None, None, None], 0.6)
    assert probable == [every[0][:2], every[1][:1], every[2][:1]]  # black has none above 0.5


def test_the_label_is_explained_all_the_same(tmp_path: Path) -> None:
    ranks = [
        dict(rows) for rows in _explained(tmp_path, [2, 3, 0], 0.6)
    ]  # the last, the second and any of the classes
    assert ranks[0].pop(2) is None
    assert sorted(ranks[0].values()) == [1, 2]
    assert ranks[1] == {2: 1, 3: 2}
    assert 0 in ranks[2]


@pytest.mark.parametrize("share", [0.0, 1.0, -3.0])
def test_what_is_no_threshold_is_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--min-probability must lie between 0 and 1"):
        job.run(
            input=str(tmp_path),
            output=str(tmp_path / "out"),
            networks=["resnet18=random"],
            methods=list(METHODS),
            min_probability=share,
        )
