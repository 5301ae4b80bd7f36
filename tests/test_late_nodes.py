"""Clusters whose nodes come late."""

import time
from collections.abc import Iterator

import pytest
from clusters import cluster_of, heard, join
from ray.cluster_utils import Cluster
from test_faults import photos, shards_in, start

pytestmark = pytest.mark.long

__all__ = ["photos"]  # a fixture


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, as `ray up` leaves it at first."""
    with cluster_of(0) as found:
        yield found


def test_a_job_waits_for_the_nodes_it_was_promised(cluster, photos, tmp_path):
    """The first worker has CPUs and no GPU; it is the second that has one, to Ray's mind."""
    process = start(
        *(str(photos), str(tmp_path / "out"), "--limit", "12", "--gpus", "1"),
        *("--networks", "tests.tiny_networks:colours"),
        environment={"RAY_ADDRESS": cluster.address},
    )
    said = heard(process, "no node of the cluster has 2 CPUs")
    join(cluster, num_cpus=2)
    time.sleep(10)
    assert process.poll() is None
    assert not shards_in(str(tmp_path / "out"))
    join(cluster, num_cpus=2, num_gpus=1)
    said += process.stdout.read()
    assert process.wait() == 0, said
    assert "waiting for nodes to join" in said
    assert "12 of 12 images explained" in said
