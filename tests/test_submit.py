"""The explain job on a cluster that is there already, submitted as on any other."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
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
    """The job server of a head without CPUs, whose one worker with two GPUs joins after a while."""
    folder = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets bear no longer path
    ports = []
    for _ in range(4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    head = [*start, "--head", "--num-cpus=0", f"--temp-dir={folder}", f"--port={ports[0]}"]
    head += [f"--dashboard-port={ports[1]}", "--dashboard-host=127.0.0.1"]
    head += [f"--dashboard-agent-listen-port={ports[2]}"]
    # GPUs of which only Ray knows: pools get their shares of them, and networks run on CPUs.
    worker = [*start, f"--address=127.0.0.1:{ports[0]}", "--num-cpus=4", "--num-gpus=2"]
    worker += [f"--dashboard-agent-listen-port={ports[3]}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)
    nodes = []

    def begin(command: list[str]) -> None:
        with (Path(folder) / "log").open("ab") as log:
            nodes.append(
                subprocess.Popen(  # not from the checkout, which workers are to get with the job
                    command,
                    cwd=folder,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    begin(head)
    deadline = time.monotonic() + 90
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", ports[1])) == 0:
                break
        assert time.monotonic() < deadline, (Path(folder) / "log").read_text()
        time.sleep(0.5)
    time.sleep(10)  # until the agent that takes jobs has registered
    join = threading.Timer(15, begin, [worker])
    join.start()
    yield f"http://127.0.0.1:{ports[1]}"
    join.join()
    for node in reversed(nodes):
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job(job_server, photo_folder, tmp_path):
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    command += ["--", sys.executable, "jobs/explain.py", "--input", str(photo_folder(10))]
    command += ["--output", str(tmp_path / "out"), "--gpus", "2", "--gpu-decode", "--networks"]
    command += [f"{name}={weights}" for name, weights in NETWORKS.items()]
    environment = {**os.environ, "RAY_ADDRESS": job_server, "RAY_AUTH_MODE": "disabled"}
    environment.pop("PYTHONPATH", None)
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
