"""Clusters whose nodes come late and go at any time."""

import subprocess
import time
from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster
from test_faults import IMAGES, assert_same_rows, ended, photos, quiet, rows, shards_in, start

pytestmark = pytest.mark.long

__all__ = ["photos", "quiet"]  # fixtures

_EVERY_S = 20


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, as `ray up` leaves it at first."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


def test_a_job_waits_for_the_nodes_it_was_promised(cluster, photos, tmp_path):
    """The first worker has CPUs and no GPU; it is the second that has one, to Ray's mind."""
    process = start(
        *(str(photos), str(tmp_path / "out"), "--limit", "12", "--gpus", "1"),
        *("--networks", "tests.tiny_networks:colours"),
        environment={"RAY_ADDRESS": cluster.address},
    )
    time.sleep(10)
    cluster.add_node(num_cpus=2)
    time.sleep(10)
    assert process.poll() is None
    assert not shards_in(str(tmp_path / "out"))
    cluster.add_node(num_cpus=2, num_gpus=1)
    said = ended(process)
    assert "no node of the cluster has 2 CPUs" in said
    assert "the cluster has 0 of 1 GPUs" in said or "waiting for nodes to join" in said
    assert "12 of 12 images explained" in said


def test_nodes_that_vanish_all_the_time(cluster, photos, quiet, tmp_path):
    """A worker node is killed every twenty seconds through the whole run, and another comes."""
    output = str(tmp_path / "out")
    workers = [cluster.add_node(num_cpus=2) for _ in range(2)]
    process = start(str(photos), output, environment={"RAY_ADDRESS": cluster.address})
    killed = 0
    while True:
        try:
            process.wait(_EVERY_S)
            break
        except subprocess.TimeoutExpired:
            workers.append(cluster.add_node(num_cpus=2))
            cluster.remove_node(workers.pop(0), allow_graceful=False)
            killed += 1
            assert killed < 40, ended(process)
    said = ended(process)
    assert killed >= 2
    assert_same_rows(rows(output), quiet)
    assert f"{IMAGES} of {IMAGES} images explained" in said
