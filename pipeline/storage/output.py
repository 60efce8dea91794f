"""Where a Hessian lies: a folder on any fsspec filesystem, and the small objects in it."""

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import psutil
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from zarr.abc.store import Store
from zarr.storage import LocalStore

from pipeline.errors import OutputError, UnfitError, human_bytes
from pipeline.files.local import PARTIAL, create_file, remove_partial, replace_file, settle
from pipeline.storage.filesystems import at_once, endpoint_for, explained, open_filesystem, read_bounded, zarr_store
from pipeline.storage.read_ahead import ahead
from pipeline.storage.retries import http_status, patient
from pipeline.urls import Url

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GROUP = "zarr.json"  # makes the folder a Zarr group of the two arrays
MATRIX = "hessian.zarr"
GRADIENT = "gradient.zarr"
PARQUET = "hessian.parquet"
RECEIPTS = "receipts"
LEASE = "lease"
VERIFY = "verify.json"
METADATA_BYTES = 32 * 2**20  # at most, of a manifest or of an array's metadata: 1e5 parameters
NOTE_BYTES = 2**20  # likewise, of a driver's word on how it goes
MOST_BYTES = 64 * 2**20  # likewise, of an object whose size nothing else tells
FORECAST = "forecast.json"
REPORT = "report"
SUCCESS = "_SUCCESS"
SETTLERS = 8  # files at a time that are waited for
PRECONDITION_FAILED = 412


