"""The explain job on a cluster that is there already, submitted as on any other."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from clusters import heard
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
    server = JobServer(Path(sys.executable).parent)
    yield server
    server.stop()


def test_a_submitted_job(job_server, photo_folder, tmp_path):
    """It waits for a worker with two GPUs.

    Only Ray knows of these: pools get their shares of them, and networks run on CPUs.
    """
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    command += ["--", sys.executable, "jobs/explain.py", "--input", str(photo_folder(10))]
    command += ["--output", str(tmp_path / "out"), "--gpus", "2", "--gpu-decode", "--networks"]
    command += [f"{name}={weights}" for name, weights in NETWORKS.items()]
    environment = job_server.environment | {"RAY_ADDRESS": job_server.url}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    said = heard(process, "waiting for nodes to join")
    job_server.add_worker("--num-cpus=4", "--num-gpus=2")
    said += process.stdout.read()
    assert process.wait() == 0, said
    assert "10 of 10 images explained" in said
    for network in NETWORKS:
        path = tmp_path / "out" / "explanations" / f"network={network}"
        rows = pd.read_parquet(path, columns=["image_id"])
        assert rows["image_id"].nunique() == 10
