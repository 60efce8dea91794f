"""One attempt at a run: plans or goes on where others were cut off, computes what is missing, proves the result."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.analysis.hessian import Hessian
from pipeline.errors import OutputError, StoppedError, VerificationError, counted
from pipeline.execution.events import TILE_DONE, Tally
from pipeline.execution.executors import Executor, Serial, Work
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.manifest import Manifest
from pipeline.planning.tiling import Tile
from pipeline.problem.double_backward import reference_samples
from pipeline.problem.problem import Problem
from pipeline.progress import Reporter
from pipeline.results.fingerprint_check import require_same, require_same_settings, save_weights
from pipeline.results.receipt_audit import REMEDY, audit, listed_faults
from pipeline.results.reference import Reference
from pipeline.results.verification import Verification
from pipeline.results.verify import check
from pipeline.runs.executor_choice import decided, executor_of, settled
from pipeline.runs.lease import Lease
from pipeline.spec import Settings, device_of
from pipeline.storage.filesystems import explained
from pipeline.storage.output import (
    FORECAST,
    GRADIENT,
    GROUP,
    LEASE,
    MANIFEST,
    MATRIX,
    PARQUET,
    RECEIPTS,
    REPORT,
    SUCCESS,
    VERIFY,
    WEIGHTS,
    Output,
)
from pipeline.storage.receipts import begun_tiles, missing_tiles, own_receipt, receipt_name
from pipeline.storage.run_files import (
    Forecast,
    is_finished,
    read_manifest,
    read_proof,
    write_forecast,
    write_manifest,
)
from pipeline.storage.zarr_store import MatrixStore

RECEIPTS_READ = 8  # of tiles that are there, to know what one takes
# What a run leaves that was cut off before its manifest.
_OURS = (LEASE, WEIGHTS, GROUP, MATRIX, GRADIENT, RECEIPTS, FORECAST)
# What else there may be, in the order in which it goes: whatever is left of it by a cut is known at the next try.
_FINISHED = (SUCCESS, VERIFY, PARQUET, REPORT, MANIFEST)


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        hessian: the result.
        computed: tiles computed by this call.
        tiles: all of them.
        verification: what the proof found; None when it was switched off, or done before.
        plan_seconds: of planning.
        tile_seconds: of computing and writing tiles, workers' start included.
        verify_seconds: of the proof.
        lost: tiles that had to be given to another worker, by what became of the first.
    """

    hessian: Hessian
    computed: int
    tiles: int
    verification: Verification | None
    plan_seconds: float = 0.0
    tile_seconds: float = 0.0
    verify_seconds: float = 0.0
    lost: Mapping[str, int] = field(default_factory=dict)


class Attempt:
    """One call of a run.

    Args:
        problem: with the parameters selected.
        settings: how to compute it.
        output: where to.
        report: told about progress.
        name: of the factory that made the problem, None where the caller did.
        check: reads back what is there already.
        overwrite: replaces a Hessian that is there already.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        output: Output,
        report: Reporter,
        name: str | None,
        *,
        check: bool,
        overwrite: bool,
    ) -> None:
        self.problem, self.settings, self.output, self.report, self.name = problem, settings, output, report, name
        self.check, self.overwrite, self.tally = check, overwrite, Tally()
        self.lease = Lease(output, self.tally.to_json)
        self.joined = ExitStack()
        self.executor: Executor | None = None  # until one is needed: a finished output starts no Ray
        self.reference: Reference | None = None  # of the proof, where it is not in this process

    def outcome(self) -> Outcome:
        """Do it, while no other driver does."""
        manifest = None if self.overwrite else read_manifest(self.output)
        if manifest and not self.check and self._is_finished() and not self._resume(manifest):
            return self._nothing_to_do(manifest)
        with self.lease, self.joined:
            return self._outcome()

    def _outcome(self) -> Outcome:
        """Plan or resume, compute what is missing, verify, and mark as finished."""
        start = time.monotonic()
        manifest = None if self.overwrite else read_manifest(self.output)
        tiles = self._start() if manifest is None else self._resume(manifest)
        manifest = manifest or read_manifest(self.output)
        if manifest is None:
            raise OutputError(f"output {self.output.url}: the manifest that was just written cannot be read back")
        total = len(manifest.plan.tiles())
        if not tiles and self._is_finished():
            return self._nothing_to_do(manifest)
        for word in (SUCCESS, VERIFY):  # of what was there before
            self.output.delete(word)
        planned = time.monotonic()
        with self._resumable(total):
            self._compute(manifest, tiles, total)
            computed = time.monotonic()
            hessian = Hessian(self.output, manifest)
            verification = self._verify(hessian) if self.settings.verify else None
            verified = time.monotonic()
            seconds = (planned - start, computed - planned, verified - computed)
            named = dict(zip(("planning", "tiles", "verifying"), seconds, strict=True))
            self._finish({"tiles": total, "verified": verification is not None, "seconds": named})
        return Outcome(hessian, len(tiles), total, verification, *seconds, dict(self.tally.lost))

    def _finish(self, word: Mapping[str, Any]) -> None:
        """Mark the output as finished, once all of it would survive a power cut where that is asked for."""
        self.output.tidy(time.time())
        if self.settings.durable:
            self.output.settle()
        self.output.put(SUCCESS, json.dumps(word).encode(), lasting=self.settings.durable)

    def _nothing_to_do(self, manifest: Manifest) -> Outcome:
        self.report.say(f"{self.output.url} is finished already: nothing to do")
        return Outcome(Hessian(self.output, manifest), 0, len(manifest.plan.tiles()), None)

    def _is_finished(self) -> bool:
        """Whether an earlier run went to its end, its proof included where one is asked for."""
        return is_finished(self.output) and (not self.settings.verify or read_proof(self.output) is True)

    def _start(self) -> list[Tile]:
        """Plan, and set the output up; the manifest comes last, so that there is one only of a complete set-up."""
        there = self.output.sizes()
        known = {*_OURS, *_FINISHED} if self.overwrite and MANIFEST in there else set(_OURS)
        if foreign := sorted({name.split("/")[0] for name in there} - known):
            raise OutputError(f"output {self.output.url}: holds something else ({foreign[0]}); take an empty place")
        self.report.say("planning: preflight and probe")
        self.executor, made = settled(
            self.problem, self.settings, self.name, self.joined, self.lease.check, in_memory=self.output.is_memory
        )
        freed = sum(there.values()) if self.overwrite else 0
        self.output.check_room(made.stored_bytes - freed, made.smaller)
        self.report.say(_described(made, self.executor))
        if self.overwrite and MANIFEST in there:
            self.report.say(f"removing the Hessian in {self.output.url}")
            for name in (*_FINISHED, *_OURS):
                if name != LEASE:
                    self.output.remove(name)
        save_weights(self.problem, self.output)
        with explained(self.output.url, "cannot be set up"):
            MatrixStore.create(self.output, made.manifest, made.at.gradient)
        write_forecast(self.output, Forecast(made.memory.total_bytes, made.allowed_bytes, made.makespan_seconds()))
        write_manifest(self.output, made.manifest)
        return made.dearest_first()

    def _resume(self, manifest: Manifest) -> list[Tile]:
        """Check that the output is of this problem, and find the tiles that are missing."""
        require_same_settings(self.settings, self.problem, manifest, self.output)
        self.problem = require_same(self.problem, manifest, self.output, retrained=self.name is not None)
        MatrixStore(self.output, manifest)  # refuses an output without one
        if self.check:
            self._forget_damaged(manifest)
        missing = missing_tiles(self.output, manifest)
        if missing or not is_finished(self.output):
            total = len(manifest.plan.tiles())
            self.report.say(
                f"{self.output.url}: {total - len(missing)} of {counted(total, 'tile')} are there, going on"
            )
        return missing

    def _forget_damaged(self, manifest: Manifest) -> None:
        """Read back what is there, say what is at fault, and remove the receipts of its tiles."""
        begun = begun_tiles(self.output, manifest)
        self.report.say(f"reading back {counted(len(begun), 'tile')}")
        found = [audited for audited in audit(self.output, manifest, begun) if audited.faults]
        for line in listed_faults(found):
            self.report.say(line)
        for audited in found:  # or else a run that is cut off before it mends them would leave them for finished
            self.output.delete(receipt_name(audited.tile.id))

    @contextmanager
    def _resumable(self, total: int) -> Iterator[None]:
        """Add to what an output refuses with, in the middle of a run, what is kept and how to go on."""

        def kept() -> str:
            return f"{self.tally.before + self.tally.done} of {counted(total, 'tile')} done, which are kept"

        again = "run the same command again" + (" without overwrite" if self.overwrite else "")
        try:
            yield
        except OutputError as error:
            raise StoppedError(f"{error}; stopped with {kept()} as long as the output is: {again} to go on") from error
        except KeyboardInterrupt as stop:
            if self.tally.before + self.tally.done:
                stop.args = (f"{kept()}, {again} to go on",)
            raise

    def _compute(self, manifest: Manifest, tiles: Sequence[Tile], total: int) -> None:
        """Have the executor compute tiles."""
        self.tally.begin(total, total - len(tiles))
        if not tiles:
            return
        executor = self.executor or self._going_on(manifest, tiles)
        work = Work(self.problem, manifest, self.output, device_of(self.settings), self.settings.concurrent_puts)
        with self.report.tiles(total, total - len(tiles)) as report:
            self.tally.listeners.append(partial(_advance, report))
            executor.execute(work, tiles, self.tally, self.lease.check)
        if self.settings.verify:
            samples = reference_samples(manifest.microbatch)
            self.reference = executor.reference(self.problem, samples, self.report.say)
        if self.reference is None:
            self.joined.close()  # the proof is this process's own

    def _going_on(self, manifest: Manifest, tiles: Sequence[Tile]) -> Executor:
        """Choose an executor for what is left, as far as receipts tell what a tile takes."""
        begun = begun_tiles(self.output, manifest)[:RECEIPTS_READ]
        done = [receipt.compute_seconds for tile in begun if (receipt := own_receipt(self.output, manifest, tile))]
        seconds = len(tiles) * (sum(done) / len(done) if done else math.inf)
        settings = decided(self.settings, seconds, in_memory=self.output.is_memory)
        return executor_of(settings, self.joined)

    def _verify(self, hessian: Hessian) -> Verification:
        """Prove the result, and keep the proof beside it."""
        self.report.say("verifying")
        # Of the files of an earlier export, which this run may have made stale, `hessian verify` speaks.
        parquet = "parquet" in hessian.manifest.formats
        found = check(hessian, self.problem, parquet=parquet, reference=self.reference)
        self.output.put(VERIFY, json.dumps(found.to_json(), indent=1).encode())
        if not found.ok:
            raise VerificationError(
                f"output {self.output.url}: {found.summary()}. The matrix is kept, unproven (`hessian` of this error, "
                f"or open_hessian(url, unproven=True)); {REMEDY if found.faults else found.remedy}",
                hessian,
                found,
            )
        return found


def _advance(report: Reporter, event: str, fields: Mapping[str, Any]) -> None:
    """Tell of a tile that is done."""
    if event == TILE_DONE:
        report.advance(fields["bytes"])


def _described(made: JobPlan, executor: Executor) -> str:
    """Return a plan in one line."""
    manifest = made.manifest
    engines = ", ".join(
        f"engine {name} (micro-batch {sizes.microbatch}, row group {sizes.row_group})"
        for name, sizes in sorted(manifest.sizes.items())
    )
    left = made.left_out
    where = "in this process" if isinstance(executor, Serial) else counted(made.workers, "worker")
    unused = [p.name for p in manifest.layout if not made.at.gradient[p.place].any()]
    return (
        f"P = {made.tiling.size:,}, {made.tiling.side} x {made.tiling.side} chunks of {manifest.chunk}, "
        f"{counted(len(made.tiling.tiles()), 'tile')}, {engines}, {where}, "
        f"{made.time_text()}"
        + (f"; without effect on the loss: {', '.join(unused)}" if unused else "")
        + (f"; left out: {', '.join(left)}" if left else "")
    )
