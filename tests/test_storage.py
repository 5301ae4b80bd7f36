"""Files on local disk and on stores, on real servers."""

import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import SSLCertVerificationError
from types import SimpleNamespace
from typing import ClassVar

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import ClientConnectorCertificateError, ClientConnectorDNSError
from moto.server import ThreadedMotoServer
from pyarrow import fs
from servers import BUCKET, LIMITED_KEY, ObjectStore, Proxy

from scacam.errors import RunError
from scacam.inputs.manifest import read_manifest
from scacam.runs.lifecycle import begin
from scacam.runs.lock import locked
from scacam.runs.record import write_record
from scacam.storage import (
    OUT_OF_REACH,
    PATIENCE_S,
    is_transient,
    locate,
    read_ahead,
    read_bytes,
    write_bytes,
    writing,
)
from scacam.storage.parquet import read_columns, write_table
from scacam.storage.s3 import open_bucket
from scacam.storage.stores import errors_of_the_store

ODD = [
    "a b.jpg", "a#b.jpg", "a%20b.jpg", "100%.jpg", "ü你.jpg", "q\"uo'te.jpg", "new\nline.jpg",
    "tab\t.jpg", "a+b&c=d?e.jpg", "[a]{b}|^~`<>*.jpg", "back\\slash.jpg", "trailing ",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    found = ObjectStore(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        open_bucket.cache_clear()  # other tests' stores had the same name
        yield found
    open_bucket.cache_clear()
    found.stop()


def put(store: ObjectStore, key: str, content: bytes) -> str:
    with store.filesystem().open_output_stream(f"{BUCKET}/{key}") as file:
        file.write(content)
    return f"s3://{BUCKET}/{key}"


@pytest.mark.parametrize("name", ODD)
def test_whatever_the_key(store, name):
    assert read_bytes(put(store, f"odd/{name}", name.encode())) == name.encode()


def test_a_part_of_an_object(store):
    path = put(store, "alphabet", b"abcdefgh")
    assert read_bytes(path, 2, 3) == b"cde"
    assert read_bytes(path, 0, 0) == b""


def test_an_empty_object(store):
    assert read_bytes(put(store, "empty", b"")) == b""


def test_what_is_not_there(store):
    with pytest.raises(FileNotFoundError):
        read_bytes(f"s3://{BUCKET}/no/such.jpg")


READ = """
import sys
from scacam.storage import is_transient, read_bytes
try:
    read_bytes(sys.argv[1])
except OSError as error:
    print(type(error).__name__, is_transient(error), error)
"""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "PermissionError False"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "ConnectionError True"),
    ],
)
def test_what_cannot_be_had(store, changed, expected):
    """In a process of its own, since credentials and regions are looked up once per process."""
    path = put(store, "here.jpg", b"here")
    environment = store.environment | changed
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", READ, path]
    said = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith(expected), said
    assert said.count("\n") == 1


