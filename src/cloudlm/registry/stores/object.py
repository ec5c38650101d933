"""A store in a bucket: S3, Google Cloud Storage, Azure Blob, Alibaba OSS, or a WebDAV server.

Credentials and options come from the environment under the names of each cloud's own tools
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``,
``AZURE_STORAGE_ACCOUNT_NAME``, ``ALIBABA_CLOUD_ACCESS_KEY_ID``, ``OSS_ENDPOINT``, …).

``put_if_absent`` is a conditional put. Whether the server honours one is tried out once per
process; where it does not, writers claim the key first (``_put_by_claim``): safe among writers of
cloudlm as long as listings are up to date and a claim is not older than ``CLAIM_AGE_S``, which is
weaker than a conditional put. Incomplete multipart uploads of a killed writer are invisible; a
lifecycle rule of the bucket removes them.

Must not know what the objects mean, and must not show credentials in an error.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import ObjectStore as Bucket
from obstore.store import from_url

from cloudlm.core.errors import (
    BadSetting,
    CloudlmError,
    NotFound,
    NotSupported,
    StorageFailed,
    Unavailable,
)
from cloudlm.registry.stores.base import BytesMoved
from cloudlm.registry.stores.failures import storage_failure
from cloudlm.registry.stores.keys import check_key, check_prefix, is_key

CLAIM_AGE_S = 60.0
_CLAIMS = ".claims"
_PART_BYTES = 8 << 20
_MAX_PARTS = 9_000  # S3 allows 10,000
_READ_AHEAD_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
_REQUEST_TIMEOUT_S = 300  # one part or range
_WHOLE_OBJECT_TIMEOUT_S = 24 * 3600  # a web server sends a model in one answer
_CLAIM_ATTEMPTS = 40


class ObjectStore:
    """Objects below the prefix of one bucket.

    ``options`` override what the environment says (names as in obstore, such as ``endpoint``).
    ``conditional_put`` False skips the try-out and claims keys. Raises BadSetting for an address
    or an option that does not fit.
    """

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, str] | None = None,
        conditional_put: bool | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._bucket = _open_bucket(self.url, dict(options or {}))
        self._conditional_put = conditional_put

    def get(self, key: str) -> bytes:
        check_key(key)
        with self._translated("read", key):
            return bytes(obstore.get(self._bucket, key).bytes())

    def open(self, key: str) -> BinaryIO:
        check_key(key)
        if self.url.startswith(("http://", "https://")):  # many web servers know no ranges
            with self._translated("read", key):
                pieces = iter(obstore.get(self._bucket, key).stream(min_chunk_size=_CHUNK_BYTES))
            streamed = _StreamedFile(pieces, self, key)
            return cast(BinaryIO, io.BufferedReader(streamed, _CHUNK_BYTES))
        with self._translated("read", key):
            reader = obstore.open_reader(self._bucket, key, buffer_size=_READ_AHEAD_BYTES)
        return cast(BinaryIO, io.BufferedReader(_RemoteFile(reader, self, key), _READ_AHEAD_BYTES))

    def put(self, key: str, data: bytes) -> None:
        check_key(key)
        with self._translated("write", key):
            obstore.put(self._bucket, key, data, use_multipart=False)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        check_key(key)
        if self._conditional_put is None:
            self._conditional_put = self._honours_conditional_put()
        if not self._conditional_put:
            return self._put_by_claim(key, data)
        return self._create(key, data)

    def put_file(self, key: str, path: Path, progress: BytesMoved | None = None) -> None:
        check_key(key)
        try:
            size = path.stat().st_size
            source = path.open("rb", buffering=0)
        except OSError as error:
            raise storage_failure(error, path, "read") from error
        part_bytes = max(_PART_BYTES, size // _MAX_PARTS + 1)
        with source, self._translated("write", key):
            if size <= part_bytes:
                obstore.put(self._bucket, key, source.read(), use_multipart=False)
                if progress is not None:
                    progress(size)
                return
            pieces = _pieces(source, part_bytes, progress)
            obstore.put(
                self._bucket,
                key,
                pieces,
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=4,
            )

    def list(self, prefix: str) -> Iterator[str]:
        folders, _ = check_prefix(prefix)  # a bucket lists whole folders; the loop narrows
        folder = "/".join(folders)
        found: list[str] = []
        with self._translated("list", prefix):
            for page in obstore.list(self._bucket, prefix=folder or None):
                for entry in page:
                    key = entry["path"]
                    if key.startswith(prefix) and is_key(key):
                        found.append(key)
        return iter(sorted(found))

    def delete(self, key: str) -> None:
        check_key(key)
        try:
            with self._translated("delete", key):
                obstore.delete(self._bucket, key)
        except NotFound:
            return

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def sweep(self) -> int:
        """Remove claims (see ``_put_by_claim``) that outlived their age."""
        removed = 0
        with self._translated("clean", _CLAIMS):
            for page in obstore.list(self._bucket, prefix=_CLAIMS):
                for entry in page:
                    if time.time() - entry["last_modified"].timestamp() > CLAIM_AGE_S:
                        obstore.delete(self._bucket, entry["path"])
                        removed += 1
        return removed

    # -- conditional put, and its substitute

    def _create(self, key: str, data: bytes) -> bool:
        try:
            with self._translated("write", key):
                obstore.put(self._bucket, key, data, mode="create", use_multipart=False)
        except _Exists:
            return False
        return True

    def _honours_conditional_put(self) -> bool:
        """Try it out: some S3 look-alikes refuse the condition, some silently ignore it."""
        key = f"{_CLAIMS}/probe-{secrets.token_hex(8)}"
        with self._translated("write", key):
            obstore.put(self._bucket, key, b"1", use_multipart=False)
            try:
                return not self._create(key, b"2")
            except (NotSupported, Unavailable):
                return False
            finally:
                obstore.delete(self._bucket, key)

    def _put_by_claim(self, key: str, data: bytes) -> bool:
        """Write ``key`` if absent, without the server's help.

        A writer puts a claim, then lists the claims: only one who sees no other claim may look
        for the key and write it; everybody else withdraws and tries again. Of two writers at
        most one can see itself alone, because both put before they list.
        """
        for _ in range(_CLAIM_ATTEMPTS):
            claim = f"{_CLAIMS}/{key}/{secrets.token_hex(8)}"
            with self._translated("write", key):
                obstore.put(self._bucket, claim, b"", use_multipart=False)
                try:
                    if self._is_only_claim(key, claim):
                        if self._exists(key):
                            return False
                        obstore.put(self._bucket, key, data, use_multipart=False)
                        return True
                finally:
                    obstore.delete(self._bucket, claim)
            time.sleep(0.05 + secrets.randbelow(200) / 1000)
        raise Unavailable(f"{self.url}/{key}: other writers keep claiming it; try again later")

    def _is_only_claim(self, key: str, claim: str) -> bool:
        for page in obstore.list(self._bucket, prefix=f"{_CLAIMS}/{key}"):
            for entry in page:
                age_s = time.time() - entry["last_modified"].timestamp()
                if entry["path"] != claim and age_s < CLAIM_AGE_S:
                    return False
        return True

    def _exists(self, key: str) -> bool:
        try:
            obstore.head(self._bucket, key)
        except (FileNotFoundError, NotFoundError):
            return False
        return True

    @contextmanager
    def _translated(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise translate(error, doing, f"{self.url}/{key}") from error


class _Exists(CloudlmError):
    """A conditional put found the key taken."""


class _RemoteFile(io.RawIOBase):
    """obstore's reader in the form of Python's files, with errors translated."""

    def __init__(self, reader: Any, store: ObjectStore, key: str) -> None:
        self._reader = reader
        self._store = store
        self._key = key

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._store._translated("read", self._key):
            data = memoryview(self._reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._store._translated("read", self._key):
            return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())


class _StreamedFile(io.RawIOBase):
    """The body of one answer as a file; it seeks forwards only, by reading."""

    def __init__(self, pieces: Iterator[Any], store: ObjectStore, key: str) -> None:
        self._pieces = pieces
        self._store = store
        self._key = key
        self._piece = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._piece:
            with self._store._translated("read", self._key):
                piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(bytes(piece))
        size = min(len(buffer), len(self._piece))
        buffer[:size] = self._piece[:size]
        self._piece = self._piece[size:]
        self._position += size
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END or target < self._position:
            raise io.UnsupportedOperation(f"{self._key}: this server's objects read forwards only")
        scrap = bytearray(min(_CHUNK_BYTES, target - self._position))
        while self._position < target:
            room = memoryview(scrap)[: target - self._position]
            if not self.readinto(room):
                break
        return self._position

    def tell(self) -> int:
        return self._position


def translate(error: Exception, doing: str, where: str) -> CloudlmError:
    """The cloudlm error for what obstore raised; the words hold no query string and no header."""
    if isinstance(error, AlreadyExistsError | PreconditionError):
        return _Exists(f"{where} exists")
    if isinstance(error, FileNotFoundError | NotFoundError):
        return NotFound(f"cannot {doing} {where}: it does not exist")
    reason = _first_sentence(str(error))
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return StorageFailed(
            f"cannot {doing} {where}: access denied; check the credentials in the environment "
            f"and their rights ({reason})"
        )
    if isinstance(error, NotSupportedError | NotImplementedError):
        return NotSupported(f"cannot {doing} {where}: the server does not support it ({reason})")
    if re.search(r"\b(InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|403)\b", str(error)):
        return StorageFailed(f"cannot {doing} {where}: access denied ({reason})")
    if re.search(r"\b(405|501) |Operation not supported|not yet implemented", str(error)):
        return NotSupported(f"cannot {doing} {where}: the server does not support it ({reason})")
    return Unavailable(f"cannot {doing} {where}: {reason}")


def _first_sentence(text: str) -> str:
    text = text.split("\n\nDebug source", 1)[0].split("<?xml", 1)[0]
    text = re.sub(r"\?[^\s\"')]*", "?…", text)  # signatures travel in query strings
    return " ".join(text.split())[:300]


def _pieces(source: io.FileIO, part_bytes: int, progress: BytesMoved | None) -> Iterator[bytes]:
    done = 0
    while piece := source.read(part_bytes):
        yield piece
        done += len(piece)
        if progress is not None:
            progress(done)


def _open_bucket(url: str, options: dict[str, str]) -> Bucket:
    scheme = url.partition("://")[0]
    if scheme == "oss":
        url, options = _oss_as_s3(url, options)
    elif scheme == "s3" and os.environ.get("AWS_ENDPOINT_URL_S3"):
        options.setdefault("endpoint", os.environ["AWS_ENDPOINT_URL_S3"])
    plain = url.startswith("http://") or _endpoint(scheme, options).startswith("http://")
    try:
        return from_url(
            url,
            config=cast(Any, options) if options else None,
            client_options={
                "allow_http": plain,
                "connect_timeout": timedelta(seconds=5),
                "timeout": timedelta(seconds=_timeout_s(scheme)),
            },
            retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
        )
    except (BaseError, UnknownConfigurationKeyError, ValueError, OSError) as error:
        raise BadSetting(
            f"{url} cannot be used as a store: {_first_sentence(str(error))}; expected "
            "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, oss://bucket/prefix "
            "or https://host/path, and the cloud's credentials in the environment"
        ) from error


def _timeout_s(scheme: str) -> int:
    return _WHOLE_OBJECT_TIMEOUT_S if scheme in ("http", "https") else _REQUEST_TIMEOUT_S


def _endpoint(scheme: str, options: Mapping[str, str]) -> str:
    if "endpoint" in options:
        return options["endpoint"]
    names = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "az": ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
    }.get(scheme, ())
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _oss_as_s3(url: str, options: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Alibaba OSS speaks S3 at its own endpoint, with the bucket in the host name."""
    endpoint = options.pop("endpoint", "") or os.environ.get("OSS_ENDPOINT", "")
    if not endpoint:
        raise BadSetting(
            f"{url} needs OSS_ENDPOINT in the environment, such as "
            "https://oss-cn-hangzhou.aliyuncs.com"
        )
    scheme, _, host = endpoint.rpartition("://")
    scheme = scheme or "https"
    bucket = url.removeprefix("oss://").partition("/")[0]
    region = re.search(r"oss-([a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com", host)
    settings = {
        "endpoint": f"{scheme}://{bucket}.{host.removeprefix(bucket + '.')}",
        "virtual_hosted_style_request": "true",
        "region": region.group(1) if region else os.environ.get("OSS_REGION", "us-east-1"),
    }
    for option, variable in (
        ("access_key_id", "ALIBABA_CLOUD_ACCESS_KEY_ID"),
        ("secret_access_key", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"),
        ("session_token", "ALIBABA_CLOUD_SECURITY_TOKEN"),
    ):
        if os.environ.get(variable):
            settings[option] = os.environ[variable]
    return "s3://" + url.removeprefix("oss://"), settings | options
