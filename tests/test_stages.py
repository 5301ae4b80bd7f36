"""The stages of the explain job on one block, called as Ray calls them: whose image fails."""

import io
import os
import shutil
import tarfile
import threading
from datetime import timedelta
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from servers import BUCKET, ObjectStore, Proxy

from scacam.errors import ImageError, RunError
from scacam.images import Preprocessing, see
from scacam.inputs.manifest import read_manifest
from scacam.localization import localize
from scacam.pipeline.checkpoint import checkpoint, done_before, images_of
from scacam.pipeline.cluster import start_ray
from scacam.pipeline.progress import start_tally
from scacam.pipeline.sink import ShardSink
from scacam.pipeline.stages import decode
from scacam.pipeline.stages.decode import Decode
from scacam.pipeline.stages.localize import Localize, Speaker
from scacam.pipeline.stages.rows import SAID, said
from scacam.pipeline.tasks import in_tasks
from scacam.storage import s3
from scacam.storage.s3 import open_bucket
from scacam.tables import MANIFEST, explanations_folder

SMALL = Preprocessing((32, 32), 32)


def manifest(uris: list[str]) -> pa.Table:
    rows = [{"image_id": index, "uri": uri} for index, uri in enumerate(uris)]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def failures(block: pa.Table) -> dict[int, tuple[str, str]]:
    rows = block.select(["image_id", "stage", "error"]).to_pylist()
    return {row["image_id"]: (row["stage"], row["error"]) for row in rows if row["error"]}


def test_whatever_an_image_raises_costs_that_image_alone(photo_folder, monkeypatch):
    # No file is known that makes the geometry raise. The first that does must not stop a job.
    def doubtful(data, samplings, view):
        seen = see(data, samplings, view)
        if seen[0] == (210, 195):
            raise ZeroDivisionError("by nothing")
        return seen

    monkeypatch.setattr(decode, "see", doubtful)
    uris = [str(path) for path in sorted(photo_folder(4).iterdir())]
    block = Decode([SMALL], "center_crop", None)(manifest(uris))
    assert failures(block) == {1: ("decode", "failed")}
    assert block["message"][1].as_py() == "ZeroDivisionError: by nothing"
    assert block["width"].to_pylist() == [200, 0, 220, 230]


