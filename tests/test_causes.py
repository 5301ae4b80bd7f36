"""What is said of an error in a worker, as Ray hands it to the driver."""

import os
import subprocess
import sys

import pytest
import ray
import ray.data
from ray import cloudpickle
from ray.data.datasource import BlockBasedFileDatasink

from scacam.errors import RunError
from scacam.pipeline.cluster import await_nodes, own_cores, root_cause, start_ray

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests


@pytest.fixture(autouse=True)
def embedded(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start_ray()
    ray.data.DataContext.get_current().enable_progress_bars = False


def raising(batch):
    raise TypeError("'NoneType' object is not subscriptable\nsecond line")


def raising_without_a_word(batch):
    raise AssertionError


def refusing(batch):
    try:
        raise ValueError("1\nKeyError: 2")
    except ValueError as error:
        raise RunError("give it a label") from error


def raising_what_cannot_be_sent(batch):
    class Local(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.file = open(os.devnull)  # noqa: SIM115

    raise Local("cannot be pickled")


class Unborn:
    def __init__(self) -> None:
        raise TypeError("cannot pickle '_thread.lock' object")

    def __call__(self, batch):
        return batch


class Dying:
    def __call__(self, batch):
        os._exit(1)


class Refusing(BlockBasedFileDatasink):
    def write(self, blocks, ctx):
        raise RunError("100 of the first 100 images failed")


def cause(function, **options) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ray.data.range(4).map_batches(function, batch_size=None, **options).materialize()
    return root_cause(caught.value)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (raising, "TypeError: 'NoneType' object is not subscriptable"),
        (raising_without_a_word, "AssertionError"),
        (refusing, "give it a label"),
        (raising_what_cannot_be_sent, "cannot be pickled"),
    ],
)
def test_an_error_in_a_stage(function, told):
    assert cause(function).endswith(told)


def test_an_error_in_a_constructor():
    pool = ray.data.ActorPoolStrategy(size=1)
    assert cause(Unborn, compute=pool) == "TypeError: cannot pickle '_thread.lock' object"


@pytest.mark.filterwarnings("ignore:.*ray_remote_args")
def test_a_killed_actor():
    pool = ray.data.ActorPoolStrategy(size=1)
    told = cause(Dying, compute=pool, max_restarts=0)
    assert told == "The actor is dead because its worker process has died."


def test_a_refusal_in_the_sink(tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ray.data.range(4).write_datasink(Refusing(str(tmp_path / "out")))
    assert root_cause(caught.value) == "100 of the first 100 images failed"


def test_a_broken_shard(tmp_path):
    (tmp_path / "shard.parquet").write_bytes(b"PAR1")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        ray.data.read_parquet(str(tmp_path / "shard.parquet")).materialize()
    assert root_cause(caught.value).startswith("ArrowInvalid: Parquet")


def test_gpus_that_cannot_come_are_not_waited_for():
    """A Ray of one's own does not grow."""
    assert await_nodes(None) == int(ray.cluster_resources().get("GPU", 0))
    with pytest.raises(RunError, match=r"^the cluster has \d+ of 1000 GPUs; .*--gpus \d+ does"):
        await_nodes(1000)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
    ],
)
def test_a_container_has_the_cores_that_it_was_given(tmp_path, monkeypatch, files, cores):
    """Of a machine of 64, on which a batch job may use 8."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu").mkdir()
    for name, said in files.items():
        (tmp_path / name).write_text(said)
    assert own_cores(tmp_path) == cores


def test_a_process_that_ends_early_lets_ray_start_first():
    """Ended while it starts, Ray crashes now and then, and the exit code is no longer the job's."""
    program = (
        "import atexit\n"
        "from scacam.pipeline.cluster import ray_starting\n"
        "atexit.register(lambda: print(started.__self__.done()))  # the last but for Ray's own\n"
        "started = ray_starting()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr
