"""Installed from a wheel, away from the checkout: on this machine and on a cluster of two nodes."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from servers import JobServer

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment: scacam from its wheel, what it needs from this one."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT / "scacam", source / "scacam")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(source)], check=True)
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv/bin"
    (wheel,) = folder.glob("scacam-*.whl")
    subprocess.run([programs / "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / f"venv/lib/{version}/site-packages/dependencies.pth"
    packages.write_text(sysconfig.get_path("purelib"))
    return programs


def test_every_job_from_an_empty_folder(programs, photo_folder, tmp_path):
    photos, work = photo_folder(6), tmp_path / "work"
    work.mkdir()
    uris = pd.DataFrame({"uri": sorted(map(str, photos.iterdir()))})
    uris.assign(label=3).to_csv(work / "photos.csv", index=False)
    uris.assign(x0=20, y0=20, x1=150, y1=140).to_csv(work / "boxes.csv", index=False)

    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def scacam(*arguments: str) -> str:
        command = [str(programs / "scacam"), *arguments]
        done = subprocess.run(command, cwd=work, env=away, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for output in ("out", "again"):
        told = scacam(
            *("explain", "--input", "photos.csv", "--output", output, "--explain-label"),
            *("--networks", "squeezenet1_1=random", "--methods", "grad_cam", "sca_cam"),
        )
        assert "6 of 6 images explained" in told
    assert "6 images evaluated" in scacam("evaluate", "--run", "out", "--boxes", "boxes.csv")
    scacam("report", "--run", "out")
    scacam("pictures", "--run", "out")
    scacam("compare", "--runs", "again", "out")
    assert "<svg" in (work / "out/report.html").read_text()
    assert "again" in (work / "out/comparison.html").read_text()
    assert len(list((work / "out/pictures").iterdir())) == 6


@pytest.fixture
def cluster(programs: Path) -> Iterator[JobServer]:
    server = JobServer(programs)
    try:
        server.add_worker("--num-cpus=4")
        yield server
    finally:
        server.stop()


def test_submitted_to_a_cluster_without_the_checkout(programs, cluster, photo_folder, tmp_path):
    ray = [str(programs / "python"), "-m", "ray.scripts.scripts"]
    command = [*ray, "job", "submit", "--", str(programs / "scacam"), "explain"]
    command += ["--input", str(photo_folder(6)), "--output", str(tmp_path / "out")]
    command += ["--networks", "squeezenet1_1=random", "--methods", "grad_cam"]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.url}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 images explained" in done.stdout
    rows = pd.read_parquet(tmp_path / "out/explanations")
    assert rows["image_id"].nunique() == 6
