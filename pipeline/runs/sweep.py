"""Every new checkpoint: the Hessians that a schedule asks for and that are not there yet, one after the other."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.analysis.hessian import Hessian
from pipeline.analysis.summary import summarize
from pipeline.errors import FAILED, RESUMABLE, CheckpointError, HessianError, SweepError, in_words
from pipeline.problem.problem import Problem
from pipeline.progress import Reporter
from pipeline.runs.api import load_problem, run
from pipeline.runs.checkpoint import Checkpoint, place_checkpoint, read_checkpoint
from pipeline.runs.lease import Lease
from pipeline.runs.schedule import ScheduleSpec, load_schedule
from pipeline.runs.sweep_table import TABLE, Row, Sweep, moment, natural
from pipeline.spec import JobSpec
from pipeline.storage.filesystems import at_once, endpoint_for, explained, open_filesystem
from pipeline.storage.output import Output
from pipeline.storage.retries import patient
from pipeline.urls import Url, redacted_values

_OF_A_JOB = ("problem", "problem_args", "checkpoint_key", "params", "blocks", "dtype", "store_dtype")  # affect numbers
_STAMPS = ("size", "ETag", "etag", "generation", "mtime", "LastModified", "last_modified")  # what stores say of a file
_DIGITS = 12  # of a checkpoint's SHA-256 in its output's name

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """What a call did.

    Attributes:
        checkpoints: there are.
        computed: Hessians, by this call.
        before: were done before, or are of the same content as another.
        removed: outputs of earlier ones.
        table: URL of it.
    """

    checkpoints: int
    computed: int
    before: int
    removed: int
    table: str


@dataclass(frozen=True)
class _File:
    """A file that is there: its URL, and what its store says of it, empty where that would not tell a change."""

    url: Url
    stamp: str


def run_due(path: Path, report: Reporter) -> Swept:
    """Compute the Hessian of every checkpoint that has none yet.

    Args:
        path: of the schedule.
        report: told about progress.

    Returns:
        What was done.

    Raises:
        SpecError: the schedule or its job is not valid.
        LeaseError: another such call is at work on the same output.
        SweepError: some checkpoints failed; the others are done.
        HessianError: the job's problem cannot be built, there is no place to look for checkpoints in, or the output
            refuses.
    """
    schedule, job, folder = load_schedule(path)
    output = Output(schedule.output, job.endpoint_url)
    output.check_writable()
    due = _Due(schedule, job, folder, output, report)
    with Lease(output, due.state) as lease:
        return due.go(lease)


def list_checkpoints(url: str, endpoint_url: str | None = None) -> list[_File]:
    """List files by a glob.

    Args:
        url: a path or an fsspec URL with `*`, `?` or `**` in it.
        endpoint_url: of its server, where it is not the cloud's own or the environment's.

    Returns:
        The files in the order of their names, numbers by value.

    Raises:
        CheckpointError: there is no such bucket, or no such local folder.
        OutputError: their store refuses.
    """
    url = Url(url)
    fs, path = open_filesystem(url, endpoint_url, "checkpoint")
    plain = re.split(r"[*?\[]", path)[0]
    if fs.async_impl:
        at_once(fs, url, "cannot be listed", (fs._exists, plain), noun="checkpoint")
    root = path.partition("/")[0] if fs.async_impl else plain.rpartition("/")[0]
    with explained(url, "cannot be listed", "checkpoint"):
        found = patient(fs.glob)(path, detail=True)
        if not found and not patient(fs.exists)(root):
            raise CheckpointError(f"checkpoint {url}: there is no `{url.hidden_in(root)}`")
    files = [
        _File(Url(fs.unstrip_protocol(name) if "://" in url else name), _stamp(info))
        for name, info in found.items()
        if info["type"] == "file" and not PurePosixPath(name).name.startswith(".")
    ]
    return sorted(files, key=lambda file: natural(file.url))


class _Due:
    """One call."""

    def __init__(self, schedule: ScheduleSpec, job: JobSpec, folder: Path, output: Output, report: Reporter) -> None:
        self._schedule, self._job, self._folder = schedule, job, folder
        self._output, self._report = output, report
        self._endpoint_url = endpoint_for(schedule.checkpoints, schedule.output, job.endpoint_url)
        self._counts = {"checkpoints": 0, "computed": 0, "before": 0, "removed": 0}
        self._failures: dict[str, Exception] = {}

    def state(self) -> Mapping[str, Any]:
        """Return what the lease tells; called by another thread."""
        return {**self._counts, "errors": [str(error) for error in list(self._failures.values())[-1:]]}

    def go(self, lease: Lease) -> Swept:
        """Do it, while no other does."""
        self._sweep = Sweep.read(
            self._output, redacted_values(self._job.model_dump(mode="json", include=set(_OF_A_JOB)))
        )
        files = list_checkpoints(self._schedule.checkpoints, self._endpoint_url)
        self._counts["checkpoints"] = len(files)
        if not files:
            self._report.say(f"there is no checkpoint {self._schedule.checkpoints}")
        there = {file.url for file in files}
        self._sweep.seen = {url: seen for url, seen in self._sweep.seen.items() if url in there}
        for number, file in enumerate(files, 1):
            lease.check()
            checkpoint = self._read(file)
            if checkpoint is not None:
                self._compute(checkpoint, self._problem, f"{number} of {len(files)}")
                self._thin_out()
        self._thin_out()
        self._sweep.write(self._output)
        self._report_failures()
        return Swept(**self._counts, table=f"{self._output.url}/{TABLE}")

    def _read(self, file: _File) -> Checkpoint | None:
        """Read a checkpoint; None where it is known to be done, turns out to be, or cannot be read."""
        rows, seen = self._sweep.rows, self._sweep.seen
        stamp, sha256 = seen.get(file.url, ("", ""))
        checkpoint = None
        if not file.stamp or file.stamp != stamp or sha256 not in rows:
            try:
                checkpoint = read_checkpoint(file.url, self._endpoint_url, "checkpoint_key")
            except HessianError as error:
                self._fail(file.url, error)
                return None
            sha256 = checkpoint.sha256
            seen[file.url] = file.stamp, sha256
        if sha256 in rows:
            self._counts["before"] += 1
            return None
        return checkpoint

    @cached_property
    def _problem(self) -> Problem:
        """Build the job's problem, once for all checkpoints."""
        self._report.say(f"building {self._job.problem}")
        return load_problem(self._job.model_copy(update={"checkpoint_key": None}), self._folder)

    def _compute(self, checkpoint: Checkpoint, problem: Problem, which: str) -> None:
        """Compute a Hessian, or go on with it; what goes wrong is noted, and does not stop the others."""
        self._report.say(f"checkpoint {which}: {checkpoint.url}")
        url = f"{self._output.url}/{self._folder_of(checkpoint)}"
        try:
            placed = place_checkpoint(problem, checkpoint, self._job.checkpoint_key)
            hessian = run(placed, self._job, url, report=self._report, name=self._job.problem).hessian
            self._sweep.rows[checkpoint.sha256] = _row(checkpoint, hessian)
        except Exception as error:  # of the user's own code, too
            self._fail(checkpoint.url, error)
            return
        self._counts["computed"] += 1
        self._sweep.write(self._output)

    def _folder_of(self, checkpoint: Checkpoint) -> str:
        """Name the output of a checkpoint; one of the same content may have begun it under another name."""
        digits = checkpoint.sha256[:_DIGITS]
        begun = [name for name in self._output.folders() if name.endswith(f"-{digits}")]
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", PurePosixPath(checkpoint.url).stem)
        return begun[0] if begun else f"{stem}-{digits}"

    def _thin_out(self) -> None:
        """Remove the outputs that are not among the last; their rows stay, and are put first without them."""
        if self._schedule.keep is None:
            return
        earlier = {row.sha256[:_DIGITS]: row for row in self._sweep.in_order()[: -self._schedule.keep]}
        if named := [row for row in earlier.values() if row.output is not None]:
            self._sweep.rows |= {row.sha256: replace(row, output=None) for row in named}
            self._sweep.write(self._output)
        for name in self._output.folders() if earlier else ():
            if name.rpartition("-")[2] in earlier:
                Output(f"{self._output.url}/{name}", self._job.endpoint_url).remove()
                self._counts["removed"] += 1

    def _fail(self, url: str, error: Exception) -> None:
        self._failures[url] = error
        if not isinstance(error, HessianError):
            _log.exception("checkpoint %s", url)
        self._report.say(f"checkpoint {url} failed: {_said(error)}")

    def _report_failures(self) -> None:
        """Name the checkpoints that failed."""
        if not self._failures:
            return
        codes = {getattr(error, "exit_code", FAILED) for error in self._failures.values()}
        url, error = next(iter(self._failures.items()))
        raise SweepError(
            f"{len(self._failures)} of {self._counts['checkpoints']} checkpoints failed ({', '.join(self._failures)}), "
            f"{url} with {_said(error)}; the others are done",
            RESUMABLE if RESUMABLE in codes else FAILED,
        )


def _row(checkpoint: Checkpoint, hessian: Hessian) -> Row:
    """Return the table's row of a Hessian."""
    found = summarize(hessian)
    return Row(
        checkpoint.url,
        checkpoint.sha256,
        hessian.url,
        hessian.shape[0],
        hessian.manifest.fingerprint.samples,
        found.loss,
        found.gradient_norm,
        found.trace,
        found.norm,
        [{"row": row, "col": col, "norm": norm} for (row, col), norm in found.blocks.items()],
        moment(found.finished),
        found.worker_seconds,
    )


def _stamp(info: Mapping[str, Any]) -> str:
    """Return what a store says of a file that changes when it does."""
    said = [f"{name} {info[name]}" for name in _STAMPS if info.get(name) is not None]
    return "; ".join(said) if len(said) > 1 else ""  # a size alone tells little


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, HessianError) else in_words(error)
