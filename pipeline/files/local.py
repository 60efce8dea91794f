"""Files of local disks: written whole or not at all, and read within bounds.

What lies under a name may be a pipe, a device, or without end.
"""

import os
import stat
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UnfitError

PARTIAL = ".partial"  # ends the name of what is not whole


def read_regular(path: str | Path, most_bytes: int) -> bytes:
    """Read a regular file, or none of it.

    Args:
        path: of it, or of a link to it.
        most_bytes: that it may have.

    Returns:
        Its bytes.

    Raises:
        UnfitError: it is something else than a regular file, or larger; the message is a clause without a subject.
        OSError: it is not there, or cannot be read.
    """
    _require_regular(os.stat(path).st_mode)
    # A pipe that took its place meanwhile would be waited for.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        _require_regular(found.st_mode)
        require_size(found.st_size, most_bytes)
        data = file.read(found.st_size + 1)
    require_size(len(data), most_bytes)
    return data


def require_size(size: int, most_bytes: int) -> None:
    """Refuse what has more bytes than it may have.

    Args:
        size: that it has.
        most_bytes: that it may have.

    Raises:
        UnfitError: it has more.
    """
    if size > most_bytes:
        raise UnfitError(f"has {size:,} bytes, expected at most {most_bytes:,}")


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UnfitError("is a folder, expected a file")
    if not stat.S_ISREG(mode):
        raise UnfitError("is a pipe, a device or a socket, expected a file")


def replace_file(path: Path, parts: Iterable[bytes | memoryview], *, lasting: bool) -> None:
    """Write a file by a temporary one; a killed process leaves at most a `.partial` file.

    Args:
        path: of it; folders are made.
        parts: its bytes, one after the other.
        lasting: return only when it would survive the end of the machine.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden: pyarrow would count a whole one that was left behind among the files of a Parquet folder.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.writelines(parts)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if lasting:
            settle(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(root: Path, but: str, before: float) -> None:
    """Remove what processes that were killed while they wrote have left.

    Args:
        root: a folder.
        but: the folder in it that is left alone.
        before: when what is removed was written last, in seconds since 1970; what is written now is younger.
    """
    for folder, inside, names in os.walk(root):
        if folder == str(root) and but in inside:
            inside.remove(but)
        for name in names:
            if name.startswith(".") and name.endswith(PARTIAL):
                with suppress(FileNotFoundError):
                    if os.stat(path := os.path.join(folder, name)).st_mtime < before:
                        os.unlink(path)


def create_file(path: Path, data: bytes) -> None:
    """Write a file that is not there yet; for a moment it can be seen empty.

    Args:
        path: of it; folders are made.
        data: its bytes.

    Raises:
        OSError: it is there, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
        except OSError:  # a full disk: an empty file would tell that somebody was here
            path.unlink()
            raise


def settle(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; what is gone meanwhile is of no matter.

    Args:
        path: of it; of what is neither, nothing is waited for.

    Raises:
        OSError: the disk fails.
    """
    if not (os.path.isdir(path) or os.path.isfile(path)):
        return
    with suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
