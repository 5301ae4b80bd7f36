"""What the explain job does when things break: each fault is made to happen for real."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
from clusters import cluster_of, join
from PIL import Image
from pyarrow.fs import FileSelector
from servers import BUCKET, LIMITED_KEY, ObjectStore, Proxy

from scacam.runs.record import differences, read_record
from scacam.storage import locate, write_bytes

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
IMAGES = 160
_NODES_LOST = 4
GPU = {"RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'}
"""An environment with a GPU of which only Ray knows."""
LAYERS = ("explanations/network=a/layer=1", "explanations/network=a/layer=2")


def start(source: str, output: str, *arguments: str, environment: dict[str, str] | None = None):
    """The job as a person starts it."""
    command = [sys.executable, "jobs/explain.py", "--input", source, "--output", output]
    command += ["--methods", "grad_cam", "sca_cam", "--top-k", "2", "--embeddings", *arguments]
    if "--networks" not in arguments:
        command += ["--networks", "resnet18=random"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    said, _ = process.communicate(timeout=400)
    assert process.returncode == status, said
    return said


def rows(output: str) -> pd.DataFrame:
    filesystem, path = locate(output)
    table = ds.dataset(
        f"{path}/explanations", filesystem=filesystem, partitioning="hive"
    ).to_table()
    heatmaps = table["heatmap"].combine_chunks().to_numpy_ndarray()
    frame = table.drop_columns(["heatmap"]).to_pandas()
    frame["heatmap"] = list(heatmaps.reshape(len(frame), -1).astype(np.float32))
    return frame.sort_values(["network", "image_id", "class_id", "method"], ignore_index=True)


def assert_same_rows(actual: pd.DataFrame, expected: pd.DataFrame) -> None:
    exact = ["network", "image_id", "uri", "width", "height", "class_id", "rank", "method"]
    pd.testing.assert_frame_equal(actual[exact], expected[exact])
    for name in ("probability", "scale"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-3)
    difference = np.stack(actual["heatmap"]) - np.stack(expected["heatmap"])
    assert np.abs(difference).max() < 2e-3


def assert_same_images_kept(output: str, expected: str) -> None:
    """The same classes have predictions, and the same images an embedding, each once."""
    kept = {"predictions": ["image_id", "class_id", "rank"], "embeddings": ["image_id"]}
    for kind, keys in kept.items():
        both = [
            ds.dataset(f"{each}/{kind}").to_table(keys).to_pandas() for each in (output, expected)
        ]
        pd.testing.assert_frame_equal(*(rows.sort_values(keys, ignore_index=True) for rows in both))


@pytest.fixture(scope="module")
def photos(tmp_path_factory, module_photo) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "photos"
    folder.mkdir()
    for seed in range(IMAGES):
        module_photo(240, 230, seed).save(folder / f"{seed:04d}.jpg")
    return folder


@pytest.fixture(scope="module")
def quiet(photos) -> pd.DataFrame:
    """The rows of a run in which nothing happens."""
    output = str(photos.parent / "quiet")
    ended(start(str(photos), output))
    return rows(output)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = ObjectStore(tmp_path_factory.mktemp("store"))
    before = dict(os.environ)
    os.environ.update(server.environment)
    yield server
    os.environ.clear()
    os.environ.update(before)
    server.stop()


def names(filesystem, path) -> list[str]:
    selector = FileSelector(path, recursive=True, allow_not_found=True)
    return [info.path for info in filesystem.get_file_info(selector)]


def shards_in(output: str) -> int:
    filesystem, path = locate(output)
    return sum(name.endswith(".parquet") for name in names(filesystem, f"{path}/explanations"))


def killed_and_continued(
    begin: Callable[[], "subprocess.Popen[str]"], output: str, seed: int
) -> None:
    """Kill the job with SIGKILL five times, at random moments or soon after its next shard.

    Then let it end.
    """
    moments = random.Random(seed)
    for _ in range(5):
        before = shards_in(output)
        process = begin()
        latest = time.monotonic() + moments.uniform(6, 24)
        while time.monotonic() < latest and shards_in(output) == before:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    ended(begin())


def test_killed_five_times_on_local_disk(photos, quiet, tmp_path):
    output = str(tmp_path / "out")
    killed_and_continued(lambda: start(str(photos), output), output, seed=1)
    assert_same_rows(rows(output), quiet)
    assert_same_images_kept(output, str(photos.parent / "quiet"))
    assert "nothing to do" in ended(start(str(photos), output))


def test_killed_five_times_on_object_storage(photos, quiet, store):
    store.upload(photos, "kill/photos")
    source, output = f"s3://{BUCKET}/kill/photos", f"s3://{BUCKET}/kill/out"
    killed_and_continued(lambda: start(source, output), output, seed=2)
    actual = rows(output)
    actual["uri"] = actual["uri"].str.replace(source, str(photos))
    assert_same_rows(actual, quiet)


def test_the_store_is_gone_for_a_while(photos, quiet, store):
    store.upload(photos, "outage/photos")
    source, output = f"s3://{BUCKET}/outage/photos", f"s3://{BUCKET}/outage/out"
    process = start(source, output)
    filesystem, path = locate(output)
    wait_for(lambda: any("explanations" in name for name in names(filesystem, path)))
    store.stop()
    time.sleep(30)
    store.start()
    said = ended(process)
    assert f"{IMAGES} of {IMAGES} images explained" in said
    actual = rows(output)
    actual["uri"] = actual["uri"].str.replace(source, str(photos))
    assert_same_rows(actual, quiet)


def test_processes_of_the_job_are_killed(photos, quiet, tmp_path):
    output = tmp_path / "out"
    process = start(str(photos), str(output))
    victims = 0
    for shards in (1, 3):
        wait_for_shards(output, shards)
        for worker in workers_of(process.pid, "MapBatches(Explain)")[:1]:
            os.kill(worker, signal.SIGKILL)
            victims += 1
    ended(process)
    assert victims
    assert_same_rows(rows(str(output)), quiet)


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_shards(output: Path, count: int) -> None:
    wait_for(lambda: shards_in(str(output)) >= count)


def workers_of(driver: int, name: str) -> list[int]:
    """Ray's workers with a task of this name, descendants of a driver."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    processes = [line.split(None, 2) for line in listing.splitlines()[1:]]
    family = {driver}
    for _ in range(5):
        family |= {int(pid) for pid, parent, _ in processes if int(parent) in family}
    return [int(pid) for pid, _, args in processes if int(pid) in family and name in args]


