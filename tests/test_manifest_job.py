"""Manifests and boxes of data sets, by layout, of small copies that the tests make."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat
from servers import BUCKET, ObjectStore
from torchvision.datasets import ImageFolder

from scacam.inputs.manifest import read_manifest
from scacam.jobs.command import run_job

main = partial(run_job, "manifest")


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"never decoded here")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def made(layout: str, root: Path, tmp_path: Path, *arguments: str):
    """The rows of both tables, uris relative to the root."""
    output = tmp_path / "made"
    status = main(["--layout", layout, "--input", str(root), "--output", str(output), *arguments])
    assert status == 0
    images, boxes = (pd.read_parquet(output / f"{n}.parquet") for n in ("manifest", "boxes"))
    assert read_manifest(str(output / "manifest.parquet")).table["uri"].to_pylist() == list(
        images.uri
    )
    for table in (images, boxes):
        table["uri"] = table.uri.str.removeprefix(f"{root}/")
    return images.values.tolist(), boxes.values.tolist()


def xml(*objects: str) -> str:
    return f"<annotation><filename>x</filename>{''.join(objects)}</annotation>"


def thing(name: str, x0, y0, x1, y1, difficult: int = 0) -> str:
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0}</xmin>"
        f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
    )


def val(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def test_ilsvrc_of_the_devkit(tmp_path, capsys):
    root = tmp_path / "ilsvrc"
    touch(root, *(f"val/{val(n)}.JPEG" for n in (1, 2, 4)), "train/n01/n01_3.JPEG")
    data = root / "ILSVRC2012_devkit_t12/data"
    write(data / "ILSVRC2012_validation_ground_truth.txt", "2\n1\n3\n")
    # The ids of ILSVRC are in no order of the WordNet ids; what has children is no class.
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array(
        [(1, "n30", "cat", 0), (2, "n10", "dog", 0), (3, "n20", "fox", 0), (4, "n05", "pet", 2)],
        dtype=kinds,
    )
    savemat(str(data / "meta.mat"), {"synsets": synsets[:, None]})
    write(
        root / f"boxes/val/{val(1)}.xml", xml(thing("n10", 1, 2, 30, 40), thing("n10", 5, 5, 9, 9))
    )
    write(root / f"boxes/val/{val(2)}.xml", xml(thing("n30", 0, 0, 499, 374)))
    images, boxes = made("ilsvrc", root, tmp_path)
    assert images == [[f"val/{val(1)}.JPEG", 0], [f"val/{val(2)}.JPEG", 2]]
    assert boxes == [
        [f"val/{val(1)}.JPEG", 1, 2, 30, 40, 0],
        [f"val/{val(1)}.JPEG", 5, 5, 9, 9, 0],
        [f"val/{val(2)}.JPEG", 0, 0, 499, 374, 2],
    ]
    told = capsys.readouterr().out
    assert "2 rows of 2 images, 3 boxes" in told
    assert "1 annotated images that are not there" in told
    assert "1 images without annotation" in told


def test_ilsvrc_of_kaggle(tmp_path):
    root = tmp_path / "kaggle"
    touch(root, *(f"ILSVRC/Data/CLS-LOC/val/{val(n)}.JPEG" for n in (7, 8)))
    write(root / "LOC_synset_mapping.txt", "n10 dog, hound\nn20 fox\nn30 cat\n")
    write(
        root / "LOC_val_solution.csv",
        f"ImageId,PredictionString\n{val(8)},n30 1 2 30 40 n30 5 6 7 8 \n{val(7)},n10 0 0 9 9 \n",
    )
    images, boxes = made("ilsvrc", root, tmp_path)
    folder = "ILSVRC/Data/CLS-LOC/val"
    assert images == [[f"{folder}/{val(7)}.JPEG", 0], [f"{folder}/{val(8)}.JPEG", 2]]
    assert [box[1:] for box in boxes] == [[0, 0, 9, 9, 0], [1, 2, 30, 40, 2], [5, 6, 7, 8, 2]]


def test_ilsvrc_without_labels_is_refused(tmp_path, capsys):
    touch(tmp_path / "bare", f"val/{val(1)}.JPEG")
    assert main(["--layout", "ilsvrc", "--input", str(tmp_path / "bare"), "--output", "x"]) == 2
    told = capsys.readouterr().err
    assert "meta.mat" in told
    assert "LOC_synset_mapping.txt" in told


def tiny(root: Path) -> Path:
    write(root / "wnids.txt", "n20\nn10\nn30\n")
    touch(root, "train/n20/images/n20_0.JPEG", "train/n20/images/n20_1.JPEG")
    touch(root, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    write(root / "train/n20/n20_boxes.txt", "n20_0.JPEG\t0\t10\t63\t58\nn20_1.JPEG\t1\t2\t3\t4\n")
    write(
        root / "val/val_annotations.txt",
        "val_0.JPEG\tn30\t0\t32\t44\t62\nval_1.JPEG\tn10\t5\t6\t7\t8\n",
    )
    return root


def test_tiny_imagenet(tmp_path, capsys):
    images, boxes = made("tiny_imagenet", tiny(tmp_path / "tiny"), tmp_path)
    assert images == [
        ["train/n20/images/n20_0.JPEG", 1],
        ["train/n20/images/n20_1.JPEG", 1],
        ["val/images/val_0.JPEG", 2],
        ["val/images/val_1.JPEG", 0],
    ]
    assert boxes[0] == ["train/n20/images/n20_0.JPEG", 0, 10, 63, 58, 1]
    assert boxes[2] == ["val/images/val_0.JPEG", 0, 32, 44, 62, 2]
    assert "1 images without annotation" in capsys.readouterr().out


def test_labels_of_a_network_that_knows_more_classes(tmp_path, capsys):
    # A network of ImageNet numbers the classes differently, and here lacks one.
    write(tmp_path / "categories.txt", "n01\nn10\nn15\nn20\n")
    arguments = ["--categories", str(tmp_path / "categories.txt")]
    images, boxes = made("tiny_imagenet", tiny(tmp_path / "tiny"), tmp_path, *arguments)
    assert [label for _, label in images] == [3, 3, 1]
    assert {box[-1] for box in boxes} == {3, 1}
    assert "1 rows of 1 classes that are no category: n30 (1)" in capsys.readouterr().out


def test_image_folder(tmp_path, capsys):
    root = tmp_path / "photos"
    touch(root, "dog/1.jpg", "cat/deep/er/2.PNG", "dog/3.webp", "dog/notes.txt", "loose.jpg")
    images, boxes = made("image_folder", root, tmp_path)
    assert images == [["cat/deep/er/2.PNG", 0], ["dog/1.jpg", 1], ["dog/3.webp", 1]]
    assert boxes == []
    assert "1 images without annotation" in capsys.readouterr().out


def test_class_folders_are_numbered_as_torchvision_does(tmp_path):
    root = tmp_path / "photos"
    touch(root, "ant/1.jpg", "cat/deep/er/2.PNG", "Zebra/3.png", "été/4.jpg", "a b/5.jpg")
    (root / "bee").mkdir()  # empty, and a class all the same
    touch(root, ".hidden/notes.txt")
    images, _ = made("image_folder", root, tmp_path)
    theirs = ImageFolder(str(root), allow_empty=True).samples
    assert sorted(map(tuple, images)) == sorted(
        (path.removeprefix(f"{root}/"), label) for path, label in theirs
    )


def test_folders_that_are_named_by_wordnet_ids_are_imagenets_classes(tmp_path):
    root = tmp_path / "imagenette"
    touch(root, "n01440764/1.jpg", "n02102040/2.jpg", "n03888257/3.jpg")
    images, _ = made("image_folder", root, tmp_path)
    assert [label for _, label in images] == [0, 217, 701]
    write(tmp_path / "ten.txt", "n01440764\nn02102040\nn03888257\n")
    images, _ = made("image_folder", root, tmp_path, "--categories", str(tmp_path / "ten.txt"))
    assert [label for _, label in images] == [0, 1, 2]
    touch(root, "cat/4.jpg")
    images, _ = made("image_folder", root, tmp_path)
    assert [label for _, label in images] == [0, 1, 2, 3]


def test_links_to_nothing_are_told(tmp_path, capsys):
    touch(tmp_path / "photos", "cat/1.jpg")
    (tmp_path / "photos/cat/2.jpg").symlink_to("nowhere")
    assert made("image_folder", tmp_path / "photos", tmp_path)[0] == [["cat/1.jpg", 0]]
    assert "1 links to nothing" in capsys.readouterr().out


def test_coco(tmp_path, capsys):
    root = tmp_path / "coco"
    touch(root, "val2017/000000000139.jpg", "val2017/000000000285.jpg", "val2017/000000000632.jpg")
    annotations = [
        {"image_id": 139, "category_id": 52, "bbox": [10.5, 20, 30, 40], "iscrowd": 0},
        {"image_id": 139, "category_id": 59, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        {"image_id": 139, "category_id": 52, "bbox": [0, 0, 5, 5], "iscrowd": 0},
        {"image_id": 139, "category_id": 52, "bbox": [0, 0, 99, 99], "iscrowd": 1},
        {"image_id": 285, "category_id": 1, "bbox": [5, 6, 7, 8], "iscrowd": 0},
        {"image_id": 999, "category_id": 52, "bbox": [5, 6, 7, 8], "iscrowd": 0},
    ]
    content = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (139, 285, 632, 999)],
        "annotations": annotations,
        "categories": [
            *({"id": 1, "name": "person"}, {"id": 52, "name": "banana"}),
            {"id": 59, "name": "pizza"},
        ],
    }
    write(root / "annotations/instances_val2017.json", json.dumps(content))
    images, boxes = made("coco", root, tmp_path)
    # ImageNet's banana is 954 and its pizza 963; it has no person.
    file = "val2017/000000000139.jpg"
    assert images == [[file, 954], [file, 963]]
    assert boxes == [
        [file, 10.5, 20, 40.5, 60, 954],
        [file, 0, 0, 5, 5, 954],
        [file, 1, 2, 4, 6, 963],
    ]
    told = capsys.readouterr().out
    assert "2 rows of 1 images, 3 boxes" in told
    assert "1 crowds" in told
    assert "1 annotated images that are not there" in told
    assert "no category: person (1)" in told


def test_voc(tmp_path, capsys):
    root = tmp_path / "VOCdevkit/VOC2007"
    touch(root, "JPEGImages/000001.jpg", "JPEGImages/000002.jpg", "SegmentationClass/000001.png")
    objects = [
        *(thing("dining_table", 1, 1, 100, 50), thing("dining_table", 5, 5, 9, 9, difficult=1)),
        *(thing("sofa", 3, 4, 5, 6, difficult=1), thing("dog", 1, 2, 3, 4)),
    ]
    write(root / "Annotations/000001.xml", xml(*objects))
    write(tmp_path / "names.txt", "Dining Table\nsofa\n")
    images, boxes = made("voc", root, tmp_path, "--categories", str(tmp_path / "names.txt"))
    file = "JPEGImages/000001.jpg"
    assert images == [[file, 0]]
    # Counted from 1 with the last pixel in: the first pixel is 0 to 1.
    assert boxes == [[file, 0, 0, 100, 50, 0], [file, 4, 4, 9, 9, 0]]
    told = capsys.readouterr().out
    assert "1 classes with difficult objects only" in told
    assert "1 images without annotation" in told
    assert "dog (1)" in told


def test_csv(tmp_path, capsys):
    root = tmp_path / "mine"
    touch(root, "a/1.jpg", "b/2.jpg", "b/3.jpg")
    write(root / "images.csv", "file,label\n1.jpg,7\n2.jpg,0\n9.jpg,1\n")
    write(root / "boxes.csv", "file,x0,y0,x1,y1\n2.jpg,1,2,3,4.5\n1.jpg,0,0,1,1\n3.jpg,0,0,1,1\n")
    images, boxes = made("csv", root, tmp_path)
    assert images == [["a/1.jpg", 7], ["b/2.jpg", 0]]
    assert boxes == [["a/1.jpg", 0, 0, 1, 1, 7], ["b/2.jpg", 1, 2, 3, 4.5, 0]]
    told = capsys.readouterr().out
    assert "1 images with boxes that images.csv does not list" in told
    assert "1 annotated images that are not there" in told
    write(root / "images.csv", "uri,label\na/1.jpg,zebra\nb/2.jpg,ape\n")
    assert made("csv", root, tmp_path)[0] == [["a/1.jpg", 1], ["b/2.jpg", 0]]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("file,label\n1.jpg,3\n2.jpg,\n3.jpg,2\n", [3, 2]),
        ("file,label\n1.jpg,zebra\n2.jpg,\n3.jpg,ape\n", [1, 0]),
        ("file;label\n1.jpg;3,0\n2.jpg; \n3.jpg;2,0\n", [3, 2]),
        ("file, label\n1.jpg, 3\n2.jpg,-1\n3.jpg, 2\n", [3, 2]),
        ("file,label\n1.jpg,a\n2.jpg,\n3.jpg,3\n", [1, 0]),
    ],
)
def test_csv_of_other_people(tmp_path, capsys, images, expected):
    root = tmp_path / "mine"
    touch(root, "1.jpg", "2.jpg", "3.jpg")
    write(root / "images.csv", images)
    rows, _ = made("csv", root, tmp_path)
    assert rows == [["1.jpg", expected[0]], ["3.jpg", expected[1]]]
    assert "1 images without a label" in capsys.readouterr().out


def test_csv_of_numbered_images(tmp_path):
    root = tmp_path / "mine"
    touch(root, "7.jpg", "007.png")
    write(root / "images.csv", "uri,label\n7.jpg,1\n007.png,0\n")
    write(root / "boxes.csv", "uri;x0;y0;x1;y1\n7.jpg;1,5;2;3;4\n")
    images, boxes = made("csv", root, tmp_path)
    assert images == [["007.png", 0], ["7.jpg", 1]]
    assert boxes == [["7.jpg", 1.5, 2, 3, 4, 1]]


@pytest.mark.parametrize(
    ("layout", "files", "message"),
    [
        ("voc", {"JPEGImages/1.jpg": "", "Annotations/1.xml": "<broken"}, "not in the layout voc"),
        ("coco", {"1.jpg": "", "instances_a.json": "{}"}, "not in the layout coco: KeyError"),
        ("csv", {"1.jpg": "", "images.csv": "file,kind\n1.jpg,2\n"}, "no column label"),
        ("csv", {"1.jpg": ""}, "no images.csv"),
        ("image_folder", {"1.jpg": ""}, "no image with a known class"),
        ("tiny_imagenet", {"notes.txt": ""}, "no image with a known class; 0 images"),
    ],
)
def test_what_is_no_such_layout_is_refused(tmp_path, capsys, layout, files, message):
    for path, text in files.items():
        write(tmp_path / "root" / path, text)
    root, output = str(tmp_path / "root"), tmp_path / "made"
    assert main(["--layout", layout, "--input", root, "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("manifest: ")
    assert message in told
    assert told.count("\n") == 1
    assert not output.exists()


def test_a_root_that_is_not_there(tmp_path, capsys):
    assert main(["--layout", "voc", "--input", str(tmp_path / "no"), "--output", "x"]) == 2
    assert "cannot list" in capsys.readouterr().err


@pytest.mark.long
def test_on_object_storage(tmp_path):
    (tmp_path / "store").mkdir()
    store = ObjectStore(tmp_path / "store")
    try:
        for file in sorted(tiny(tmp_path / "tiny").rglob("*.*")):
            name = file.relative_to(tmp_path)
            with store.filesystem().open_output_stream(f"{BUCKET}/{name}") as stream:
                stream.write(file.read_bytes())
        root = f"s3://{BUCKET}/tiny/"
        script = Path(__file__).parent.parent / "jobs/manifest.py"
        options = ["--input", root, "--output", f"s3://{BUCKET}/made"]
        subprocess.run(
            [sys.executable, script, "--layout", "tiny_imagenet", *options],
            env=store.environment,
            check=True,
        )
        with store.filesystem().open_input_file(f"{BUCKET}/made/boxes.parquet") as file:
            boxes = pd.read_parquet(file)
        assert boxes.uri[2] == f"s3://{BUCKET}/tiny/val/images/val_0.JPEG"
        assert len(boxes) == 4
    finally:
        store.stop()
