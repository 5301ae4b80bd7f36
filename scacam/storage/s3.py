"""S3: listing and writing by s3fs, reading by obstore, which takes a fraction of the CPU."""

import asyncio
import io
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import botocore.session
import fsspec.asyn
import obstore
import pyarrow as pa
import s3fs
from botocore.configprovider import ConfiguredEndpointProvider
from obstore.exceptions import BaseError
from obstore.store import S3Store
from pyarrow import fs

from scacam.storage.files import OUT_OF_REACH, locate
from scacam.storage.stores import Store, errors_of_the_store, http_status

__all__ = ["Bucket", "open_bucket"]

_CREDENTIALS_LIVE = timedelta(minutes=5)
_FEW_RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_READ_WITHIN = timedelta(seconds=30)
_ANSWERED_S = 45.0
_SLOWEST = 1e6
_STREAM_BUFFER = 1 << 20
_PLAIN = re.compile(r"(?!\.{0,2}(/|$))[^\x00-\x1f\x7f/]+(/(?!\.{0,2}(/|$))[^\x00-\x1f\x7f/]+)*")
_TAKEN = (404, 409, 412)
_NO_CONDITIONS = (400, 501)


@lru_cache(maxsize=32)
def open_bucket(bucket: str) -> fs.FileSystem:
    """The filesystem of a bucket.

    Raises:
        OSError: where the bucket lies cannot be found out.
    """
    return fs.PyFileSystem(Bucket(bucket))


class _S3(s3fs.S3FileSystem):
    """s3fs with keys as they are, `?versionId=` and all, and errors as OSErrors."""

    retries = 1  # botocore has its own, and two loops would multiply

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    async def _call_s3(self, method: str, *arguments: Any, **more: Any) -> Any:
        body = more.get("Body")
        allowed = _ANSWERED_S + (len(body) / _SLOWEST if isinstance(body, bytes) else 0.0)
        with errors_of_the_store():  # aiohttp has no bound for sending, nor for the leave to send
            return await asyncio.wait_for(super()._call_s3(method, *arguments, **more), allowed)

    call_s3 = fsspec.asyn.sync_wrapper(_call_s3)

    async def _get_object(self, **request: Any) -> tuple[bytes, str]:
        answer = await self._call_s3("get_object", **request)
        with errors_of_the_store():
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

    get_object = fsspec.asyn.sync_wrapper(_get_object)


