"""Filesystems by URL: local disk, memory, and the clouds through fsspec, whose extras bring their clients.

Credentials come from the environment, the clouds' own configuration files or fsspec's; nothing here holds them, so that
nothing that is pickled, written or printed can.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import fsspec
from fsspec.asyn import sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from pipeline.errors import HessianError, OutputError, UnfitError, UnreachableError
from pipeline.files.local import read_regular
from pipeline.storage.retries import http_status, is_transient, patient
from pipeline.urls import Url

CLIENTS = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs"}  # by extra
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
ANSWER_SECONDS = 15  # for the first request to a cloud
REQUEST_SECONDS = 60
_NO_SUCH_RANGE = 416


def open_filesystem(url: str, endpoint_url: str | None = None, noun: str = "output") -> tuple[Any, str]:
    """Find the filesystem of a URL.

    Args:
        url: a local path, or a URL such as `memory://name` or `s3://bucket/prefix`.
        endpoint_url: of the server, where it is not the cloud's own.
        noun: what the URL is of, in errors.

    Returns:
        The filesystem, and the path in it.

    Raises:
        OutputError: the URL's protocol is not known, its client is not installed, or it carries credentials.
    """
    url = Url(url)
    options = _options(url, endpoint_url, noun)
    try:
        fs, root = fsspec.core.url_to_fs(url.plain, **options)
    except ImportError as error:
        extra = EXTRAS.get(_protocol(url))
        remedy = f"python3 -m pip install {CLIENTS[extra]}" if extra else str(error)
        raise OutputError(f"{noun} {url}: its client is not installed: {remedy}") from None
    except Exception as error:
        raise OutputError(f"{noun} {url}: {url.hidden_in(reason(error))}") from None
    return fs, root


def zarr_store(fs: Any, path: str, given_up: Event) -> Store:
    """Return the Zarr store at a path of a filesystem.

    It waits for the filesystem's own functions in threads: an asynchronous twin of the filesystem would hold
    connections of its own, and adlfs's fails to close them at the end of the process.

    Args:
        fs: the filesystem.
        path: in it.
        given_up: once set, nothing is tried again.

    Returns:
        The store; what is transient is tried again, what cannot be read for another reason is an OutputError.
    """
    return _PatientStore(FsspecStore(AsyncFileSystemWrapper(fs, asynchronous=True), path=path), given_up)


def read_bounded(fs: Any, path: str, most_bytes: int) -> bytes:
    """Read a file whole, or refuse it.

    Args:
        fs: its filesystem.
        path: in it.
        most_bytes: that it may have; no more than one above are asked for.

    Returns:
        Its bytes.

    Raises:
        UnfitError: it has more, or lies on a disk and is no regular file; the message is a clause without a subject.
    """
    if isinstance(fs, LocalFileSystem):
        return read_regular(path, most_bytes)
    try:
        data = bytes(fs.cat_file(path, start=0, end=most_bytes + 1))
    except Exception as error:
        if http_status(error) == _NO_SUCH_RANGE:  # of an empty object
            return b""
        raise
    if len(data) > most_bytes:
        raise UnfitError(f"has more than {most_bytes:,} bytes")
    return data


def at_once(fs: Any, url: str, what: str, *calls: tuple[Any, ...], noun: str = "output") -> Any:
    """Make the first requests to a cloud, within seconds and without patience.

    Args:
        fs: the filesystem.
        url: of the output.
        what: could not be done.
        calls: coroutine functions of the filesystem, each with its arguments.
        noun: what the URL is of, in errors.

    Returns:
        What the last of them gives.

    Raises:
        OutputError: there is no answer, or a refusal.
    """
    found = None
    try:
        with explained(url, what, noun):
            for function, *arguments in calls:
                found = sync(fs.loop, function, *arguments, timeout=ANSWER_SECONDS)
    except UnreachableError as error:
        raise OutputError(str(error)) from None  # nothing was begun that could be gone on with
    return found


def reason(error: BaseException) -> str:
    """Return in one line why a store refuses, and what to do."""
    name, status = type(error).__name__, http_status(error)
    said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or name
    if isinstance(error, PermissionError) or status in {401, 403} or "Credential" in name:
        return f"access denied, {said}: check the credentials in the environment, and the rights they give"
    if isinstance(error, FileNotFoundError) or status == 404:
        return f"no such bucket or container, {said}: create it, or correct the URL"
    if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}:
        return f"no room, {said}: make some"
    if is_transient(error):
        return f"no answer, {name} {said}: check endpoint and network, then run the same command again"
    return said


@contextmanager
def explained(url: str, what: str, noun: str = "output") -> Iterator[None]:
    """Turn what a filesystem raises, each in its own way, into one error in one line.

    Args:
        url: of the output.
        what: could not be done.
        noun: what the URL is of, in errors.

    Raises:
        UnreachableError: it may be possible later.
        OutputError: it will not.
    """
    try:
        yield
    except HessianError:
        raise
    except Exception as error:
        kind = UnreachableError if is_transient(error) else OutputError
        raise kind(f"{noun} {url}: {what} ({Url(url).hidden_in(reason(error))})") from None


class _PatientStore(WrapperStore[FsspecStore]):
    """Tries requests again while what goes wrong is transient."""

    def __init__(self, store: FsspecStore, given_up: Event) -> None:
        super().__init__(store)
        self._given_up = given_up

    def _with_store(self, store: FsspecStore) -> "_PatientStore":
        return type(self)(store, self._given_up)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with explained(self._store.path, f"cannot read {key}"):
            return await patient(self._store.get, self._given_up)(key, prototype, byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        await patient(self._store.set, self._given_up)(key, value)


def _require_plain(url: Url, endpoint_url: str, noun: str) -> None:
    """Refuse URLs that carry credentials, without repeating them; files of other schemes may have no other way."""
    if "::" in url:
        raise OutputError(f"the {noun}'s URL chains filesystems: give that of the bucket")
    secret = url.is_secret and (noun == "output" or _protocol(url) in EXTRAS)
    if secret or Url(endpoint_url).is_secret:
        raise OutputError(f"the {noun}'s URL or endpoint_url carries credentials: give them in the environment instead")


def endpoint_for(url: str, output: str | None, endpoint_url: str | None) -> str | None:
    """Return the server of a URL's bucket: the output's, where both are of one cloud."""
    same = output is not None and _protocol(url) in EXTRAS and EXTRAS[_protocol(url)] == EXTRAS.get(_protocol(output))
    return endpoint_url if same else None


def _protocol(url: str) -> str:
    return url.split("://")[0] if "://" in url else "file"


def _options(url: Url, endpoint_url: str | None, noun: str) -> dict[str, Any]:
    """Return what a filesystem is opened with, none of it secret."""
    _require_plain(url, endpoint_url or "", noun)
    options: dict[str, Any] = {"use_listings_cache": False}  # a stale listing denies what another process just wrote
    extra = EXTRAS.get(_protocol(url))
    if extra == "s3":
        options["max_concurrency"] = 1  # of one object: else each read is preceded by a request for its size
    if extra == "gcs":
        options["requests_timeout"] = REQUEST_SECONDS  # the others have limits of their own
    if endpoint_url is not None:
        if extra not in {"s3", "gcs"}:
            raise OutputError(
                f"endpoint_url got {endpoint_url} for {noun} {url}, expected one in s3:// or gs://; for Azure set "
                "BlobEndpoint in AZURE_STORAGE_CONNECTION_STRING"
            )
        options["endpoint_url"] = endpoint_url
    return options
