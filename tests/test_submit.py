"""The explain job on a cluster that is there already, submitted as on any other."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from servers import JobServer

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
NETWORKS = {
    "squeezenet1_1": "random",
    "resnet18": "random",
    "tests.tiny_networks:colours": "DEFAULT",
}


@pytest.fixture
def job_server() -> Iterator[JobServer]:
    """One worker with two GPUs joins after a while.

    Only Ray knows of the GPUs: pools get their shares of them, and networks run on CPUs.
    """
    server = JobServer(Path(sys.executable).parent)
    join = threading.Timer(15, server.add_worker, ["--num-cpus=4", "--num-gpus=2"])
    join.start()
    yield server
    join.join()
    server.stop()


def test_a_submitted_job(job_server, photo_folder, tmp_path):
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    command += ["--", sys.executable, "jobs/explain.py", "--input", str(photo_folder(10))]
    command += ["--output", str(tmp_path / "out"), "--gpus", "2", "--gpu-decode", "--networks"]
    command += [f"{name}={weights}" for name, weights in NETWORKS.items()]
    environment = job_server.environment | {"RAY_ADDRESS": job_server.url}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for nodes to join" in done.stdout + done.stderr
    assert "10 of 10 images explained" in done.stdout
    for network in NETWORKS:
        path = tmp_path / "out" / "explanations" / f"network={network}"
        rows = pd.read_parquet(path, columns=["image_id"])
        assert rows["image_id"].nunique() == 10