class Bucket(Store):
    """A bucket of S3, or of a store that speaks its protocol, in as few requests as can be.

    Credentials, region and endpoint are what botocore finds; without credentials it is read as
    anybody may read it. A copy in another process opens it anew, with what is found there.
    """

    def __init__(self, bucket: str) -> None:
        with errors_of_the_store():
            session = botocore.session.get_session()
            endpoint = ConfiguredEndpointProvider(
                session.full_config, session.get_scoped_config(), client_name="s3"
            ).provide()
            if endpoint:
                region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
            else:
                region = _region(bucket)
            credentials = session.get_credentials()
        region = region or "us-east-1"
        super().__init__(
            _S3(
                anon=credentials is None,
                endpoint_url=endpoint,
                client_kwargs={"region_name": region},
                config_kwargs={"retries": {"mode": "standard", "total_max_attempts": 2}},
                use_listings_cache=False,
                skip_instance_cache=True,
            )
        )
        self.bucket = bucket
        self.reader = S3Store(
            bucket,
            region=region,
            endpoint=endpoint,
            client_options={"allow_http": True, "timeout": _READ_WITHIN},
            retry_config=_FEW_RETRIES,
            credential_provider=_renewed(credentials) if credentials else None,
            skip_signature=credentials is None,
        )
        self.heeds_conditions: bool | None = None

    def __reduce__(self) -> tuple[Callable[[str], "Bucket"], tuple[str]]:
        return _handler, (self.bucket,)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """What is there: an object, or a folder if there are objects below it."""
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> fs.FileInfo:
        key = _key(path).rstrip("/")
        size, refusal = None, None
        try:
            size = self._size(key) if key else None
        except PermissionError as error:  # a role for what is below it may not ask for its name
            refusal = error
        if not size:
            try:
                below = self._first(f"{key}/" if key else "")
            except FileNotFoundError:  # there is no such bucket
                return fs.FileInfo(path, fs.FileType.NotFound)
            if below or not key:  # beside an empty object of its name, which marks it
                return fs.FileInfo(path, fs.FileType.Directory)
        if refusal:
            raise refusal
        kind = fs.FileType.NotFound if size is None else fs.FileType.File
        return fs.FileInfo(path, kind, size=size)

    def _size(self, key: str) -> int | None:
        """How many bytes an object has, None if it is not there."""
        if _PLAIN.fullmatch(key):
            try:
                return obstore.head(self.reader, key)["size"]
            except FileNotFoundError:
                return None
            except BaseError:
                pass  # as in `read`
        try:
            return self.fs.call_s3("head_object", Bucket=self.bucket, Key=key)["ContentLength"]
        except FileNotFoundError:
            return None
        except PermissionError:
            if self._first(key) == key:
                raise
            return None  # who may list some prefix alone is told so of all that is not there

    def _first(self, prefix: str) -> str | None:
        """The first key that begins so."""
        page = self.fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=prefix, MaxKeys=1)
        return next((entry["Key"] for entry in page.get("Contents", [])), None)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """What is in a folder, the folders after the files."""
        base = selector.base_dir.rstrip("/")
        files: list[fs.FileInfo] = []
        folders: set[str] = set()
        exists = base == self.bucket or selector.allow_not_found
        for page in self._pages(base, "" if selector.recursive else "/"):
            for entry in page.get("Contents", []):
                exists = True
                path = f"{self.bucket}/{entry['Key']}"
                folder = path.rpartition("/")[0]
                if not path.endswith("/"):  # else it marks a folder
                    files.append(fs.FileInfo(path, fs.FileType.File, size=entry["Size"]))
                while len(folder) > len(base) and folder not in folders:
                    folders.add(folder)
                    folder = folder.rpartition("/")[0]
            for entry in page.get("CommonPrefixes", []):
                exists = True
                folders.add(f"{self.bucket}/{entry['Prefix'][:-1]}")
        if not exists:
            raise FileNotFoundError(f"there is nothing below s3://{base}/")
        return files + [fs.FileInfo(folder, fs.FileType.Directory) for folder in sorted(folders)]

    def _pages(self, folder: str, delimiter: str) -> Iterator[dict[str, Any]]:
        key = _key(folder)
        request = {"Prefix": f"{key}/" if key else "", "Delimiter": delimiter}
        while True:
            page = self.fs.call_s3("list_objects_v2", Bucket=self.bucket, **request)
            yield page
            if not page["IsTruncated"]:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete_file(self, path: str) -> None:
        """Delete an object if it is there."""
        self.fs.call_s3("delete_object", Bucket=self.bucket, Key=_key(path))

    def delete_dir(self, path: str) -> None:
        """Delete all objects of a folder."""
        for page in self._pages(path.rstrip("/"), ""):
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
            wanted = {"Objects": keys, "Quiet": True}
            answer = (
                self.fs.call_s3("delete_objects", Bucket=self.bucket, Delete=wanted) if keys else {}
            )
            for failure in answer.get("Errors", []):
                raise OSError(f"cannot delete {failure['Key']}: {failure['Message']}")

    def copy_file(self, src: str, dest: str) -> None:
        """Copy an object of at most 5 GB."""
        source = {"Bucket": self.bucket, "Key": _key(src)}
        self.fs.call_s3("copy_object", Bucket=self.bucket, Key=_key(dest), CopySource=source)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """An object to read from its beginning to its end."""
        return pa.PythonFile(io.BufferedReader(self._open(path), _STREAM_BUFFER), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        """An object to read here and there, each read one request."""
        return pa.PythonFile(self._open(path), mode="r")

    def _open(self, path: str) -> "_Object":
        size = self._size(_key(path))
        if size is None:
            raise FileNotFoundError(f"there is no s3://{path}")
        return _Object(self, path, size)

    def read(self, path: str, offset: int | None = None, size: int | None = None) -> bytes:
        """An object, or `size` bytes of it from an offset, in one request."""
        key = _key(path)
        if _PLAIN.fullmatch(key):  # obstore refuses other keys, or takes them for another's
            try:
                if offset is None or size is None:
                    return bytes(obstore.get(self.reader, key).bytes())
                return bytes(obstore.get_range(self.reader, key, start=offset, length=size))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"there is no s3://{path}") from error
            except BaseError:
                pass  # said in words alone; botocore's errors have codes, and it may succeed
        if offset is None or size is None:
            return self._get(key)[0]
        return self._get(key, Range=f"bytes={offset}-{offset + size - 1}")[0]

    def fetch(self, path: str) -> tuple[bytes, str | None]:
        """A small object and its ETag; nothing and None if it is not there."""
        try:
            return self._get(_key(path))
        except FileNotFoundError:
            return b"", None

    def _get(self, key: str, **part: str) -> tuple[bytes, str]:
        try:
            return self.fs.get_object(Bucket=self.bucket, Key=key, **part)
        except PermissionError as error:
            if self._first(key) == key:
                raise
            raise FileNotFoundError(f"there is no s3://{self.bucket}/{key}") from error

    def swap(self, path: str, content: bytes, tag: str | None) -> str | None:
        """Write a small object if its version is still that of an ETag (None: not there).

        The store itself compares and swaps. One that does not heed conditions, which is tried out
        first, or refuses them, is handled like any other store.
        """
        if self.heeds_conditions is False:
            return super().swap(path, content, tag)
        try:
            new = self._put(path, content, {"IfMatch": tag} if tag else {"IfNoneMatch": "*"})
        except OSError as error:
            if http_status(error.__cause__) not in _NO_CONDITIONS:
                raise
            self.heeds_conditions = False
            return super().swap(path, content, tag)
        if new and self.heeds_conditions is None:
            self.heeds_conditions = self._put(path, content, {"IfNoneMatch": "*"}) is None
            if not self.heeds_conditions:
                return self.settled(path, content)
        return new

    def _put(self, path: str, content: bytes, condition: dict[str, str]) -> str | None:
        """The ETag of what was written, None if the condition does not hold."""
        try:
            return self.fs.call_s3(
                "put_object", Bucket=self.bucket, Key=_key(path), Body=content, **condition
            )["ETag"]
        except OSError as error:
            if http_status(error.__cause__) in _TAKEN:
                return None
            raise


class _Object(io.RawIOBase):
    """An object to read, each read one request."""

    def __init__(self, bucket: Bucket, path: str, size: int) -> None:
        self._bucket, self._path, self._size, self._place = bucket, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place}.get(whence, self._size)
        return self._place

    def tell(self) -> int:
        return self._place

    def size(self) -> int:
        return self._size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._place)
        size = left if size is None or size < 0 else min(size, left)
        content = self._bucket.read(self._path, self._place, size) if size else b""
        self._place += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _region(bucket: str) -> str:
    """Where Amazon keeps a bucket; anybody may ask."""
    try:
        return fs.resolve_s3_region(bucket)
    except OSError as error:
        if "not found" in str(error):  # pyarrow has but one class for all that may be wrong
            raise FileNotFoundError(str(error)) from error
        raise ConnectionError(f"{OUT_OF_REACH}: {error}") from error


def _handler(bucket: str) -> Bucket:
    return locate(f"s3://{bucket}")[0].handler


def _key(path: str) -> str:
    return path.partition("/")[2]


def _renewed(credentials: Any) -> Callable[[], Any]:
    """botocore's credentials as obstore takes them, renewed in time."""

    def renewed() -> dict[str, object]:
        now = credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LIVE,
        }

    return renewed
