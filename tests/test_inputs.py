"""Every kind of input becomes the same manifest, and its images can be read back by uri."""

import gzip
import io
import json
import logging
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from servers import BUCKET, ObjectStore
from timm.data import ImageNetInfo

from scacam.errors import RunError
from scacam.evaluation.truth import read_boxes
from scacam.inputs.containers import Place, read_image, read_together, together
from scacam.inputs.labels import imagenet_names, imagenet_wnids
from scacam.inputs.manifest import (
    Manifest,
    new_files,
    read_manifest,
    refuse_unknown_labels,
    resolve_labels,
)
from scacam.runs.describe import describe_run
from scacam.runs.lifecycle import begin, listed_before
from scacam.storage.s3 import open_bucket
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
    assert ignored == {".txt": 1}
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


def test_images_behind_one_another_in_a_tar_are_read_at_once():
    """Up to a megabyte, and with no more than 64 kB between one and the next."""
    kilo = 1024
    behind = [Place("a.tar::0", 512, 500 * kilo), Place("a.tar::1", 501 * kilo, 400 * kilo)]
    beyond = [Place("a.tar::2", 902 * kilo, 200 * kilo), Place("a.tar::3", 1103 * kilo, 1)]
    far = [Place("a.tar::4", 2000 * kilo, 9), Place("a.tar::5", 2001 * kilo, 2 << 20)]
    before = [Place("a.tar::6", 512, 9)]
    elsewhere = [Place("b.tar::0", 600, 9), Place("b.tar::1", 700, 9)]
    alone = [Place("b.tgz::0", None, 9), Place("b.tgz::1", None, 9), Place("c.parquet::0", 0, None)]
    alone += [Place("c.parquet::1", 1, None), Place("d.jpg", None, None), Place("e.jpg", None, 7)]
    groups = [behind, beyond, far[:1], far[1:], before, elsewhere, *([one] for one in alone)]
    assert list(together(place for group in groups for place in group)) == groups
    assert list(together([])) == []


def test_images_that_are_read_at_once_are_those_that_are_read_one_by_one(tmp_path, photo_bytes):
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": photo_bytes("JPEG", 30, 20, i) for i in range(9)})
    places = [
        Place(*(row[name] for name in Place._fields)) for row in listed(tmp_path / "a.tar")[0]
    ]
    (group,) = together(places)
    assert read_together(group) == [read_image(*place) for place in places]


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


