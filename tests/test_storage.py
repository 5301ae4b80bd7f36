"""Reading from object storage, on a real S3 server."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import BUCKET, ObjectStore

from scacam.storage import is_transient, locate, read_ahead, read_bytes
from scacam.storage.s3 import open_bucket

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