class Output:
    """A folder named by a path or an fsspec URL.

    Args:
        url: a local path, or a URL such as `memory://name` or `s3://bucket/prefix`.
        endpoint_url: of the server, where it is not the cloud's own.

    Raises:
        OutputError: see `open_filesystem`.
    """

    def __init__(self, url: str, endpoint_url: str | None = None) -> None:
        given = Url(Url(url).plain.rstrip("/"))
        self.url, self._endpoint_url = str(given), endpoint_url
        self._given_up = Event()
        self._fs, self._root = open_filesystem(given, endpoint_url)  # refuses one with secrets
        if self.is_local:
            self._root = os.path.abspath(self._root)
            self.url = self._root

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel by name: a filesystem belongs to the process that made it, and may hold credentials."""
        if self.is_memory:
            raise TypeError(f"output {self.url} lies in this process and cannot be sent to another")
        return type(self), (self.url, self._endpoint_url)

    @classmethod
    def private(cls) -> "Output":
        """Return a place in memory that nobody else sees and that goes away with the last reference to it."""
        output = cls("memory://hessian")
        output._fs = _PrivateMemory()
        return output

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return isinstance(self._fs, LocalFileSystem)

    @property
    def is_memory(self) -> bool:
        """Whether it lies in this process's memory."""
        return isinstance(self._fs, MemoryFileSystem)

    def path(self, name: str) -> str:
        """Return the full path of an object."""
        return f"{self._root}/{name}".rstrip("/")

    def put(self, name: str, *parts: bytes | memoryview, lasting: bool = False) -> None:
        """Write an object whole or not at all.

        Args:
            name: relative to the folder.
            parts: its bytes, one after the other.
            lasting: return only when it would survive the end of the machine; stores do so in any case.

        Raises:
            OutputError: it cannot be written.
        """
        with explained(self.url, f"cannot write {name}"):
            if self.is_local:
                replace_file(Path(self.path(name)), parts, lasting=lasting)
            else:
                self._patient(self._fs.pipe_file)(self.path(name), b"".join(parts))

    def settle(self) -> None:
        """Wait until all that lies here would survive the end of the machine; stores see to that with each object.

        Raises:
            OutputError: the disk fails.
        """
        if not self.is_local:
            return
        with explained(self.url, "cannot be brought to the disk"):
            folders = list(os.walk(self._root))
            files = (os.path.join(folder, name) for folder, _, names in folders for name in names)
            for _ in ahead(settle, files, SETTLERS):
                pass
            for folder in (os.path.dirname(self._root), *(folder for folder, _, _ in folders)):
                settle(folder)

    def tidy(self, before: float) -> None:
        """Remove what writers that were killed before a time left half written on a local disk, but for leases."""
        if self.is_local:
            remove_partial(Path(self._root), LEASE, before)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object if there is none of that name; of many that try at once, one succeeds.

        Args:
            name: relative to the folder.
            data: its bytes.

        Returns:
            Whether this call made it. False may also mean that its answer was lost and that it found its own object.

        Raises:
            OutputError: it cannot be written.
        """
        with explained(self.url, f"cannot write {name}"):
            try:
                if self.is_local:
                    create_file(Path(self.path(name)), data)
                else:
                    patient(self._fs.pipe_file)(self.path(name), data, mode="create")
            except Exception as error:
                if isinstance(error, FileExistsError) or http_status(error) == PRECONDITION_FAILED:
                    return False
                raise
        return True

    def age(self, name: str, *, ask: bool = True) -> float | None:
        """Return the seconds since an object was put, by the store's own clock.

        Args:
            name: relative to the folder.
            ask: the store for its time, by putting an object; else this machine's is taken.

        Returns:
            The seconds; None where there is no such object.

        Raises:
            OutputError: it cannot be found out.
        """
        with explained(self.url, f"cannot read {name}"):
            try:
                then = patient(self._fs.modified)(self.path(name))
            except FileNotFoundError:
                return None
            now = self._time() if ask else datetime.now(UTC)
        return float((now - then.replace(tzinfo=then.tzinfo or UTC)).total_seconds())

    def _time(self) -> datetime:
        """Ask the store what time it is."""
        name = f"{uuid.uuid4().hex}{PARTIAL}"
        self.put(name, b"")
        try:
            now: datetime = patient(self._fs.modified)(self.path(name))
        finally:
            self.delete(name)
        return now.replace(tzinfo=now.tzinfo or UTC)

    def get(self, name: str, most_bytes: int = MOST_BYTES) -> bytes | None:
        """Read an object.

        Args:
            name: relative to the folder.
            most_bytes: that such an object can have; no more are read.

        Returns:
            Its bytes, None where there is none.

        Raises:
            UnfitError: it has more, or is no regular file.
            OutputError: it cannot be read.
        """
        with explained(self.url, f"cannot read {name}"):
            try:
                return patient(partial(read_bounded, self._fs), self._given_up)(self.path(name), most_bytes)
            except FileNotFoundError:
                return None
            except UnfitError as error:
                raise UnfitError(f"output {self.url}: {name} {error}") from None

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        with explained(self.url, f"cannot remove {name}"), suppress(FileNotFoundError):
            self._patient(self._fs.rm_file)(self.path(name))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """List all objects below a folder, with their sizes in bytes, by one listing.

        Args:
            folder: relative to this one.

        Returns:
            Names relative to that folder; unfinished files are left out.
        """
        root, found = self.path(folder), {}
        with explained(self.url, "cannot be listed"), suppress(FileNotFoundError):
            found = self._patient(self._fs.find)(root, detail=True)
        names = {path[len(root) + 1 :] if path.startswith(root) else path: info for path, info in found.items()}
        # Some stores show folders as objects without a name, or with a slash at its end.
        return {name: int(info["size"]) for name, info in names.items() if not name.endswith((PARTIAL, "/")) and name}

    def folders(self) -> list[str]:
        """Name what lies right below this folder, one request for all, whatever is below that."""
        with explained(self.url, "cannot be listed"), suppress(FileNotFoundError):
            return sorted(
                path.rstrip("/").split("/")[-1] for path in self._patient(self._fs.ls)(self._root, detail=False)
            )
        return []

    def below(self) -> dict[str, bool]:
        """Name what lies right below this folder, and say of each whether it is a folder: one request."""
        with explained(self.url, "cannot be listed"), suppress(FileNotFoundError):
            found = self._patient(self._fs.ls)(self._root, detail=True)
            names = ((info["name"].rstrip("/").split("/")[-1], info["type"] == "directory") for info in found)
            return dict(sorted(names))
        return {}

    def zarr_store(self, name: str = "") -> Store:
        """Open the Zarr store below this folder, or the one that is this folder."""
        if self.is_local:
            return LocalStore(self.path(name))
        return zarr_store(self._fs, self.path(name), self._given_up)

    def give_up(self) -> None:
        """Have what waits to be tried again fail at once, in all threads and from now on: nobody needs it any more."""
        self._given_up.set()

    def _patient(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return patient(function, self._given_up)

    def check_writable(self) -> None:
        """Write and remove a small object.

        Raises:
            OutputError: that fails.
        """
        name = f"{uuid.uuid4().hex}{PARTIAL}"
        if self._fs.async_impl:
            calls = (self._fs._pipe_file, self.path(name), b""), (self._fs._rm_file, self.path(name))
            at_once(self._fs, self.url, "cannot be written to", *calls)
        else:
            self.put(name, b"")
            self.delete(name)

    def check_readable(self) -> None:
        """Ask for the manifest.

        Raises:
            OutputError: there is no answer, or no such bucket.
        """
        if self._fs.async_impl:
            if at_once(self._fs, self.url, "cannot be read", (self._fs._exists, self.path(MANIFEST))):
                return
            bucket = self._root.partition("/")[0]
            if not at_once(self._fs, self.url, "cannot be read", (self._fs._exists, bucket)):
                raise OutputError(f"output {self.url}: there is no bucket `{bucket}`: create it, or correct the URL")

    def check_room(self, needed_bytes: int, remedy: str) -> None:
        """Refuse to start what would fill the disk or the memory.

        Args:
            needed_bytes: what is going to be written.
            remedy: what the error says to do.

        Raises:
            OutputError: less is free.
        """
        if self.is_local:
            free, place = psutil.disk_usage(str(_existing(Path(self._root)))).free, "on the disk"
        elif self.is_memory:
            free, place = psutil.virtual_memory().available, "in memory"
        else:
            return
        if needed_bytes > free:
            raise OutputError(
                f"output {self.url}: needs {human_bytes(needed_bytes)}, but {place} only {human_bytes(free)} are free; "
                f"{remedy} or another output"
            )

    def remove(self, name: str = "") -> None:
        """Remove the folder with all in it, or what is of that name in it, if it is there."""
        path = self.path(name)
        with explained(self.url, f"{name} cannot be removed".lstrip()):
            if self._patient(self._fs.exists)(path):
                self._patient(self._fs.rm)(path, recursive=True)


def open_readable(url: str, beside: str, endpoint_url: str | None) -> Output:
    """Open an output that something is to be read from.

    Args:
        url: of it.
        beside: an output whose server is known.
        endpoint_url: of that server; this one's too where both are of one kind.

    Returns:
        The output.

    Raises:
        OutputError: it does not answer.
    """
    output = Output(url, endpoint_for(url, beside, endpoint_url))
    output.check_readable()
    return output


class _PrivateMemory(MemoryFileSystem):  # type: ignore[misc]
    """A memory filesystem with a store of its own; fsspec's is one for the whole process."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists."""
    return next(p for p in (path, *path.parents) if p.is_dir())