@pytest.fixture
def deadly_format(tmp_path) -> dict[str, str]:
    """An environment in which decoding a file that begins with DEADLY kills the process."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from PIL import Image, ImageFile\n"
        "class Deadly(ImageFile.ImageFile):\n"
        "    format = 'DEADLY'\n"
        "    def _open(self):\n"
        "        signal.raise_signal(signal.SIGSEGV)\n"
        "Image.register_open('DEADLY', Deadly, lambda start: start[:6] == b'DEADLY')\n"
    )
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.parametrize(("arguments", "gpu"), [([], {}), (["--gpu-decode"], GPU)])
def test_an_image_that_kills_its_process(photos, tmp_path, deadly_format, arguments, gpu):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(photos.iterdir())[:12]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "0005x.jpg").write_bytes(b"DEADLY")
    output = str(tmp_path / "out")
    arguments = ["--networks", "tests.tiny_networks:colours", *arguments]
    ended(start(str(folder), output, *arguments, environment=deadly_format | gpu))
    errors = pd.read_parquet(f"{output}/errors")
    assert errors[["uri", "stage", "error"]].values.tolist() == [
        [str(folder / "0005x.jpg"), "decode", "crashed"]
    ]
    assert rows(output)["image_id"].nunique() == 12


def test_a_batch_that_is_too_large_for_the_memory(photos, tmp_path):
    output = str(tmp_path / "out")
    networks = ["--networks", "tests.tiny_networks:greedy", "--batch-size", "16"]
    ended(start(str(photos), output, *networks, "--limit", "40"))
    assert rows(output)["image_id"].nunique() == 40


def test_a_full_disk_stops_the_job_and_it_goes_on_later(photos, quiet, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], check=True)
    try:
        output = disk / "out"
        said = ended(start(str(photos), str(output)), status=2)
        assert "No space left on device" in said.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        ended(start(str(photos), str(output)))
        assert_same_rows(rows(str(output)), quiet)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_hopeless_run_is_stopped(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(1000):
        (folder / f"{index:04d}.jpg").write_bytes(b"broken")
    networks = ["--networks", "tests.tiny_networks:colours"]
    begin = lambda: start(  # noqa: E731
        str(folder), str(tmp_path / "out"), *networks, "--max-error-rate", "0.5"
    )
    said = ended(begin(), status=2)
    assert "more than --max-error-rate 0.5 allows" in said.splitlines()[-1]
    assert "not_an_image" in said.splitlines()[-1]


def test_two_jobs_on_one_output(photos, tmp_path):
    output = tmp_path / "out"
    first = start(str(photos), str(output))
    wait_for((output / "run.json").exists)
    first.send_signal(signal.SIGSTOP)  # so that it does not end before the other has begun
    assert "another job is writing to" in ended(start(str(photos), str(output)), status=2)
    first.send_signal(signal.SIGCONT)
    ended(first)


def test_a_lease_on_object_storage(store, tmp_path):
    from scacam.errors import RunError
    from scacam.runs.lock import locked

    output = f"s3://{BUCKET}/lease/out"
    with locked(output):
        refused: list[str] = []

        def contend() -> None:
            try:
                with locked(output):
                    refused.append("not at all")
            except RunError as error:
                refused.append(str(error))

        thread = threading.Thread(target=contend)
        thread.start()
        thread.join()
        assert "another job is writing to" in refused[0]
        held = store.filesystem().open_input_stream(f"{BUCKET}/lease/out/.lock").read()
    with store.filesystem().open_output_stream(f"{BUCKET}/lease/out/.lock") as file:
        file.write(held)  # as a killed job leaves it
    began = time.monotonic()
    with locked(output):
        assert 25 < time.monotonic() - began < 45


def test_a_role_that_may_write_nothing_but_the_output(photos, quiet, store):
    """Killed and continued by it; nothing is changed but what lies below the output.

    With actors that decode, as on GPUs. Who decodes is part of a run.
    """
    store.upload(photos, "limited/photos")
    source, output = f"s3://{BUCKET}/limited/photos", f"s3://{BUCKET}/limited/out"
    proxy = Proxy(store.ports[0])
    role = {"AWS_ACCESS_KEY_ID": LIMITED_KEY, "AWS_ENDPOINT_URL": proxy.endpoint, **GPU}
    process = start(source, output, "--gpu-decode", environment=role)
    wait_for(lambda: shards_in(output) >= 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = shards_in(output)
    proxy.heads.clear()
    ended(start(source, output, "--gpu-decode", environment=role))
    actual = rows(output)
    actual["uri"] = actual["uri"].str.replace(source, str(photos))
    assert len(actual) == len(quiet)
    close = actual["image_id"][actual["class_id"] != quiet["class_id"]].unique()
    assert len(close) <= 1  # whose second and third class are as probable as each other
    assert_same_rows(*(each[~each["image_id"].isin(close)] for each in (actual, quiet)))
    record = read_record(output)
    assert record
    assert differences(record, {**record, "gpu_decode": False}) == ["gpu_decode: True → False"]
    changes = [request for request in proxy.requests() if request.startswith(("PUT", "DELETE"))]
    assert len(changes) > shards_in(output) - before
    assert all(request.split()[1].startswith(f"/{BUCKET}/limited/out/") for request in changes)
    proxy.stop()


def test_a_task_cut_off_between_its_shards_and_its_commit(store, tmp_path):
    from scacam.pipeline.checkpoint import Checkpoint, checkpoint

    for output in (str(tmp_path / "out"), f"s3://{BUCKET}/cut/out"):
        for name in ("whole", "begun", "committed"):
            for folder in (*LAYERS, "errors"):
                write_bytes(f"{output}/{folder}/{name}.parquet", b"x")
        done = [f"{output}/.checkpoint/{name}.parquet" for name in ("whole", "committed")]
        pending = [
            f"{output}/.checkpoint/{name}.pending.parquet" for name in ("begun", "committed")
        ]
        for path in (*done, *pending):
            write_bytes(path, b"x")
        files = [[locate(path)[1] for path in paths] for paths in (pending, done)]
        found = Checkpoint(checkpoint_config=checkpoint(output), data_context=None)
        found._undo(*files, locate(output)[1])
        left = {name.removeprefix(f"{locate(output)[1]}/") for name in names(*locate(output))}
        assert {name for name in left if name.endswith(".parquet")} == {
            f"{folder}/{name}.parquet"
            for folder in (
                *LAYERS,
                "errors",
                ".checkpoint",
            )
            for name in ("whole", "committed")
        }


def test_a_job_whose_lease_is_taken_stops_and_leaves_it(photos, store):
    output = f"s3://{BUCKET}/taken/out"
    process = start(str(photos), output)
    lock = f"{BUCKET}/taken/out/.lock"
    wait_for(lambda: shards_in(output) >= 1)
    with store.filesystem().open_output_stream(lock) as file:
        file.write(b"another job")
    said = ended(process, status=2)
    assert f"another job has taken over {output}" in said.splitlines()[-1]
    assert store.filesystem().open_input_stream(lock).read() == b"another job"


def test_a_node_is_killed(photos, quiet, tmp_path):
    with cluster_of(2) as cluster:
        join(cluster, num_cpus=2)
        victim = join(cluster, num_cpus=2)
        output = tmp_path / "out"
        environment = {"RAY_ADDRESS": cluster.address}
        process = start(str(photos), str(output), environment=environment)
        wait_for_shards(output, 1)
        cluster.remove_node(victim, allow_graceful=False)
        join(cluster, num_cpus=2)
        ended(process)
        assert_same_rows(rows(str(output)), quiet)


def test_worker_nodes_vanish_all_the_time(photos, quiet, tmp_path):
    """As spot machines do: the older of two is killed after every shard, and another comes."""
    killed, output = 0, str(tmp_path / "out")
    with cluster_of(0) as cluster:
        workers = [join(cluster, num_cpus=2) for _ in range(2)]
        process = start(str(photos), output, environment={"RAY_ADDRESS": cluster.address})
        with ThreadPoolExecutor() as pool:  # of what Ray tells about lost nodes a pipe runs full
            end = pool.submit(ended, process)
            while not end.done():
                if killed < min(_NODES_LOST, shards_in(output)):
                    cluster.remove_node(workers.pop(0), allow_graceful=False)
                    workers.append(join(cluster, num_cpus=2))
                    killed += 1
                time.sleep(0.05)
            said = end.result()
        assert killed >= 3
        assert f"{IMAGES:,} now, in " in said
        assert_same_rows(rows(output), quiet)


def test_odd_images_leave_the_job_alone(tmp_path):
    """Sizes at the edges of what is possible."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (1, 5000), "red").save(folder / "tall.png")
    Image.new("I;16", (40, 40), 40000).save(folder / "deep.png")
    Image.new("CMYK", (40, 40)).save(folder / "print.jpg")
    ended(start(str(folder), str(tmp_path / "out"), "--networks", "tests.tiny_networks:colours"))
    assert rows(str(tmp_path / "out"))["image_id"].nunique() == 3