def test_the_profile_of_the_user(store, tmp_path):
    path = put(store, "here.jpg", b"here")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    lines = [f"{key.lower()} = {store.environment[key]}" for key in keys]
    (tmp_path / "credentials").write_text("\n".join(["[audits]", *lines]))
    environment = {name: value for name, value in store.environment.items() if name not in keys}
    environment |= {
        "AWS_PROFILE": "audits",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }
    code = "import sys; from scacam.storage import read_bytes; print(read_bytes(sys.argv[1]))"
    said = subprocess.run(
        [sys.executable, "-c", code, path],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "b'here'\n"


def test_reading_ahead_keeps_the_order_and_is_never_far_ahead():
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return -item

    for count, content in enumerate(read_ahead(read, iter(range(500)))):
        assert content == -count
        assert len(begun) <= count + 40
    assert len(begun) == 500


def test_an_exception_while_reading_ahead_arrives_in_its_place():
    contents = read_ahead(lambda item: 1 // item, [2, 1, 0, 1])
    assert [next(contents), next(contents)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(contents)


def test_a_local_missing_file_is_not_transient(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_bytes(str(tmp_path / "nothing"))
    assert not is_transient(caught.value)
    assert locate(str(tmp_path))[1] == str(tmp_path)


def test_a_role_for_some_prefix_reads_lists_and_writes_there(store, monkeypatch):
    photo = put(store, "limited/photos/a.jpg", b"a photo")
    secret = put(store, "elsewhere/a.jpg", b"not for all")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", LIMITED_KEY)
    open_bucket.cache_clear()
    try:
        assert read_bytes(photo) == b"a photo"
        out = f"s3://{BUCKET}/limited/out"
        filesystem, path = locate(out)
        filesystem.create_dir(path, recursive=True)
        assert filesystem.get_file_info(f"{path}/run.json").type == fs.FileType.NotFound
        write_bytes(f"{out}/run.json", b"{}")
        assert filesystem.get_file_info(path).type == fs.FileType.Directory
        filesystem.move(f"{path}/run.json", f"{path}/moved.json")
        assert names(out) == ["moved.json"]
        filesystem.delete_dir(path)
        assert names(out) == []
        with pytest.raises(PermissionError):
            read_bytes(secret)
        with pytest.raises(PermissionError):
            write_bytes(f"s3://{BUCKET}/limited/out.json", b"{}")
    finally:
        open_bucket.cache_clear()


def names(folder: str) -> list[str]:
    """The files below a folder, as it calls them."""
    filesystem, path = locate(folder)
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    found = filesystem.get_file_info(selector)
    return [info.path.removeprefix(f"{path}/") for info in found if info.is_file]


def test_listing_finds_what_boto3_finds(store):
    keys = [
        f"tree/{name}"
        for name in ("a.jpg", "b/c/d.jpg", "b/e.jpg", *ODD)
        if "\\" not in name  # SeaweedFS lists it as a slash
    ]
    for key in keys:
        put(store, key, b"x")
    paginator = client(store).get_paginator("list_objects_v2")
    pages = paginator.paginate(Bucket=BUCKET, Prefix="tree/", PaginationConfig={"PageSize": 3})
    expected = [entry["Key"].removeprefix("tree/") for page in pages for entry in page["Contents"]]
    assert names(f"s3://{BUCKET}/tree") == expected == sorted(key[5:] for key in keys)
    filesystem = locate(f"s3://{BUCKET}")[0]
    infos = filesystem.get_file_info(fs.FileSelector(f"{BUCKET}/tree"))
    folders = [info.path for info in infos if info.type == fs.FileType.Directory]
    assert folders == [f"{BUCKET}/tree/b"]
    infos = filesystem.get_file_info(fs.FileSelector(f"{BUCKET}/tree/", recursive=True))
    folders = [info.path for info in infos if info.type == fs.FileType.Directory]
    assert folders == [f"{BUCKET}/tree/b", f"{BUCKET}/tree/b/c"]
    with pytest.raises(FileNotFoundError):
        filesystem.get_file_info(fs.FileSelector(f"{BUCKET}/no"))


def client(store: ObjectStore):
    return boto3.client(
        "s3",
        endpoint_url=store.environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )


def test_more_objects_than_a_page_holds(store):
    client_of_store = client(store)
    for index in range(1005):
        client_of_store.put_object(Bucket=BUCKET, Key=f"pages/{index:04d}", Body=b"")
    assert len(names(f"s3://{BUCKET}/pages")) == 1005
    locate(f"s3://{BUCKET}")[0].delete_dir(f"{BUCKET}/pages")
    assert names(f"s3://{BUCKET}/pages") == []


def test_brackets_and_stars_are_no_patterns(store):
    for name in ("a[1]/x", "a1/x", "b*/x", "bb/x"):
        put(store, f"globs/{name}", b"")
    filesystem = locate(f"s3://{BUCKET}")[0]
    filesystem.delete_dir(f"{BUCKET}/globs/a[1]")
    filesystem.delete_file(f"{BUCKET}/globs/b*/x")
    assert names(f"s3://{BUCKET}/globs") == ["a1/x", "bb/x"]


def test_a_table_is_written_by_one_request_and_read_back(store, proxy):
    path = f"s3://{BUCKET}/tables/deep/down/a.parquet"
    table = pa.table({"image_id": range(1000), "heatmap": [bytes(98)] * 1000})
    write_table(path, table, plain=["heatmap"])
    assert proxy.requests() == [f"PUT /{BUCKET}/tables/deep/down/a.parquet"]
    filesystem, inner_path = locate(path)
    assert read_columns(filesystem, inner_path, table.column_names) == table
    with filesystem.open_input_stream(inner_path) as stream, pa.BufferReader(stream.read()) as file:
        assert pq.read_table(file) == table
    with pytest.raises(ZeroDivisionError), writing(path + ".2") as file:
        file.write(bytes(1 // 0))
    assert names(f"s3://{BUCKET}/tables") == ["deep/down/a.parquet"]


@pytest.fixture
def proxy(store, monkeypatch):
    """Keeps the requests of a test."""
    found = Proxy(store.ports[0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
    open_bucket.cache_clear()
    yield found
    open_bucket.cache_clear()
    found.stop()


def test_reading_an_image_is_one_request(store, proxy):
    path = put(store, "one/a.jpg", b"abcdef")
    assert (read_bytes(path), read_bytes(path, 1, 2)) == (b"abcdef", b"bc")
    assert proxy.requests() == [f"GET /{BUCKET}/one/a.jpg"] * 2


def test_many_threads_build_one_store_and_it_travels(store):
    path = put(store, "threads", b"x")
    open_bucket.cache_clear()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: locate(path)[0], range(16)))
    assert len({id(filesystem) for filesystem in found}) == 1
    copy = pickle.loads(pickle.dumps(found[0]))
    assert copy.handler is found[0].handler
    assert b"secret" not in pickle.dumps(found[0])


def test_swapping(store):
    handler = locate(f"s3://{BUCKET}")[0].handler
    path = f"{BUCKET}/swap"
    first = handler.swap(path, b"1", None)
    assert handler.heeds_conditions
    assert handler.fetch(path) == (b"1", first)
    assert handler.swap(path, b"2", None) is None
    second = handler.swap(path, b"2", first)
    assert handler.swap(path, b"3", first) is None
    assert handler.fetch(path) == (b"2", second)
    handler.delete_file(path)
    assert handler.swap(path, b"3", second) is None


def test_of_two_that_want_a_lease_one_gets_it_at_once(store, monkeypatch):
    monkeypatch.setattr("scacam.runs.lock._RENEWAL_S", 0.5)
    output = f"s3://{BUCKET}/contended"
    together = threading.Barrier(2)

    def contend(_: int) -> bool:
        together.wait()
        try:
            with locked(output):
                together.wait()
            return True
        except RunError:
            together.wait()
            return False

    began = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(contend, range(2))) == [False, True]
    assert time.monotonic() - began < 10  # the loser may look whether the winner lives
    with locked(output):
        pass


def test_a_lease_that_is_lost_is_left_to_its_new_owner(store, monkeypatch):
    monkeypatch.setattr("scacam.runs.lock._RENEWAL_S", 0.1)
    output = f"s3://{BUCKET}/lost"

    @locked(output)
    def job() -> None:
        write_bytes(f"{output}/.lock", b"another job")
        for _ in range(100):
            time.sleep(0.1)

    with pytest.raises(RunError, match="another job has taken over"):
        job()
    assert read_bytes(f"{output}/.lock") == b"another job"


def test_a_lease_that_was_lost_between_renewals_is_seen_at_the_end(store):
    output = f"s3://{BUCKET}/lost-late"
    with pytest.raises(RunError, match="another job has taken over"), locked(output):
        write_bytes(f"{output}/.lock", b"another job")
    assert read_bytes(f"{output}/.lock") == b"another job"


def test_a_renewal_that_was_not_answered_is_no_loss(store, monkeypatch):
    monkeypatch.setattr("scacam.runs.lock._RENEWAL_S", 0.1)
    output = f"s3://{BUCKET}/unanswered"
    with locked(output):
        for _ in range(3):
            write_bytes(f"{output}/.lock", read_bytes(f"{output}/.lock") + b"again")
            time.sleep(1)
    assert read_bytes(f"{output}/.lock") == b""


def test_a_run_with_its_checkpoint_beside_the_output_is_not_continued(tmp_path):
    record = {"schema_version": 1, "images": 1, "networks": [], "versions": {"scacam": "0"}}
    running = begin(str(tmp_path), record, pa.table({"uri": ["a"]}))
    assert begin(str(tmp_path), record, pa.table({"uri": ["a"]})) == running
    del running["checkpoint"]
    write_record(str(tmp_path), running)
    with pytest.raises(RunError, match="kept its checkpoint beside"):
        begin(str(tmp_path), record, pa.table({"uri": ["a"]}))
    write_record(str(tmp_path), running | {"status": "complete"})
    assert begin(str(tmp_path), record, pa.table({"uri": ["a"]}))["status"] == "complete"


class Heedless(Proxy):
    """Before a store that has never heard of conditions."""

    def altered(self, head: bytes) -> bytes:
        return re.sub(rb"(?i)\r\nif-(none-)?match: [^\r]*", b"", head)


@pytest.fixture(scope="module")
def moto():
    """A server that keeps keys as they are, where SeaweedFS makes paths of them."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    url = f"http://127.0.0.1:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    found = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
    found.create_bucket(Bucket=BUCKET)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        open_bucket.cache_clear()
        yield found
    open_bucket.cache_clear()
    server.stop()


LITERAL = [
    "photos//a.png", "photos/a.png", "/lead.png", "lead.png", "//lead.png", "x/./b.png", "x/b.png",
    "x/../c.png", "c.png", "../up", "d/", "d", "d//", ".", "..", "e?versionId=5", "e", "f/.",
]  # fmt: skip


def test_keys_are_read_as_they_are(moto):
    for key in LITERAL:
        moto.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    for key in LITERAL:
        assert read_bytes(f"s3://{BUCKET}/{key}") == key.encode()
        assert read_bytes(f"s3a://{BUCKET}/{key}", 0, 1) == key[:1].encode()
    for key in LITERAL:
        moto.delete_object(Bucket=BUCKET, Key=key)
        with pytest.raises(FileNotFoundError):
            read_bytes(f"s3://{BUCKET}/{key}")


def test_a_manifest_leads_where_its_relative_uris_lead_on_a_disk(moto):
    moto.put_object(Bucket=BUCKET, Key="lists/m.csv", Body=b"uri\n../a.jpg\n./b//c.jpg\nd//e.jpg\n")
    uris = read_manifest(f"s3://{BUCKET}/lists/m.csv").table["uri"].to_pylist()
    assert uris == [f"s3://{BUCKET}/{key}" for key in ("a.jpg", "lists/b/c.jpg", "lists/d//e.jpg")]


@pytest.mark.parametrize("marker", ["both", "both/"])
def test_an_empty_object_marks_a_folder(moto, marker):
    moto.put_object(Bucket=BUCKET, Key=marker, Body=b"")
    moto.put_object(Bucket=BUCKET, Key="both/a.png", Body=b"x")
    moto.put_object(Bucket=BUCKET, Key="both//b.png", Body=b"x")
    for source in (f"s3://{BUCKET}/both", f"s3a://{BUCKET}/both/"):
        uris = read_manifest(source).table["uri"].to_pylist()
        assert uris == [f"s3://{BUCKET}/both//b.png", f"s3://{BUCKET}/both/a.png"]
    moto.delete_object(Bucket=BUCKET, Key=marker)


def test_without_credentials_a_bucket_is_read_as_anybody_may(moto, monkeypatch):
    moto.put_bucket_acl(Bucket=BUCKET, ACL="public-read")
    moto.put_object(Bucket=BUCKET, Key="public.jpg", Body=b"x", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    watched = Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", watched.endpoint)
    open_bucket.cache_clear()
    assert read_bytes(f"s3://{BUCKET}/public.jpg") == b"x"
    assert "public.jpg" in names(f"s3://{BUCKET}")
    assert len(watched.heads) == 2
    assert not any(b"authorization" in head.lower() for head in watched.heads)
    open_bucket.cache_clear()
    watched.stop()


def test_a_profile_with_a_role_reads_and_writes(moto, monkeypatch, tmp_path):
    url = os.environ["AWS_ENDPOINT_URL"]
    watched = Proxy(int(url.rpartition(":")[2]))
    (tmp_path / "config").write_text(
        f"[profile base]\naws_access_key_id = key\naws_secret_access_key = secret\n"
        f"[profile audits]\nrole_arn = arn:aws:iam::123456789012:role/audits\n"
        f"source_profile = base\nregion = eu-central-1\nendpoint_url = {watched.endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "audits")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
    open_bucket.cache_clear()
    write_bytes(f"s3://{BUCKET}/by/role", b"x")
    assert read_bytes(f"s3://{BUCKET}/by/role") == b"x"
    assert len(watched.heads) == 2
    signed = [re.search(rb"Credential=(\w+)/\d+/([\w-]+)/s3/", head) for head in watched.heads]
    assert all(found and found[1] != b"key" and found[2] == b"eu-central-1" for found in signed)
    open_bucket.cache_clear()
    watched.stop()


def test_swapping_where_conditions_are_not_heeded(moto, monkeypatch):
    heedless = Heedless(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", heedless.endpoint)
    monkeypatch.setattr("scacam.storage.stores._SETTLING_S", 1.0)
    open_bucket.cache_clear()
    handler = locate(f"s3://{BUCKET}")[0].handler
    path = f"{BUCKET}/heedless"
    first = handler.swap(path, b"1", None)
    assert handler.heeds_conditions is False
    assert handler.fetch(path) == (b"1", first)
    assert handler.swap(path, b"2", None) is None
    with ThreadPoolExecutor(2) as threads:
        new = list(threads.map(lambda content: handler.swap(path, content, first), (b"a", b"b")))
    kept, tag = handler.fetch(path)
    assert new == [tag if content == kept else None for content in (b"a", b"b")]
    open_bucket.cache_clear()
    heedless.stop()


def test_files_by_their_uri(tmp_path):
    path = tmp_path / "a b%20.jpg"
    path.write_bytes(b"x")
    uri = path.as_uri()
    assert read_bytes(uri) == read_bytes(uri.replace("file://", "file://localhost")) == b"x"
    assert read_manifest(tmp_path.as_uri()).table["uri"].to_pylist() == [str(path)]
    with pytest.raises(ValueError, match="another host"):
        locate("file://elsewhere/a.jpg")
    odd = tmp_path / "x:" / "y.jpg"
    odd.parent.mkdir()
    odd.write_bytes(b"y")
    assert read_bytes(f"{tmp_path}/x://y.jpg") == b"y"


def test_other_stores(monkeypatch):
    monkeypatch.setattr("scacam.storage.stores._SETTLING_S", 0.1)
    write_bytes("memory://out/a b.json", b"abc")
    assert read_bytes("memory://out/a b.json", 1, 1) == b"b"
    assert names("memory://out") == ["a b.json"]
    write_table("memory://out/[1]/t.parquet", pa.table({"a": [1]}))
    filesystem, path = locate("memory://out/[1]/t.parquet")
    assert read_columns(filesystem, path, ["a"]).to_pylist() == [{"a": 1}]
    handler = filesystem.handler
    tag = handler.swap("/out/.lock", b"1", None)
    assert handler.swap("/out/.lock", b"2", None) is None
    assert handler.swap("/out/.lock", b"2", tag)
    filesystem.delete_dir("/out")
    with pytest.raises(FileNotFoundError):
        read_bytes("memory://out/a b.json")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/a.jpg", "pip install gcsfs"),
        ("az://container/a.jpg", "pip install adlfs"),
        ("ftp://host/a.jpg", "scheme ftp:// is unknown"),
        ("s3:///a.jpg", "names no bucket"),
    ],
)
def test_what_cannot_be_located(uri, said):
    with pytest.raises(ValueError, match=said):
        locate(uri)


class Answers(BaseHTTPRequestHandler):
    """Answers /404 with 404, and all else with what it asks for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        status = re.search(r"/(\d{3})", self.path)
        self.send_response(int(status[1]) if status else 200)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.path.encode())

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answers():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Answers.asked.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_by_http_is_one_request(answers):
    assert read_bytes(f"{answers}/a.jpg?size=1%20") == b"/a.jpg?size=1%20"
    assert Answers.asked == ["GET /a.jpg?size=1%20"]


KINDS = [(404, FileNotFoundError), (403, PermissionError), (400, OSError), (503, ConnectionError)]


@pytest.mark.parametrize(("status", "kind"), KINDS)
def test_errors_by_http(answers, status, kind):
    with pytest.raises(kind) as caught:
        read_bytes(f"{answers}/{status}.jpg")
    assert type(caught.value) is kind
    assert is_transient(caught.value) is (kind is ConnectionError)


@pytest.mark.parametrize(("status", "kind"), KINDS)
def test_errors_of_s3(answers, monkeypatch, status, kind):
    monkeypatch.setenv("AWS_ENDPOINT_URL", answers)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    open_bucket.cache_clear()
    path = f"s3://{BUCKET}/{status}"
    filesystem, inner_path = locate(path)
    attempts = [lambda: write_bytes(path, b"x")]
    if status != 403:  # then the list is asked whether the object is there
        attempts += [lambda: read_bytes(path), lambda: filesystem.open_input_file(inner_path)]
    for attempt in attempts:
        with pytest.raises(kind) as caught:
            attempt()
        assert type(caught.value) is kind
        assert is_transient(caught.value) is (kind is ConnectionError)
    open_bucket.cache_clear()


def test_a_store_that_is_out_of_reach(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    open_bucket.cache_clear()
    path = f"s3://{BUCKET}/a.parquet"
    filesystem, inner_path = locate(path)
    for attempt in (
        lambda: write_bytes(path, b"x"),
        lambda: names(f"s3://{BUCKET}/a"),
        lambda: pq.write_table(pa.table({"a": [1]}), inner_path, filesystem=filesystem),
        lambda: read_bytes("http://127.0.0.1:9/a.jpg"),
    ):
        with pytest.raises(ConnectionError, match=OUT_OF_REACH) as caught:
            attempt()
        assert is_transient(caught.value)
    open_bucket.cache_clear()


@pytest.mark.parametrize(
    ("number", "waits"), [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)]
)
def test_a_host_that_does_not_exist_is_not_waited_for(number, waits):
    """But one whose name server does not answer is. The error is aiohttp's, made by hand."""
    host = SimpleNamespace(host="nowhere.example", port=80, ssl=True)
    with pytest.raises(OSError, match="nowhere") as caught, errors_of_the_store():
        raise ClientConnectorDNSError(host, socket.gaierror(number, "no answer"))
    assert is_transient(caught.value) is waits


def test_what_no_patience_mends_is_not_waited_for():
    """An address that is none, and a certificate that is not to be trusted, as aiohttp says it."""
    with pytest.raises(OSError, match="http:///a") as caught:
        read_bytes("http:///a.jpg")
    assert not is_transient(caught.value)
    host = SimpleNamespace(host="old.example", port=443, is_ssl=True)
    with pytest.raises(OSError, match="expired") as caught, errors_of_the_store():
        raise ClientConnectorCertificateError(host, SSLCertVerificationError("expired"))
    assert not is_transient(caught.value)


@pytest.mark.long
def test_a_store_that_does_not_answer(tmp_path, monkeypatch):
    frozen = ObjectStore(tmp_path)
    for name, value in frozen.environment.items():
        monkeypatch.setenv(name, value)
    open_bucket.cache_clear()
    path = f"s3://{BUCKET}/a"
    write_bytes(path, b"x")
    frozen.freeze()
    try:
        for attempt in (lambda: write_bytes(path, b"y"), lambda: names(f"s3://{BUCKET}")):
            began = time.monotonic()
            with pytest.raises(ConnectionError, match=OUT_OF_REACH):
                attempt()
            assert time.monotonic() - began < PATIENCE_S / 2
    finally:
        frozen.thaw()
    write_bytes(path, b"z")
    assert read_bytes(path) == b"z"
    open_bucket.cache_clear()
    frozen.stop()
