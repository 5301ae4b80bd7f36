"""The explain job on a cluster that is there already, submitted as on any other."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
NETWORKS = {
    "squeezenet1_1": "random",
    "resnet18": "random",
    "tests.tiny_networks:colours": "DEFAULT",
}


@pytest.fixture
def job_server() -> Iterator[str]:
    """The address of the job server of a cluster of one node with two GPUs."""
    folder = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets bear no longer path
    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    # GPUs of which only Ray knows: pools get their shares of them, and networks run on CPUs.
    command += ["--num-cpus=4", "--num-gpus=2", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-agent-listen-port={ports[2]}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)
    with (Path(folder) / "log").open("wb") as log:
        head = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 90
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", ports[1])) == 0:
                break
        assert time.monotonic() < deadline, (Path(folder) / "log").read_text()
        time.sleep(0.5)
    time.sleep(10)  # until the agent that takes jobs has registered
    yield f"http://127.0.0.1:{ports[1]}"
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job(job_server, photo_folder, tmp_path):
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    command += ["--", sys.executable, "jobs/explain.py", "--input", str(photo_folder(10))]
    command += ["--output", str(tmp_path / "out"), "--networks"]
    command += [f"{name}={weights}" for name, weights in NETWORKS.items()]
    environment = {**os.environ, "RAY_ADDRESS": job_server, "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 images explained" in done.stdout
    for network in NETWORKS:
        rows = pd.read_parquet(tmp_path / "out" / "explanations" / f"network={network}")
        assert rows["image_id"].nunique() == 10
