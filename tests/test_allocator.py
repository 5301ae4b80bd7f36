"""Whether freed memory is kept, by the page faults of taking it again."""

import os
import subprocess
import sys

import pytest

from scacam.pipeline.cluster import ENVIRONMENT

# As Ray does it with an actor: in a thread, with as much at once as a batch of features.
PROGRAM = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np

def again():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(25_000_000, dtype=np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def run():
    again()
    return again()

if sys.argv[1] == "main":
    from scacam.pipeline import cluster
    cluster.keep_freed_memory()
    print(run())
else:
    with ThreadPoolExecutor(1) as threads:
        print(threads.submit(run).result())
"""


def faults(where: str, settings: dict[str, str]) -> int:
    command = [sys.executable, "-c", PROGRAM, where]
    environment = {"PATH": os.environ["PATH"]} | settings
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.parametrize(
    ("where", "settings"), [("thread", ENVIRONMENT), ("main", {})], ids=["worker", "dry run"]
)
def test_memory_is_not_taken_anew(where, settings):
    assert 10 * faults(where, settings) < faults("thread", {})
