"""The errors this package raises: one family, each also the builtin a caller would catch.

Every message says what was got, what was expected and what to do. `exit_code` is the status of the `hessian` command.
"""

import difflib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from pipeline.urls import redacted

FAILED = 1
BAD_INPUT = 2
_CANDIDATES, _COMPARED, _LISTED = 1000, 100, 50  # names, characters of each, and names that are listed
RESUMABLE = 75  # EX_TEMPFAIL: run the same command again


class HessianError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        exit_code: of the `hessian` command.
        retryable: whether another worker's attempt at the same tile may end otherwise.
    """

    exit_code = FAILED
    retryable = True

    def __str__(self) -> str:
        """Return the message in one line; KeyError, of which some are, would quote it."""
        return shown(str(self.args[0])) if self.args else ""


class SpecError(HessianError, ValueError):
    """A job spec or a setting is not valid."""

    exit_code = BAD_INPUT
    retryable = False


class ProblemError(HessianError, ValueError):
    """A model, a loss, data or a selection of parameters has no Hessian, or none that can be computed exactly."""

    exit_code = BAD_INPUT
    retryable = False


class MemoryRefusedError(HessianError, MemoryError):
    """More memory would be needed than is allowed; nothing was computed."""

    exit_code = BAD_INPUT
    retryable = False


class OutputError(HessianError, OSError):
    """An output cannot be read or written, has no room, or holds something else."""

    exit_code = BAD_INPUT
    retryable = False


class UnfitError(OutputError):
    """What lies under the name of an object cannot be that object: no regular file, or too large for it."""


class UnreachableError(OutputError):
    """An output does not answer, though it was asked for minutes; finished tiles are kept."""

    exit_code = RESUMABLE  # by the same command, later; another worker would wait as long for nothing


class StoppedError(OutputError):
    """An output refused in the middle of a run: rights lost, bucket gone, disk full; finished tiles are kept."""

    exit_code = RESUMABLE
    retryable = True


class FingerprintError(HessianError, ValueError):
    """An output belongs to a different problem than the one at hand."""

    exit_code = BAD_INPUT
    retryable = False


class CheckpointError(HessianError, ValueError):
    """A checkpoint cannot be read, or does not fit the model."""

    exit_code = BAD_INPUT
    retryable = False


class BlockError(HessianError, KeyError):
    """A block, row or column that the Hessian does not have."""

    exit_code = BAD_INPUT
    retryable = False


class IncompleteError(HessianError, LookupError):
    """A part of the Hessian was asked for that has not been computed."""


class IndefiniteError(HessianError, ArithmeticError):
    """A Hessian is not positive definite where it has to be.

    Args:
        message: what was found.
        smallest: its smallest eigenvalue.
        damping: a number that makes it positive definite, added to its diagonal.
    """

    def __init__(self, message: str, smallest: float = float("nan"), damping: float = float("nan")) -> None:
        super().__init__(message)
        self.smallest, self.damping = smallest, damping


class ConvergenceError(HessianError, ArithmeticError):
    """An iteration did not come as close as it was to within the steps it was given."""


class NotFiniteError(HessianError, ArithmeticError):
    """A computed entry is NaN or infinite."""


class TileError(HessianError, RuntimeError):
    """A tile could not be computed or written.

    Args:
        message: what went wrong.
        tile: its id.
    """

    exit_code = RESUMABLE

    def __init__(self, message: str, tile: str = "") -> None:
        super().__init__(message)
        self.tile = tile


class WorkerError(HessianError, RuntimeError):
    """Workers could not be started, or died too often."""

    exit_code = RESUMABLE


class LeaseError(HessianError, RuntimeError):
    """Another driver is at work on the output."""

    exit_code = RESUMABLE


class ClusterError(HessianError, ConnectionError):
    """A Ray cluster's dashboard does not answer, or refuses."""

    exit_code = BAD_INPUT
    retryable = False


class FollowError(ClusterError):
    """A job on a cluster is no longer followed; it goes on."""

    exit_code = RESUMABLE
    retryable = True


class SweepError(HessianError, RuntimeError):
    """Some checkpoints of a sweep failed; the others are done.

    Args:
        message: which, and why.
        exit_code: 75 where running it again may help, else 1.
    """

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """The process was asked to end, as by SIGTERM; finished tiles are kept."""


class VerificationError(HessianError, ArithmeticError):
    """A Hessian was computed, and its proof failed; the matrix is kept.

    Args:
        message: what was found.
        hessian: the matrix, unproven.
        verification: what was found, in full.
    """

    def __init__(self, message: str, hessian: Any = None, verification: Any = None) -> None:
        super().__init__(message)
        self.hessian, self.verification = hessian, verification


def shown(text: str, keep: str = "") -> str:
    """Return a text as anybody may see it: without secrets of URLs, and with nothing that a terminal acts on.

    Args:
        text: that holds names and messages from anywhere.
        keep: characters that are left as they are.
    """
    return printable(redacted(text), keep)


def printable(text: str, keep: str = "") -> str:
    """Write escapes for what a terminal would act on: names are anybody's.

    Args:
        text: of any characters.
        keep: of these, the ones to leave as they are.

    Returns:
        The text, the same where all of it can be printed.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def in_words(error: BaseException) -> str:
    """Return a foreign exception in one line: its type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Suggest the valid name closest to an unknown one.

    Args:
        name: what was got.
        known: the valid names.

    Returns:
        A clause to append to an error message.
    """
    some = [other[:_COMPARED] for other in islice(known, _CANDIDATES)]  # comparing takes the square of their lengths
    match = difflib.get_close_matches(name[:_COMPARED], some, n=1, cutoff=0.5)
    if match:
        return f"; did you mean `{match[0]}`?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"; expected one of {', '.join(some[:_LISTED])}{more}"


def human_bytes(count: float) -> str:
    """Return a number of bytes for people, in powers of 1,000 as disks and buckets are sold: "20.7 GB"."""
    units = iter(("bytes", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while round(count) >= 1000 and unit != "PB":
        count, unit = count / 1000, next(units)
    digits = 0 if unit == "bytes" or count >= 100 else 1 if count >= 10 else 2
    return f"{count:,.{digits}f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a time for people: "9.3 s", "4 min 7 s", "1 h 52 min", "3 d 4 h"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        (count, rest), (large, small) = divmod(whole, 60), ("min", "s")
    elif whole < 86400:
        (count, rest), (large, small) = divmod(round(whole / 60), 60), ("h", "min")
    else:
        (count, rest), (large, small) = divmod(round(whole / 3600), 24), ("d", "h")
    return f"{count:,} {large}" + (f" {rest} {small}" if rest else "")


def counted(count: int, noun: str) -> str:
    """Return how many there are: "1 tile", "3,081 tiles"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