def write_tar(path: Path, images: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for index, image in enumerate(images):
            entry = tarfile.TarInfo(f"{index}.jpg")
            entry.size = len(image)
            tar.addfile(entry, io.BytesIO(image))


def test_a_shard_that_is_cut_after_it_was_listed_costs_what_is_cut_off(tmp_path, photo_bytes):
    """Though its images are read together."""
    shard = tmp_path / "a.tar"
    write_tar(shard, [photo_bytes("JPEG", 60, 40, seed) for seed in range(8)])
    listed = read_manifest(str(shard)).table
    os.truncate(shard, listed["offset"][5].as_py() + 10)
    found = Decode([SMALL], "center_crop", None)(listed)
    assert list(failures(found)) == [5, 6, 7]
    assert found["width"].to_pylist()[:5] == [60] * 5


def test_containers_are_listed_in_tasks(tmp_path, photo_bytes):
    """As they are without, and what they raise as it was raised."""
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", [photo_bytes("JPEG", 9, 9, shard)] * (shard + 1))
    apart = read_manifest(str(tmp_path), ahead=in_tasks)
    assert len(apart.table) == 15
    assert apart.table.equals(read_manifest(str(tmp_path)).table)
    for index in range(2):
        pq.write_table(pa.table({"image": [b""]}), tmp_path / f"{index}.parquet")
    with pytest.raises(RunError) as caught:
        read_manifest(str(tmp_path), label_column="kind", ahead=in_tasks)
    assert str(caught.value) == f"{tmp_path}/0.parquet has no column 'kind'; it has image"


def test_who_interrupts_is_obeyed(photo_folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Decode([SMALL], "center_crop", None)(manifest([str(next(photo_folder(1).iterdir()))]))


def test_an_image_that_is_decoded_apart_fails_for_the_same_reason(photo_bytes):
    data = photo_bytes("PNG")
    with decode._isolated() as run:
        for broken, kind in ((b"junk", "not_an_image"), (data[:100], "corrupt")):
            with pytest.raises(ImageError) as raised:
                run(see, broken, [SMALL], "center_crop")
            assert raised.value.kind == kind
        size, _ = run(see, data, [SMALL], "center_crop")
    assert size == (300, 200)


ONE, TWO = (explanations_folder(name, "features") for name in ("one", "two"))


def explained(maps: dict[str, np.ndarray]) -> pa.Table:
    """A block as the networks leave it, each with one map `[N, h, w]` of every image."""
    count = len(next(iter(maps.values())))
    columns: dict[str, object] = {"image_id": np.arange(count)}
    columns["uri"] = [f"{index}.jpg" for index in range(count)]
    columns |= {"width": pa.array([64] * count, pa.int32()), "label": pa.nulls(count, pa.int32())}
    columns |= {"height": columns["width"]}
    columns |= {name: pa.nulls(count, pa.string()) for name in ("stage", "error", "message")}
    views = np.array([[0, 0, 64, 64]] * count, dtype=np.float32)
    columns["view 0"] = pa.FixedShapeTensorArray.from_numpy_ndarray(views)
    for name, heatmaps in maps.items():
        for what, kind in SAID.items():
            columns[said(name, what)] = pa.array([[0]] * count, pa.list_(kind))
        lists = list(heatmaps.reshape(count, -1))
        columns[said(name, "features")] = pa.array(lists, pa.list_(pa.float32()))
    return pa.table(columns)


def localizing(maps: dict[str, np.ndarray]) -> Localize:
    """The stage after networks with such maps."""
    speakers = [
        Speaker(name, ["cat"], 1, 0, (32, 32), {"features": (["gap_cam"], heatmaps.shape[1:])})
        for name, heatmaps in maps.items()
    ]
    return Localize(speakers, [], False, 0.0, None)


def spoilt(block: pa.Table, network: str, row: int) -> pa.Table:
    """The block with a map of too few cells."""
    name = said(network, "features")
    lists = block[name].to_pylist()
    lists[row] = lists[row][1:]
    column = pa.array(lists, block.schema.field(name).type)
    return block.set_column(block.schema.get_field_index(name), name, column)


def test_a_map_that_raises_costs_its_image_alone(tmp_path):
    rng = np.random.default_rng(0)
    maps = {"one": rng.standard_normal((5, 4, 4)), "two": rng.standard_normal((5, 3, 3))}
    stage = localizing(maps)
    whole = stage(explained(maps))
    found = stage(spoilt(explained(maps), "two", 3))
    assert failures(whole) == {}
    assert failures(found) == {3: ("localize", "failed")}
    assert "ValueError" in found["message"][3].as_py()
    others = [0, 1, 2, 4]
    for column in (ONE, TWO):
        assert found[column].take(others) == whole[column].take(others)
    views = np.array([[0, 0, 64, 64]] * 5)
    peaks, _ = localize(maps["one"], np.zeros(5, bool), views, (32, 32))
    first = [lists[0]["peak_x"] for lists in found[ONE].take(others).to_pylist()]
    assert first == peaks[others, 0].tolist()

    start_ray()
    sink = ShardSink(str(tmp_path), {ONE: (4, 4), TWO: (3, 3)}, start_tally(), 1.0)
    sink.write([found], SimpleNamespace(kwargs={"write_uuid": "task"}, task_idx=0))
    for folder in (ONE, TWO):
        rows = ds.dataset(tmp_path / folder).to_table()
        assert rows["image_id"].to_pylist() == others
    assert ds.dataset(tmp_path / "errors").to_table()["image_id"].to_pylist() == [3]


@pytest.mark.parametrize("done", [[], [0, 299, 300, 999], list(range(1000))])
def test_the_images_of_a_run_are_those_that_its_checkpoint_does_not_have(tmp_path, done):
    start_ray()
    images = manifest([f"{index}.jpg" for index in range(1000)])
    pq.write_table(images, tmp_path / "manifest.parquet", row_group_size=300)
    (tmp_path / ".checkpoint").mkdir()
    pq.write_table(
        pa.table({"image_id": pa.array(done, pa.int64())}), tmp_path / ".checkpoint/0.parquet"
    )
    assert done_before(str(tmp_path)) == len(done)
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = checkpoint(str(tmp_path))
    try:
        images_of(str(tmp_path), 0.5, 1000, 300).write_parquet(str(tmp_path / "left"))
    finally:
        context.checkpoint_config = None
    left = ds.dataset(tmp_path / "left").to_table() if len(done) < 1000 else MANIFEST.empty_table()
    kept = images.filter(~np.isin(np.arange(1000), done))
    assert left.sort_by("image_id").cast(MANIFEST) == kept


def test_what_failed_before_keeps_its_reason():
    maps = {"one": np.random.default_rng(0).standard_normal((2, 4, 4))}
    block = spoilt(explained(maps), "one", 1)
    for name, value in (("stage", "explain"), ("error", "not_finite"), ("message", "NaN")):
        column = pa.array([None, value], pa.string())
        block = block.set_column(block.schema.get_field_index(name), name, column)
    found = localizing(maps)(block)
    assert failures(found) == {1: ("explain", "not_finite")}


@pytest.fixture
def store(tmp_path: Path, monkeypatch):
    folder = tmp_path / "store"
    folder.mkdir()
    found = ObjectStore(folder)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    open_bucket.cache_clear()  # other tests' stores had the same name
    yield found
    open_bucket.cache_clear()
    found.stop()
    shutil.rmtree(folder)


@pytest.mark.long
def test_a_shard_is_read_in_few_requests(store, photo_bytes, tmp_path, monkeypatch):
    proxy = Proxy(store.ports[0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/a.tar", [photo_bytes("JPEG", 300, 200, i) for i in range(40)])
    store.upload(tmp_path / "shards", "shards")
    listed = read_manifest(f"s3://{BUCKET}/shards").table
    listing = len(proxy.heads)
    assert not failures(Decode([SMALL], "center_crop", None)(listed))
    assert listing <= 5
    assert proxy.requests()[listing:] == [f"GET /{BUCKET}/shards/a.tar"]
    proxy.stop()


@pytest.fixture
def moody(store, monkeypatch):
    """Stands before the store, and has no time for objects that are called `busy`."""

    class Moody(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith("/busy.jpg"):
                return self.send_error(503)
            behind = HTTPConnection("127.0.0.1", store.ports[0])
            behind.request(self.command, self.path, headers=dict(self.headers))
            answer = behind.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.read())

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    open_bucket.cache_clear()
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.long
@pytest.mark.parametrize("where", ["first", "last"])
def test_one_image_that_the_store_never_gives_is_a_row(
    store, moody, photo_folder, monkeypatch, where
):
    monkeypatch.setattr(decode, "PATIENCE_S", 2.0)
    folder = photo_folder(40)  # more than are read at once
    (folder / "busy.jpg").write_bytes(b"")
    store.upload(folder, "photos")
    names = [path.name for path in sorted(folder.glob("photo*"))]
    names.insert(0 if where == "first" else len(names), "busy.jpg")
    uris = [f"s3://{BUCKET}/photos/{name}" for name in names]
    block = Decode([SMALL], "center_crop", None)(manifest(uris))
    assert failures(block) == {names.index("busy.jpg"): ("read", "unreadable")}


@pytest.mark.long
@pytest.mark.parametrize(("given", "how"), [(0, "stop"), (20, "stop"), (20, "freeze")])
def test_a_store_that_is_out_stops_the_job(store, photo_folder, monkeypatch, given, how):
    """From the first image of a block on, or in the midst of it; or it is silent."""
    monkeypatch.setattr(decode, "PATIENCE_S", 2.0)
    monkeypatch.setattr(s3, "_READ_WITHIN", timedelta(seconds=0.3))
    monkeypatch.setattr(s3, "_ANSWERED_S", 0.3)
    folder = photo_folder(80)
    store.upload(folder, "photos")
    uris = [f"s3://{BUCKET}/photos/{path.name}" for path in sorted(folder.iterdir())]
    seen = []

    def stopping(*arguments):
        if len(seen) == given:
            getattr(store, how)()
        seen.append(1)
        return see(*arguments)

    monkeypatch.setattr(decode, "see", stopping)
    if not given:
        store.stop()
    with pytest.raises(RunError, match="out of reach for 2 s"):
        Decode([SMALL], "center_crop", None)(manifest(uris))
    assert len(seen) < len(uris)


class Web:
    """A web server for a folder."""

    def __init__(self, folder: Path) -> None:
        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web(photo_folder, monkeypatch):
    monkeypatch.setattr(decode, "PATIENCE_S", 4.0)
    monkeypatch.setattr(decode, "_given", {})
    found = Web(photo_folder(40))
    yield found
    found.stop()


DEAD = ["http://127.0.0.1:9/a.jpg", "http://localhost:9/a.jpg"]


@pytest.mark.parametrize("good", [0, 5, 40])
def test_hosts_that_are_gone_are_rows(web, photo_folder, good):
    """Also where a block has nothing else, and then before and after others."""
    uris = [f"{web.url}/{path.name}" for path in sorted(photo_folder(good).glob("photo*"))[:good]]
    listed = [*DEAD * 20, *uris, *DEAD]
    dead = [row for row, uri in enumerate(listed) if uri in DEAD]
    block = Decode([SMALL], "center_crop", None)(manifest(listed))
    assert failures(block) == dict.fromkeys(dead, ("read", "unreadable"))


def test_a_web_that_is_gone_stops_the_job(web, photo_folder):
    uris = [f"{web.url}/{path.name}" for path in sorted(photo_folder(40).glob("photo*"))]
    stage = Decode([SMALL], "center_crop", None)
    assert not failures(stage(manifest(uris[:20])))
    web.stop()
    with pytest.raises(RunError, match="out of reach for 4 s"):
        stage(manifest([*DEAD, *uris[20:]]))
