"""Every kind of input becomes the same manifest, and its images can be read back by uri."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scacam.errors import RunError
from scacam.inputs.containers import read_image
from scacam.inputs.manifest import read_manifest, refuse_unknown_labels
from scacam.tables import MANIFEST


def listed(source, limit=None):
    manifest = read_manifest(str(source), limit)
    assert manifest.table.schema == MANIFEST
    assert manifest.table["image_id"].to_pylist() == list(range(len(manifest.table)))
    return manifest.table.to_pylist(), manifest.ignored


def test_a_folder_is_read_recursively_in_order(tmp_path, photo_bytes):
    for name in ("b/2.JPG", "b/1.png", "a.jpeg", "notes.txt", "c d#%.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo_bytes())
    rows, ignored = listed(tmp_path)
    assert [row["uri"] for row in rows] == [
        str(tmp_path / name) for name in ("a.jpeg", "b/1.png", "b/2.JPG", "c d#%.webp")
    ]
    assert {row["size"] for row in rows} == {len(photo_bytes())}
    assert ignored == 1
    assert len(listed(tmp_path, limit=2)[0]) == 2


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_manifest_is_relative_to_its_folder(tmp_path, suffix):
    table = pa.table(
        {"uri": ["a.jpg", "/x/b.jpg", "s3://bucket/c d.jpg", "a.jpg"], "label": [1, None, 0, 1]}
    )
    path = tmp_path / f"manifest.{suffix}"
    if suffix == "csv":
        path.write_text("uri,label\na.jpg,1\n/x/b.jpg,\ns3://bucket/c d.jpg,0\na.jpg,1\n")
    else:
        pq.write_table(table, path)
    rows, _ = listed(path)
    assert [(row["uri"], row["label"]) for row in rows] == [
        (f"{tmp_path}/a.jpg", 1),
        ("/x/b.jpg", None),
        ("s3://bucket/c d.jpg", 0),
        (f"{tmp_path}/a.jpg", 1),
    ]


def test_tar_shards(tmp_path, photo_bytes):
    contents = {}
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:03d}.tar", "w") as tar:
            for index in range(3):
                image = photo_bytes("JPEG", 30, 20, 10 * shard + index)
                label = str(index).encode()
                for name, data in ((f"x/{index}.jpg", image), (f"x/{index}.cls", label)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                contents[f"{tmp_path}/{shard:03d}.tar::x/{index}.jpg"] = image
    rows, _ = listed(tmp_path)
    assert [row["uri"] for row in rows] == list(contents)
    assert [row["label"] for row in rows] == [0, 1, 2] * 2
    for row in rows:
        assert read_image(row["uri"], row["offset"], row["size"]) == contents[row["uri"]]
        assert read_image(row["uri"]) == contents[row["uri"]]
    assert len(listed(tmp_path / "001.tar")[0]) == 3


@pytest.mark.parametrize("as_struct", [True, False])
def test_tables_with_image_bytes(tmp_path, photo_bytes, as_struct):
    images = [photo_bytes("JPEG", 30, 20, seed) for seed in range(7)]
    column = [{"bytes": image, "path": None} for image in images] if as_struct else images
    table = pa.table({"image": column, "label": np.arange(7)})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=3)
    rows, _ = listed(tmp_path)
    assert [row["label"] for row in rows] == list(range(7))
    assert [read_image(row["uri"], row["offset"], row["size"]) for row in rows] == images


def test_what_is_not_in_a_container_is_missing(tmp_path, photo_bytes):
    pq.write_table(pa.table({"image": [photo_bytes()]}), tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match="has no row 5"):
        read_image(f"{tmp_path}/a.parquet::5")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(FileNotFoundError, match="has no member"):
        read_image(f"{tmp_path}/a.tar::b.jpg")


def test_inputs_that_are_refused(tmp_path):
    with pytest.raises(RunError, match="no such input"):
        read_manifest(str(tmp_path / "gone"))
    with pytest.raises(RunError, match="no images in"):
        read_manifest(str(tmp_path))
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(RunError, match="no tar file"):
        read_manifest(str(tmp_path / "broken.tar"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(RunError, match="neither a column 'uri' nor one of image bytes"):
        read_manifest(str(tmp_path / "text.parquet"))
    (tmp_path / "list.txt").write_text("a.jpg")
    with pytest.raises(RunError, match="neither a folder nor"):
        read_manifest(str(tmp_path / "list.txt"))


def test_labels_beyond_the_network_are_named(tmp_path):
    (tmp_path / "manifest.csv").write_text("uri,label\na.jpg,3\nb.jpg,1000\n")
    table = read_manifest(str(tmp_path / "manifest.csv")).table
    refuse_unknown_labels(table, 1001, "resnet18")
    with pytest.raises(RunError, match=r"1 rows, the first .*b\.jpg"):
        refuse_unknown_labels(table, 1000, "resnet18")