def write_tar(path: Path, members: dict[str, bytes | str], mode: str = "w") -> None:
    """Text is what a hard link, or after `->` a symbolic one, leads to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                entry.linkname = content.removeprefix("->")
                content = b""
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def contents(manifest: Manifest, folder: Path) -> dict[str, bytes | str]:
    """By uri below a folder: what is read of each image, or the error."""
    found = {}
    for row in manifest.table.to_pylist():
        try:
            content = read_image(row["uri"], row["offset"], row["size"])
        except (OSError, ValueError) as error:
            content = str(error)
        found[row["uri"].removeprefix(f"{folder}/")] = content
    return found


def labels(source, **columns) -> list:
    """Numbers and names, row by row."""
    manifest = read_manifest(str(source), **columns)
    names = manifest.names or pa.nulls(len(manifest.table))
    return pa.compute.coalesce(
        names.cast(pa.string()), manifest.table["label"].cast(pa.string())
    ).to_pylist()


def test_the_output_of_img2dataset(tmp_path):
    for shard in ("00000", "00001"):
        caption = {"json": b'{"caption": "3", "width": 9}', "txt": b"two dogs"}
        samples = {f"{shard}{i}.{kind}": c for i in range(3) for kind, c in caption.items()}
        images = {f"{shard}{i}.jpg": b"photo %d" % i for i in range(3)}
        write_tar(tmp_path / f"{shard}.tar", dict(sorted((samples | images).items())))
        pq.write_table(pa.table({"url": ["http://x"], "key": ["0"]}), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    manifest = read_manifest(str(tmp_path))
    assert contents(manifest, tmp_path)["00001.tar::000012.jpg"] == b"photo 2"
    assert len(manifest.table) == 6
    assert manifest.names is None
    assert manifest.table["label"].null_count == 6
    assert manifest.left_out() == "4 files left out: 2 .json, 2 .parquet"


def test_pictures_shards_and_tables_in_one_folder_are_all_read(tmp_path):
    write_tar(tmp_path / "b.tar", {"1.jpg": b"in b", "1.mov": b"", "2.mov": b"", "2.json": b"{}"})
    pq.write_table(pa.table({"image": [b"in d"]}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"caption": ["a dog"]}), tmp_path / "captions.parquet")
    for name in ("a.jpg", "c.jpg", "c.MOV", "README", ".DS_Store", "a sentence. and more of it"):
        (tmp_path / name).write_bytes(name.encode())
    manifest = read_manifest(str(tmp_path))
    assert contents(manifest, tmp_path) == {
        "a.jpg": b"a.jpg",
        "b.tar::1.jpg": b"in b",
        "c.jpg": b"c.jpg",
        "d.parquet::0": b"in d",
    }
    # What has the key of an image belongs to it; else it is left out as any file.
    assert manifest.ignored == {
        **{".mov": 2, ".json": 1, ".parquet": 1},
        **{".ds_store": 1, "without suffix": 2},
    }
    told = "7 files left out: 2 .mov, 2 without suffix, 1 .ds_store, 1 .json, 1 .parquet"
    assert manifest.left_out() == told


def test_a_manifest_in_a_folder_is_to_be_given_by_itself(tmp_path):
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"uri": ["a.jpg"]}), path)
    with pytest.raises(RunError, match=r"1 file left out: 1 \.parquet.*a manifest is given by"):
        read_manifest(str(tmp_path))
    assert len(read_manifest(str(path)).table) == 1


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # The first dot of the last part ends the key.
        ({"a.b/k.input.jpg": b"", "a.b/k.output.cls": b"3", "a.b/l.jpg": b""}, ["3", None]),
        ({"k.jpg": b"", "k.seg.png": b"", "k.cls": b"3"}, ["3", "3"]),
        # But a label of an image's own name is its own.
        ({"p.1.jpg": b"", "p.1.cls": b"3", "p.2.jpg": b"", "p.2.cls": b"4"}, ["3", "4"]),
        ({"p.1.jpg": b"", "p.1.cls": b"3", "p.2.jpg": b""}, ["3", None]),
        ({"k.jpg": b"", "k.a.cls": b"3", "k.b.cls": b"4"}, [None]),
        ({"k.jpg": b"", "k.CLS": b" 3\n"}, ["3"]),
        ({"k.cls": b"-1", "k.jpg": b"", "l.jpg": b"", "l.cls": b"Cat"}, [None, "Cat"]),
        ({"k.jpg": b"", "k.json": b'{"label": 3}', "l.jpg": b"", "l.json": b"["}, ["3", None]),
        ({"k.jpg": b"", "k.json": b'{"cls": true, "label": "a text"}'}, ["1"]),
        ({"k.jpg": b"", "k.json": b'{"label": 3}', "k.cls": b"4"}, ["4"]),
        ({"k.jpg": b"", "k.txt": b"3\n"}, ["3"]),
        ({"k.jpg": b"", "k.txt": b"3", "l.jpg": b"", "l.txt": b"a dog"}, [None, None]),
    ],
)
def test_labels_of_tar_shards(tmp_path, members, expected):
    write_tar(tmp_path / "a.tar", members)
    assert labels(tmp_path / "a.tar") == expected


def test_links_in_a_tar(tmp_path):
    members = {"a/1.jpg": b"photo", "b/2.jpg": "a/1.jpg", "b/3.jpg": "->../a/1.jpg"}
    write_tar(tmp_path / "a.tar", members | {"b/4.jpg": "->nowhere.jpg"})
    manifest = read_manifest(str(tmp_path / "a.tar"))
    assert list(contents(manifest, tmp_path).values()) == [b"photo"] * 3
    write_tar(tmp_path / "a.tar.gz", members | {"b/4.jpg": "->nowhere.jpg"}, "w:gz")
    manifest = read_manifest(str(tmp_path))
    assert list(contents(manifest, tmp_path).values()) == [b"photo"] * 6
    assert manifest.ignored == {"linking to nothing": 2}


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_or_damaged_shard_gives_what_is_whole_and_a_row_for_the_rest(
    tmp_path, caplog, packed
):
    generator = np.random.default_rng(0)
    members = {f"{i}.jpg": generator.bytes(1500) for i in range(6)}
    write_tar(tmp_path / "whole", members)
    write_tar(tmp_path / "b.tar", {"good.jpg": b"good"})
    whole = (tmp_path / "whole").read_bytes()
    member = 512 + 1536
    overwritten = whole[: 3 * member] + b"x" * 512 + whole[3 * member + 512 :]
    twice = whole + whole
    for damaged, complete, error in (
        (whole[: 3 * member + 200], 3, "unexpected end|damaged"),  # in a header
        (whole[: 3 * member + 700], 3, "unexpected end|end-of-stream"),  # in an image
        (overwritten, 3, "damaged"),
        (twice, 6, "damaged"),
    ):
        if packed and len(damaged) < len(whole):
            content = gzip.compress(whole)[: len(gzip.compress(damaged)) - 100]
        else:
            content = gzip.compress(damaged) if packed else damaged
        shard = f"{len(content)}.tar"
        (tmp_path / shard).write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            manifest = read_manifest(str(tmp_path))
        read = contents(manifest, tmp_path)
        assert read.pop("b.tar::good.jpg") == b"good"
        told = read.pop(shard)
        assert isinstance(told, str)
        assert shard in told
        assert any(word in told for word in error.split("|"))
        assert "1 containers cannot be read to their end" in caplog.text
        right = [name for name in members if read.get(f"{shard}::{name}") == members[name]]
        assert right[: complete - packed] == list(members)[: complete - packed]
        assert len(read) <= len(right) + 1  # the one that is cut ends as an error of its own
        (tmp_path / shard).unlink()


def test_empty_and_odd_shards_beside_a_good_one(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "page.tar").write_bytes(b"<html>" * 1000)
    (tmp_path / "page.parquet").write_bytes(b"<html>" * 1000)
    with pytest.raises(RunError, match=r"empty\.tar is no tar file.*empty"):
        read_manifest(str(tmp_path))
    write_tar(tmp_path / "a.tar", {"1.jpg": b"photo"})
    write_tar(tmp_path / "none.tar", {})
    read = contents(read_manifest(str(tmp_path)), tmp_path)
    assert read.pop("a.tar::1.jpg") == b"photo"
    assert list(read) == ["empty.tar", "page.parquet", "page.tar"]
    assert all(isinstance(error, str) for error in read.values())


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.TAR"])
def test_packed_tars(tmp_path, name):
    members = {f"{i}.jpg": bytes([i]) * 1000 for i in range(40)}
    write_tar(tmp_path / name, members | {"39.cls": b"7"}, "w:gz")
    manifest = read_manifest(str(tmp_path / name))
    rows = manifest.table.to_pylist()
    with ThreadPoolExecutor(8) as threads:
        read = threads.map(lambda row: read_image(row["uri"], row["offset"], row["size"]), rows)
        assert list(read) == list(members.values())
    assert rows[-1]["label"] == 7


def test_few_images_open_few_containers(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": b"", "1.cls": b"1", "2.jpg": b"", "2.cls": b"2"})
    (tmp_path / "b.tar").write_bytes(b"never opened")
    for limit, expected in ((1, [1]), (2, [1, 2])):
        assert read_manifest(str(tmp_path), limit).table["label"].to_pylist() == expected


def test_tables_with_paths_in_place_of_bytes(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("1.jpg", "photos/2.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    paths = ["photos/2.jpg", str(tmp_path / "1.jpg"), "gone.jpg", None]
    rows = [{"bytes": b"bytes", "path": "1.jpg"}, *({"bytes": None, "path": p} for p in paths)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    read = list(contents(read_manifest(str(tmp_path / "a.parquet")), tmp_path).values())
    assert read[:3] == [b"bytes", b"photos/2.jpg", b"1.jpg"]
    assert "gone.jpg" in read[3]
    assert read[4] == "row 4 has neither bytes nor a path"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([True, False, None]), ["1", "0", None]),
        (pa.array([3, -1, None]), ["3", None, None]),
        (pa.array([3.0, float("nan"), None]), ["3", None, None]),
        (pa.array(["3", " cat ", ""]), ["3", "cat", None]),
        (pa.array(["+3.0", "007", "-1"]), ["3", "7", None]),
        (pa.array(["a", None, "b"]).dictionary_encode(), ["a", None, "b"]),
        (pa.array([b"3", b"cat", None]), ["3", "cat", None]),
        (pa.nulls(3), [None, None, None]),
    ],
)
@pytest.mark.parametrize("column", ["uri", "image"])
def test_labels_of_any_type(tmp_path, column, values, expected):
    keys = ["a.jpg", "b.jpg", "c.jpg"] if column == "uri" else [b"a", b"b", b"c"]
    pq.write_table(pa.table({column: keys, "label": values}), tmp_path / "a.parquet")
    assert labels(tmp_path / "a.parquet") == expected
    # What lies under a null in memory is no value, and makes no other digest when it is read again.
    table = read_manifest(str(tmp_path / "a.parquet")).table
    pq.write_table(table, tmp_path / "again.parquet")
    digests = [describe_run(t, [])["manifest_sha256"] for t in (table, table.take([0, 1, 2]))]
    digests.append(describe_run(pq.read_table(tmp_path / "again.parquet"), [])["manifest_sha256"])
    assert len(set(digests)) == 1


@pytest.mark.parametrize("values", [[2.5], [-2], [2**31], [[1, 2]], [{"id": 1}]])
def test_labels_that_are_none_are_refused(tmp_path, values):
    pq.write_table(pa.table({"uri": ["a.jpg"], "label": values}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match="label"):
        read_manifest(str(tmp_path / "a.parquet"))


def test_columns_that_are_named(tmp_path, caplog):
    table = {
        "first": [{"bytes": b"1", "path": None}],
        "second": [{"bytes": b"2", "path": None}],
        "fine_label": [7],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(RunError, match="first and second hold images; name one by --image-column"):
        read_manifest(str(path))
    second = read_manifest(str(path), image_column="second")
    assert contents(second, tmp_path) == {"a.parquet::second/0": b"2"}
    assert "--label-column may name one of: fine_label" in caplog.text
    assert labels(path, image_column="second", label_column="fine_label") == ["7"]
    with pytest.raises(RunError, match="no column 'coarse'"):
        read_manifest(str(path), image_column="second", label_column="coarse")
    with pytest.raises(RunError, match="'fine_label' holds no images but int64"):
        read_manifest(str(path), image_column="fine_label")
    with pytest.raises(RunError, match="nor one of image bytes"):
        read_manifest(str(path), image_column="third")
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table(table | {"image": table["first"]}), path)  # a name that says it
    assert contents(read_manifest(str(path)), tmp_path) == {"b.parquet::0": b"1"}
    (tmp_path / "m.csv").write_text("uri,label,fine_label\na.jpg,1,7\n")
    assert labels(tmp_path / "m.csv", label_column="fine_label") == ["7"]
    write_tar(tmp_path / "a.tar", {"1.jpg": b"", "1.json": b'{"label": 1, "breed": "Pug"}'})
    assert labels(tmp_path / "a.tar", label_column="breed") == ["Pug"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("uri, label\na.jpg, 3\nb.jpg,4 \n", [("a.jpg", "3"), ("b.jpg", "4")]),
        ("label , uri\ncat, a.jpg\n 3, b.jpg\n", [("a.jpg", "cat"), ("b.jpg", "3")]),
        ("uri;label\na,b.jpg;3\n", [("a,b.jpg", "3")]),
        ("uri\tlabel\n007.jpg\t\n", [("007.jpg", None)]),
        ("\ufeffsep=;\r\nuri;label\r\na.jpg;3,0\r\n", [("a.jpg", "3")]),
        ('"uri","label"\n"a,b.jpg","3"\n', [("a,b.jpg", "3")]),
        (",uri,x,x,label\n0,007,1,2,3.0\n", [("007", "3")]),
        ("\n\nuri,label\n\na.jpg,true\n", [("a.jpg", "1")]),
        ("uri,label\na.jpg,-1\n", [("a.jpg", None)]),
        ("uri\na;b.jpg\n", [("a;b.jpg", None)]),
    ],
)
def test_csv_of_other_people(tmp_path, content, expected):
    path = tmp_path / "m.csv"
    path.write_bytes(content.encode())
    uris = read_manifest(str(path)).table["uri"].to_pylist()
    assert [(uri, f"{tmp_path}/{name}") for uri, (name, _) in zip(uris, expected, strict=True)] == [
        (uri, uri) for uri in uris
    ]
    assert labels(path) == [label for _, label in expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"uri,label,uri\na,1,b\n", "several columns 'uri'; leave one"),
        ("uri,label\nä.jpg,1\n".encode("utf-16"), "UTF-16"),
        ("uri,label\nä.jpg,1\n".encode("latin-1"), "no UTF-8"),
        ("uri,label\na.jpg,ä\n".encode("latin-1"), "UTF8"),
        (b"uri,label\na,b.jpg,1\n", "Expected 2 columns, got 3"),
        (b"url,label\na.jpg,1\n", "no column 'uri'; it has url, label"),
        (b"uri,label\n,1\n", "rows without a uri: 1 rows"),
        (b"\n", "it is empty"),
    ],
)
def test_csv_that_is_refused_says_why(tmp_path, content, message):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        read_manifest(str(tmp_path / "m.csv"))
    assert "\n" not in str(caught.value)


def test_links_and_names_that_no_table_can_hold(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"photo")
    (tmp_path / "b.jpg").symlink_to("nowhere")
    (tmp_path / "c.tar").symlink_to("nowhere")
    (tmp_path / "d.jpg").symlink_to("d.jpg")
    os.mkfifo(tmp_path / "e.jpg")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/up").symlink_to("..")
    (tmp_path / "g").symlink_to("f/h")
    (tmp_path / "f/h").mkdir()
    (tmp_path / "f/h/i.jpg").write_bytes(b"photo")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).write_bytes(b"photo")
    manifest = read_manifest(str(tmp_path))
    read = contents(manifest, tmp_path)
    assert {name for name, content in read.items() if content == b"photo"} == {
        *("a.jpg", "f/h/i.jpg", "g/i.jpg"),
    }
    assert read.keys() - {"a.jpg", "f/h/i.jpg", "g/i.jpg"} == {"b.jpg", "c.tar", "d.jpg"}
    assert manifest.left_out() == "1 file left out: 1 with a name that is no UTF-8"


def named(*names) -> Manifest:
    table = pa.table({"uri": names, "label": pa.nulls(len(names), pa.int32())})
    return Manifest(table, {}, pa.chunked_array([pa.array(names, pa.string())]))


def test_names_become_the_numbers_of_a_networks_classes():
    categories = ["Egyptian_cat", "tench, Tinca tinca", "crane", "Crane", "dog"]
    manifest = named("egyptian cat", "Tinca tinca", "tench, Tinca tinca", "crane", None, "Crane")
    resolved = resolve_labels(manifest, {"mine": categories, "other": list(categories)})
    assert resolved.table["label"].to_pylist() == [0, 1, 1, 2, None, 3]
    assert resolved.names is None
    assert resolve_labels(resolved, {"mine": None}) is resolved
    with pytest.raises(RunError, match=r"2 of 3 names .* of mine: CRANE \(2 or 3\), cow \(none\)"):
        resolve_labels(named("dog", "cow", "CRANE"), {"mine": categories})
    with pytest.raises(RunError, match="mine has no class names"):
        resolve_labels(manifest, {"mine": None})
    with pytest.raises(RunError, match="mine and other number their classes differently"):
        resolve_labels(named("dog"), {"mine": ["dog", "cat"], "other": ["cat", "dog"]})


def test_numbers_and_names_may_stand_together(tmp_path):
    (tmp_path / "m.csv").write_text("uri,label\na.jpg,cat\nb.jpg,2\nc.jpg,\n")
    resolved = resolve_labels(read_manifest(str(tmp_path / "m.csv")), {"mine": ["dog", "cat"]})
    assert resolved.table["label"].to_pylist() == [1, 2, None]
    with pytest.raises(RunError, match=r"b\.jpg"):
        refuse_unknown_labels(resolved.table, 2, "mine")


def test_wordnet_ids_are_classes_of_imagenet_only():
    wnids = ["n01440764", "n02102040", "n03888257"]  # Imagenette's first ones
    resolved = resolve_labels(named(*wnids), {"net": imagenet_names()})
    assert resolved.table["label"].to_pylist() == [0, 217, 701]
    assert list(imagenet_wnids()) == sorted(set(imagenet_wnids()))
    named_otherwise = [name + ", another name" for name in imagenet_names()]
    resolved = resolve_labels(named(*wnids), {"net": named_otherwise})
    assert resolved.table["label"].to_pylist() == [0, 217, 701]
    for others in (imagenet_names()[:10], imagenet_names()[::-1]):
        with pytest.raises(RunError, match="mean no one class"):
            resolve_labels(named(*wnids), {"net": others})


def class_label_table(path: Path, names: list[str], labels: list[int]) -> None:
    """As `datasets` writes a table of images and a ClassLabel."""
    features = {"image": {"_type": "Image"}, "kind": {"names": names, "_type": "ClassLabel"}}
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": [{"bytes": b"x", "path": None}] * len(labels), "kind": labels})
    pq.write_table(table.replace_schema_metadata(said), path)


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        (["dog", "Sea_horse", "cat"], [2, 0, None, 1]),  # by their names, as the network numbers
        (["cat", "dog", "seahorse"], None),  # two of three are their own numbers: not enough
        (["cat", "sea horse", "dog", "cow", "sea horse"], None),
        (None, [0, 1, None, 2]),
        (["tench", "goldfish", "shark"], None),
    ],
)
def test_names_of_class_labels(tmp_path, categories, expected):
    class_label_table(tmp_path / "a.parquet", ["cat", "dog", "sea horse"], [0, 1, -1, 2])
    manifest = read_manifest(str(tmp_path), label_column="kind")
    if expected is None:
        with pytest.raises(RunError, match="mean no one class of net"):
            resolve_labels(manifest, {"net": categories})
    else:
        resolved = resolve_labels(manifest, {"net": categories})
        assert resolved.table["label"].to_pylist() == expected


def test_class_labels_keep_their_numbers_where_a_few_names_are_ambiguous(tmp_path):
    """As `crane` is among ImageNet's, where the network's names are those of the data set."""
    names = [f"class {i}" for i in range(9)]
    class_label_table(tmp_path / "a.parquet", [*names, "crane"], list(range(10)))
    manifest = read_manifest(str(tmp_path), label_column="kind")
    resolved = resolve_labels(manifest, {"net": [*names, "Crane, bird", "Crane, machine"]})
    assert resolved.table["label"].to_pylist() == list(range(10))
    for others in ([*names[::-1], "crane", "crane"], [*names, "stork", "crane", "crane"]):
        with pytest.raises(RunError, match="mean no one class"):
            resolve_labels(manifest, {"net": others})


def test_wordnet_ids_are_those_of_timm():
    assert list(imagenet_wnids()) == ImageNetInfo().label_names()


def test_rows_of_a_table_are_read_by_many_threads(tmp_path):
    images = [b"%d" % i for i in range(200)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=7)
    order = np.random.default_rng(0).permutation(200).tolist()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda row: read_image(f"{tmp_path}/a.parquet::{row}"), order))
    assert found == [images[row] for row in order]


def test_a_run_continues_with_the_images_it_began_with(tmp_path, caplog):
    photos, output = tmp_path / "photos", str(tmp_path / "out")
    write_tar(photos / "a.tar", {"1.jpg": b"", "2.jpg": b""})
    pq.write_table(pa.table({"caption": [""]}), photos / "captions.parquet")
    (photos / "b.jpg").write_bytes(b"")
    (tmp_path / "out").mkdir()
    asked = {"input": str(photos), "limit": None}
    assert listed_before(output, asked) is None
    first = read_manifest(str(photos))
    record = {**asked, "left_out": dict(first.ignored), **describe_run(first.table, [])}
    begin(output, record, first.table)
    for name in ("0.jpg", "c.jpg", "notes.txt"):
        (photos / name).write_bytes(b"")
    write_tar(photos / "d.tar", {"1.jpg": b""})
    write_tar(photos / "e.tar", {"1.txt": b""})
    again = listed_before(output, asked)
    assert again.table.equals(first.table)
    assert again.left_out() == first.left_out() == "1 file left out: 1 .parquet"
    assert describe_run(again.table, [])["manifest_sha256"] == record["manifest_sha256"]
    assert f"3 files of {photos} are new and no part of the run" in caplog.text
    assert new_files(str(photos), first.table) == 3
    for other in ({"limit": 2}, {"input": str(tmp_path)}, {"label_column": "x"}):
        assert listed_before(output, asked | other) is None


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_manifest_is_read_anew(tmp_path, suffix):
    asked = {"input": str(tmp_path / f"m.{suffix}"), "limit": None}
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 1, **asked}))
    assert listed_before(str(tmp_path), asked) is None


def boxes_of(tmp_path, content: str, uris: list[str], label: int = 0):
    (tmp_path / "boxes.csv").write_text(content)
    rows = [{"image_id": i, "uri": uri, "label": label} for i, uri in enumerate(uris)]
    return read_boxes(str(tmp_path / "boxes.csv"), pa.Table.from_pylist(rows, MANIFEST))


def test_boxes_tables_of_other_people(tmp_path):
    header = "file,x0,y0,x1,y1"
    for content in (
        f"{header}\n7,1,2,30.5,40\n",
        f"{header},label,class_id\n7,1,2,30.5,40,a dog,0\n".replace(",", ", "),
        f"{header},class_id\n7,1,2,30.5,40,-1\n".replace(",", ";").replace(".", ","),
        "uri,label,x0,y0,x1,y1\n7,a dog,1,2,30.5,40\n",
    ):
        found, _ = boxes_of(tmp_path, content, [f"{tmp_path}/7", f"{tmp_path}/8"])
        assert found.of(0).tolist() == [[1, 2, 30.5, 40]]
        assert found.image_ids.tolist() == [0]
    with pytest.raises(RunError, match="shares of the image"):
        boxes_of(tmp_path, f"{header}\n7,0.1,0.2,0.5,1\n", ["7"])
    with pytest.raises(RunError, match="class_id must be numbers"):
        boxes_of(tmp_path, f"{header},class_id\n7,1,2,3,4,dog\n", ["7"])


@pytest.mark.long
def test_on_object_storage(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    store = ObjectStore(tmp_path / "store")
    try:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        open_bucket.cache_clear()  # other tests' stores had the same name
        images = {f"{i}.jpg": bytes([i]) * 5000 for i in range(20)}
        write_tar(tmp_path / "in/a.tar", images)
        write_tar(tmp_path / "in/b.tgz", images, "w:gz")
        (tmp_path / "in/c.tar").write_bytes((tmp_path / "in/a.tar").read_bytes()[:30000])
        (tmp_path / "in/d.jpg").write_bytes(b"photo")
        store.upload(tmp_path / "in", "both")
        manifest = read_manifest(f"s3://{BUCKET}/both")
        read = contents(manifest, f"s3://{BUCKET}/both")
        for shard in ("a.tar", "b.tgz"):
            assert {name: read.pop(f"{shard}::{name}") for name in images} == images
        assert read.pop("d.jpg") == b"photo"
        assert "cut short" in read.pop("c.tar")
        assert {name: read.pop(f"c.tar::{name}") for name in list(images)[:5]} == dict(
            list(images.items())[:5]
        )
        assert list(read) == ["c.tar::5.jpg"]  # the one that is cut
    finally:
        open_bucket.cache_clear()
        store.stop()


@pytest.mark.long
def test_an_object_that_is_named_as_the_prefix_hides_nothing(monkeypatch):
    server = ThreadedMotoServer(port=0, verbose=False)  # SeaweedFS cannot have both
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        bucket = boto3.resource("s3", region_name="us-east-1").create_bucket(Bucket="moto-inputs")
        for key in ("both", "both/a.png", "both/b/", "empty"):
            bucket.put_object(Key=key, Body=b"")
        for source in ("s3://moto-inputs/both", "s3://moto-inputs/both/"):
            table = read_manifest(source).table
            assert table["uri"].to_pylist() == ["s3://moto-inputs/both/a.png"]
        with pytest.raises(RunError, match="neither a folder nor"):
            read_manifest("s3://moto-inputs/empty")
    finally:
        open_bucket.cache_clear()
        server.stop()


def test_boxes_are_those_of_their_images_one_by_one(tmp_path):
    """Images there several times, and several boxes each, in any order: against plain loops."""
    rng = np.random.default_rng(0)
    uris = [f"/x/{index}.jpg" for index in rng.integers(0, 40, 60)]
    labels = [None if label == 3 else label for label in rng.integers(0, 4, 60).tolist()]
    rows = [
        {"image_id": i, "uri": uri, "label": label}
        for i, (uri, label) in enumerate(zip(uris, labels, strict=True))
    ]
    boxes = [
        (f"/x/{name}.jpg", index, index + 1, label - 1)
        for index, (name, label) in enumerate(rng.integers(0, [60, 4], (200, 2)).tolist())
    ]
    lines = [f"{uri},{x},{x},{end},{end},{label}" for uri, x, end, label in boxes]
    (tmp_path / "b.csv").write_text("\n".join(["uri,x0,y0,x1,y1,class_id", *lines]))
    manifest = pa.Table.from_pylist(rows, MANIFEST)
    found, left_out = read_boxes(str(tmp_path / "b.csv"), manifest)

    def fits(row, label):
        return row["label"] is not None and label in (-1, row["label"])

    expected = [
        (row["image_id"], x)
        for row in rows
        for uri, x, _, label in boxes
        if uri == row["uri"] and fits(row, label)
    ]
    assert list(zip(found.image_ids, found.boxes[:, 0], strict=True)) == expected
    kept = {x for _, x in expected}
    lost = [(uri, x, label) for uri, x, _, label in boxes if x not in kept]
    inside = [uri for uri, *_ in lost if uri in uris]
    unlabelled = sum(
        any(row["label"] is None for row in rows if row["uri"] == uri) for uri in inside
    )
    otherwise = sum(
        any(row["label"] is not None for row in rows if row["uri"] == uri) for uri in inside
    )
    assert left_out["boxes of images that are not in the run"] == len(lost) - len(inside) > 0
    assert left_out["boxes of images without a label"] == unlabelled > 0
    assert left_out["boxes of other classes than the label"] == otherwise > 0
