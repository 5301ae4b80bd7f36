"""Installed from a wheel, away from the checkout: on this machine and on a cluster of two nodes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

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


def _environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more


def test_every_job_from_an_empty_folder(programs, photo_folder, tmp_path):
    photos, work = photo_folder(6), tmp_path / "work"
    work.mkdir()
    uris = pd.DataFrame({"uri": sorted(map(str, photos.iterdir()))})
    uris.assign(label=3).to_csv(work / "photos.csv", index=False)
    uris.assign(x0=20, y0=20, x1=150, y1=140).to_csv(work / "boxes.csv", index=False)

    def scacam(*arguments: str) -> str:
        command = [str(programs / "scacam"), *arguments]
        done = subprocess.run(command, cwd=work, env=_environment(), capture_output=True, text=True)
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
def cluster(programs: Path, tmp_path: Path) -> Iterator[str]:
    """The job server of a head without tasks and of a worker with two cores."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets bear no longer path
    gcs, dashboard, agent, other_agent = _free_ports(4)
    ray = [str(programs / "python"), "-m", "ray.scripts.scripts"]
    start = [*ray, "start", "--block", "--disable-usage-stats"]
    head = [*start, "--head", "--num-cpus=0", f"--temp-dir={folder}", f"--port={gcs}"]
    head += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    head += [f"--dashboard-agent-listen-port={agent}"]
    worker = [*start, f"--address=127.0.0.1:{gcs}", "--num-cpus=4"]
    worker += [f"--dashboard-agent-listen-port={other_agent}"]
    nodes = []
    with (folder / "log").open("wb") as log:
        for command in (head, worker):
            nodes.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=_environment(RAY_AUTH_MODE="disabled"),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
            deadline = time.monotonic() + 90
            while _is_closed(dashboard):
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
    time.sleep(10)  # until the agent that takes jobs has registered
    yield f"http://127.0.0.1:{dashboard}"
    for node in reversed(nodes):
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _is_closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_submitted_to_a_cluster_without_the_checkout(programs, cluster, photo_folder, tmp_path):
    ray = [str(programs / "python"), "-m", "ray.scripts.scripts"]
    command = [*ray, "job", "submit", "--", str(programs / "scacam"), "explain"]
    command += ["--input", str(photo_folder(6)), "--output", str(tmp_path / "out")]
    command += ["--networks", "squeezenet1_1=random", "--methods", "grad_cam"]
    environment = _environment(RAY_ADDRESS=cluster, RAY_AUTH_MODE="disabled")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 images explained" in done.stdout
    rows = pd.read_parquet(tmp_path / "out/explanations")
    assert rows["image_id"].nunique() == 6
