"""Ray clusters whose nodes are processes of this machine, and jobs that wait for them."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.cluster_utils import Cluster


@contextmanager
def cluster_of(cpus: int) -> Iterator[Cluster]:
    """A head with so many CPUs, as long as the context lasts."""
    cluster = _patiently(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": cpus}))
    try:
        yield cluster
    finally:
        cluster.shutdown()


def join(cluster: Cluster, **resources: int) -> Any:
    """A node more."""
    return _patiently(lambda: cluster.add_node(**resources))


def _patiently(start: Callable[[], Any]) -> Any:
    """Ray gives a node 30 s to start, and a busy machine may not."""
    for _ in range(2):
        with suppress(Exception):
            return start()
    return start()


def heard(process: "subprocess.Popen[str]", words: str) -> str:
    """What a process says until it says some words; the rest is to be read from `stdout`."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(said)
