"""Files of local disks, read within bounds: what lies under a name may be a pipe, a device, or without end."""

import os
import stat
from pathlib import Path

from pipeline.errors import UnfitError


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
