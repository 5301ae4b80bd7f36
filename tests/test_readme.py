"""Every code block of the READMEs, run for real: on two networks, without a single errors row.

A block is left out if its first line says `skip`: it installs something large or needs a cloud.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import duckdb
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)( skip)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IMAGES = 12
pytestmark = pytest.mark.long


def blocks(file: str) -> list[tuple[str, str]]:
    """Language and code of the blocks of a file that can be run anywhere."""
    found = BLOCK.findall((ROOT / file).read_text())
    return [(language, code) for language, skip, code in found if not skip]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, module_photo: Any, monkeypatch_module: Any
) -> Iterator[Path]:
    """A folder with all that the READMEs take for granted: photos, weights, a store, runs."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "photos").mkdir()
    for seed in range(IMAGES):
        module_photo(300, 200 + 5 * seed, seed).save(folder / f"photos/{seed:02d}.jpg")
    # Weights at random, where torch looks for those that it has downloaded.
    published = torchvision.models.ResNet50_Weights.DEFAULT.url.rpartition("/")[2]
    (folder / "torch/hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    module = torchvision.models.resnet50()
    torch.save(module.state_dict(), folder / "torch/hub/checkpoints" / published)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), folder / "weights.pth")
    rng = np.random.default_rng(0)
    labels = pd.DataFrame({"uri": [f"photos/{seed:02d}.jpg" for seed in range(IMAGES)]})
    labels.assign(label=rng.integers(0, 1000, IMAGES)).to_csv(folder / "photos.csv", index=False)
    labels.assign(x0=20, y0=30, x1=200, y1=150).to_csv(folder / "boxes.csv", index=False)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "TORCH_HOME": str(folder / "torch"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }.items():
        monkeypatch_module.setenv(name, value)
    store = boto3.client("s3")
    store.create_bucket(Bucket="bucket")
    for path in (folder / "photos").iterdir():
        store.upload_file(str(path), "bucket", f"photos/{path.name}")
    monkeypatch_module.chdir(folder)
    networks = ["--networks", "resnet50", "mobilenet_v3_small=weights.pth"]
    labelled = ["scacam", "explain", "--input", "photos.csv", "--explain-label"]
    labelled += ["--embeddings", *networks]
    for output in ("out", "out-b"):
        subprocess.run([*labelled, "--output", output], check=True)
    shutil.copytree("out", "out-a")
    yield folder
    server.stop()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("file", ["README.md", "jobs/README.md", "scacam/README.md"])
def test_commands(folder: Path, file: str) -> None:
    for language, code in blocks(file):
        if language == "sh":
            if "scacam explain" in code:
                shutil.rmtree("fresh", ignore_errors=True)
                code = code.replace("--output out/", "--output fresh/")
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
    if file == "README.md":
        for path in ("fresh/run.json", "out/report.html", "out/metrics/localization.parquet"):
            assert (folder / path).exists()
        assert len(list((folder / "out/pictures").glob("*.png"))) == IMAGES
        assert (folder / "out-b/comparison.html").exists()


@pytest.mark.parametrize("file", ["README.md", "jobs/README.md", "scacam/README.md"])
def test_code(folder: Path, file: str) -> None:
    names: dict[str, Any] = {"images": torch.randn(2, 3, 224, 224)}
    asked: pd.DataFrame | None = None
    for language, code in blocks(file):
        if language == "sql":
            connection = names.get("sql") or duckdb.connect()
            asked = connection.execute(code).df()
        elif language == "python":
            names.pop("answer", None)
            exec(compile(code.replace('"out/"', '"fresh-python/"'), file, "exec"), names)
            if asked is not None and "answer" in names:
                assert_same(asked, names["answer"])
                asked = None


def assert_same(asked: pd.DataFrame, answer: pd.DataFrame) -> None:
    """SQL and pandas say the same, whatever they call the columns."""
    assert len(asked) == len(answer)
    for left, right in zip(asked.items(), answer.items(), strict=True):
        if pd.api.types.is_numeric_dtype(left[1]):
            np.testing.assert_allclose(left[1].to_numpy(), right[1].to_numpy(), rtol=1e-4)
        else:
            assert left[1].tolist() == right[1].tolist()


def test_every_block_is_run_or_says_why_not() -> None:
    every = [
        found
        for file in ("README.md", "jobs/README.md", "scacam/README.md")
        for found in BLOCK.findall((ROOT / file).read_text())
    ]
    skipped = [code for _, skip, code in every if skip]
    assert len(every) >= 20
    assert all(
        re.search(r"pip install|scripts/|aws |kubectl|fiftyone|scacam faithfulness", code)
        for code in skipped
    )
    assert {language for language, _, _ in every} == {"sh", "sql", "python"}
