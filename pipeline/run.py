"""A run: plan, tiles, proof. The same call starts one, goes on with one that was cut off, or finds it finished."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.audit import REMEDY, audit, listed_faults
from pipeline.checkpoint import load_checkpoint
from pipeline.contexts import unchanged
from pipeline.devices import device_of, worker_count
from pipeline.errors import OutputError, SpecError, StoppedError, VerificationError
from pipeline.executors import Executor, Serial, Work
from pipeline.factory import build_problem
from pipeline.handle import Hessian
from pipeline.identity import require_same, require_same_settings, save_weights
from pipeline.jobplan import JobPlan
from pipeline.lease import Lease
from pipeline.manifest import Manifest
from pipeline.memory import allowed_bytes
from pipeline.output import GRADIENT, GROUP, LEASE, MATRIX, RECEIPTS, SUCCESS, VERIFY, WEIGHTS, Output
from pipeline.placement import names_cluster
from pipeline.planner import make_plan
from pipeline.problem import Problem
from pipeline.profiles import Profile
from pipeline.progress import Reporter
from pipeline.receipts import begun_tiles, largest_first, missing_tiles, receipt_name
from pipeline.remote import endpoint_for, explained
from pipeline.spec import JobSpec, Settings, parse
from pipeline.store import MatrixStore
from pipeline.tally import Tally
from pipeline.tiling import Tile
from pipeline.verify import Verification, check

if TYPE_CHECKING:
    import torch

_OURS = (LEASE, WEIGHTS, GROUP, MATRIX, GRADIENT, RECEIPTS)  # what a run leaves that was cut off before its manifest


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


def compute_hessian(
    problem: Problem,
    output: str | None = None,
    *,
    params: Sequence[str] | None = None,
    blocks: Literal["all", "diagonal"] | Sequence[tuple[str, str]] = "all",
    engine: Literal["auto", "factored", "jacrev", "rows"] = "auto",
    dtype: "torch.dtype | str | None" = None,
    store_dtype: "torch.dtype | str | None" = None,
    symmetry: Literal["mirrored", "upper"] = "mirrored",
    codec: Literal["none", "lz4", "zstd"] = "lz4",
    formats: Sequence[Literal["zarr", "parquet"]] = ("zarr",),
    chunk: int | None = None,
    tile: tuple[int, int] | None = None,
    microbatch: int | None = None,
    row_group: int | None = None,
    executor: Literal["ray", "serial"] = "ray",
    workers: int | None = None,
    cpus_per_worker: int = 1,
    gpus_per_worker: float = 0.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resources: Mapping[str, float] | None = None,
    label_selector: Mapping[str, str] | None = None,
    address: str | None = None,
    memory: int | str | None = None,
    endpoint_url: str | None = None,
    concurrent_puts: int = 4,
    tile_deadline: float | None = None,
    verify: bool = True,
    check: bool = False,
) -> Hessian:
    """Compute the full, exact Hessian of a problem's loss: H = d2L / dtheta2, with L over all data as one batch.

    An output that is finished is opened; one that was cut off is completed, tile by tile.

    Args:
        problem: model, loss and data; left as it is.
        output: a path or an fsspec URL. None keeps the result in memory.
        params: globs of parameter names, `!glob` excludes; the problem's own selection when None.
        blocks: `"all"`, `"diagonal"`, or pairs of parameter names.
        engine: how tiles are computed; `"auto"` takes the fastest exact one for each parameter.
        dtype: computes in this type, a torch dtype or its name; the model's own when None.
        store_dtype: stores in this type; `dtype` when None.
        symmetry: stores the whole matrix, or the upper triangle of chunks.
        codec: compression of chunks.
        formats: `("zarr", "parquet")` stores Parquet files too, for readers that know tables; Zarr is always needed.
        chunk: side of a stored chunk; from P when None.
        tile: chunk rows and chunk columns of a tile; from engine and memory when None.
        microbatch: samples at a time; from memory when None.
        row_group: rows pulled back at a time, units of a layer for the factored engine; from memory when None.
        executor: Ray workers, or a plain loop in this process.
        workers: Ray workers; as many as there is room for when None.
        cpus_per_worker: CPUs, and torch threads, of a Ray worker.
        gpus_per_worker: a GPU, or the fraction of one, of a Ray worker.
        device: what engines run on; `"auto"` is `"cuda"` where workers have GPUs.
        resources: further resources of a Ray worker, as nodes name theirs, by amount.
        label_selector: labels of nodes for workers, as Ray selects: `{"ray.io/accelerator-type": "in(A100, H100)"}`.
        address: Ray cluster to join; RAY_ADDRESS or a local one when None.
        memory: bytes allowed to a worker, also as `"4GiB"`; its share of what is free when None.
        endpoint_url: server of the output's bucket, S3 or Google; the cloud's own, or the environment's, when None.
        concurrent_puts: chunks that a worker encodes and puts at a time.
        tile_deadline: seconds after which a worker that does not answer is replaced; from the median tile when None.
        verify: checks the finished matrix against plain double backward.
        check: reads back what is there already, finished or not, and computes again the tiles of which anything is
            missing or damaged.

    Returns:
        The Hessian.

    Raises:
        HessianError: the problem, the settings or the output cannot be used, or the result is not right; see
            `pipeline.errors` for its kinds.
    """
    values = {key: value for key, value in locals().items() if key not in {"problem", "output", "check"}}
    settings = parse(Settings, values, "compute_hessian")
    if not isinstance(problem, Problem):
        raise SpecError(f"compute_hessian: got {type(problem).__name__}, expected a pipeline.Problem")
    return run(problem, settings, output, check=check).hessian


def load_problem(spec: JobSpec, folder: Path) -> Problem:
    """Build the problem a job spec names, at its checkpoint's weights, with respect to the parameters it selects.

    Args:
        spec: the job.
        folder: where the spec lies.

    Returns:
        The problem.

    Raises:
        SpecError: `checkpoint_key` says where in a checkpoint, but there is none.
        HessianError: problem or checkpoint cannot be used.
    """
    if spec.checkpoint is None and spec.checkpoint_key is not None:
        raise SpecError(f"`checkpoint_key` got {spec.checkpoint_key!r} without a `checkpoint`: give its URL")
    problem = build_problem(spec.problem, spec.problem_args, folder).select(spec.params)
    if spec.checkpoint is None:
        return problem
    endpoint_url = endpoint_for(spec.checkpoint, spec.output, spec.endpoint_url)
    return load_checkpoint(problem, spec.checkpoint, spec.checkpoint_key, endpoint_url=endpoint_url)


def run_job(spec: JobSpec, folder: Path, report: Reporter, *, check: bool = False) -> Outcome:
    """Run a job spec.

    Args:
        spec: the job; its output must be set.
        folder: where the spec lies.
        report: told about progress.
        check: reads back what is there already.

    Returns:
        What was done.

    Raises:
        SpecError: no output is given.
    """
    if spec.output is None:
        raise SpecError("missing key `output`: say where the Hessian goes, in the spec or with --output")
    Output(spec.output, spec.endpoint_url).check_writable()
    report.say(f"building {spec.problem}")
    return run(load_problem(spec, folder), spec, spec.output, report=report, name=spec.problem, check=check)


def run(
    problem: Problem,
    settings: Settings,
    url: str | None,
    *,
    report: Reporter | None = None,
    name: str | None = None,
    check: bool = False,
) -> Outcome:
    """Run a problem; see `compute_hessian`.

    Args:
        problem: what to compute.
        settings: how.
        url: where to; None for memory.
        report: told about progress.
        name: of the factory that made the problem, None where the caller did.
        check: reads back what is there already.

    Returns:
        What was done.

    Raises:
        SpecError: Parquet is asked for without an output.
    """
    if url is None and "parquet" in settings.formats:
        raise SpecError("`formats` got parquet, but no reader can reach files in this process's memory: give an output")
    report = report or Reporter()
    problem = problem.select(settings.params)
    with unchanged(problem.model), _destination(url, settings) as output:
        outcome = _Run(problem, settings, output, report, name, check=check).outcome()
        return outcome if url is not None else _kept_in_memory(outcome, output)


def plan(spec: JobSpec, folder: Path, workers: int | None = None, profile: Profile | None = None) -> JobPlan:
    """Plan a job without running it, on the cluster where it names one; an output that is given is checked for room.

    Args:
        spec: the job.
        folder: where the spec lies.
        workers: how many, in place of the spec's; as many as a cluster has, whatever this machine is.
        profile: of the machines that they are on; None for ones like this.

    Returns:
        The plan.
    """
    elsewhere = workers is not None or profile is not None
    if elsewhere:
        memory = profile.memory_bytes if profile else allowed_bytes(None, worker_count(spec))
        changes = {"executor": "ray", "workers": workers or worker_count(spec), "memory": spec.memory or memory}
        spec = spec.model_copy(update=changes)
    problem = load_problem(spec, folder)
    if spec.executor == "ray" and names_cluster(spec) and not elsewhere:
        from pipeline.ray_executor import Cluster

        with Cluster(spec) as cluster:
            made = cluster.plan(problem, spec.problem)
    else:
        made = make_plan(problem, spec, spec.problem)
    if spec.output is not None:
        Output(spec.output, spec.endpoint_url).check_room(made.stored_bytes)
    return made


class _Run:
    """One call of a run."""

    def __init__(
        self, problem: Problem, settings: Settings, output: Output, report: Reporter, name: str | None, *, check: bool
    ) -> None:
        self.problem, self.settings, self.output, self.report, self.name = problem, settings, output, report, name
        self.check, self.tally = check, Tally()
        self.lease = Lease(output, self.tally.to_json)
        self.joined = ExitStack()

    def outcome(self) -> Outcome:
        """Do it, while no other driver does."""
        self.output.check_writable()
        manifest = Manifest.read(self.output)
        if manifest and not self.check and self._is_finished() and not self._resume(manifest):
            return self._nothing_to_do(manifest)
        with self.lease, self.joined:
            return self._outcome()

    @cached_property
    def executor(self) -> Executor:
        """Where to plan and compute; a finished output needs neither, and starts no Ray."""
        if self.settings.executor == "serial":
            return Serial(self.settings)
        from pipeline.ray_executor import Cluster

        return self.joined.enter_context(Cluster(self.settings))

    def _outcome(self) -> Outcome:
        """Plan or resume, compute what is missing, verify, and mark as finished."""
        start = time.monotonic()
        manifest = Manifest.read(self.output)
        tiles = self._start() if manifest is None else self._resume(manifest)
        manifest = manifest or Manifest.read(self.output)
        if manifest is None:
            raise OutputError(f"output {self.output.url}: the manifest that was just written cannot be read back")
        total = len(manifest.plan.tiles())
        if not tiles and self._is_finished():
            return self._nothing_to_do(manifest)
        self.output.delete(SUCCESS)
        planned = time.monotonic()
        with self._resumable(total):
            self._compute(manifest, tiles, total)
            computed = time.monotonic()
            hessian = Hessian(self.output, manifest)
            verification = self._verify(hessian) if self.settings.verify else None
            verified = time.monotonic()
            self.output.put(SUCCESS, json.dumps({"tiles": total, "verified": verification is not None}).encode())
        return Outcome(
            hessian,
            len(tiles),
            total,
            verification,
            planned - start,
            computed - planned,
            verified - computed,
            dict(self.tally.lost),
        )

    def _nothing_to_do(self, manifest: Manifest) -> Outcome:
        self.report.say(f"{self.output.url} is finished already: nothing to do")
        return Outcome(Hessian(self.output, manifest), 0, len(manifest.plan.tiles()), None)

    def _is_finished(self) -> bool:
        """Say whether an earlier run went to its end, its proof included where one is asked for."""
        try:
            proven = json.loads(self.output.get(VERIFY) or b"")["ok"] is True
        except (ValueError, LookupError, TypeError):
            proven = False
        return self.output.get(SUCCESS) is not None and (proven or not self.settings.verify)

    def _start(self) -> list[Tile]:
        """Plan, and set the output up; the manifest comes last, so that there is one only of a complete set-up."""
        foreign = sorted({name.split("/")[0] for name in self.output.sizes()} - set(_OURS))
        if foreign:
            raise OutputError(f"output {self.output.url}: holds something else ({foreign[0]}); take an empty place")
        self.report.say("planning: preflight and probe")
        made = self.executor.plan(self.problem, self.name, self.lease.check)
        self.output.check_room(made.stored_bytes)
        self.report.say(describe(made))
        save_weights(self.problem, self.output)
        with explained(self.output.url, "cannot be set up"):
            MatrixStore.create(self.output, made.manifest, made.at.gradient)
        made.manifest.write(self.output)
        return made.dearest_first()

    def _resume(self, manifest: Manifest) -> list[Tile]:
        """Check that the output is of this problem, and find the tiles that are missing."""
        require_same_settings(self.settings, self.problem, manifest, self.output)
        self.problem = require_same(self.problem, manifest, self.output, retrained=self.name is not None)
        MatrixStore(self.output, manifest)  # refuses an output without one
        missing = missing_tiles(self.output, manifest)
        if self.check:
            damaged = self._damaged(manifest)
            missing = largest_first(manifest, damaged + [tile for tile in missing if tile not in damaged])
        if missing or self.output.get(SUCCESS) is None:
            total = len(manifest.plan.tiles())
            self.report.say(f"{self.output.url}: {total - len(missing)} of {total} tiles are there, going on")
        return missing

    def _damaged(self, manifest: Manifest) -> list[Tile]:
        """Read back what is there, say what is at fault, and give its tiles."""
        begun = begun_tiles(self.output, manifest)
        self.report.say(f"reading back {len(begun)} tiles")
        found = [audited for audited in audit(self.output, manifest, begun) if audited.faults]
        for line in listed_faults(found):
            self.report.say(line)
        for audited in found:  # or else a run that is cut off before it mends them would leave them for finished
            self.output.delete(receipt_name(audited.tile.id))
        return [audited.tile for audited in found]

    @contextmanager
    def _resumable(self, total: int) -> Iterator[None]:
        """Add to what an output refuses with, in the middle of a run, what is kept and how to go on."""
        try:
            yield
        except OutputError as error:
            raise StoppedError(
                f"{error}; stopped with {self.tally.before + self.tally.done} of {total} tiles done, which are kept as "
                "long as the output is: run the same command again to go on"
            ) from error

    def _compute(self, manifest: Manifest, tiles: Sequence[Tile], total: int) -> None:
        """Have the executor compute tiles."""
        self.tally.begin(total, total - len(tiles))
        if not tiles:
            return
        work = Work(self.problem, manifest, self.output, device_of(self.settings), self.settings.concurrent_puts)
        with (
            self.report.tiles(total, total - len(tiles)) as report,
            closing(self.executor.execute(work, tiles, self.tally, self.lease.check)) as receipts,
        ):
            for receipt in receipts:
                report.advance(receipt.bytes)
        self.joined.close()  # the proof is this process's own

    def _verify(self, hessian: Hessian) -> Verification:
        """Prove the result, and keep the proof beside it."""
        self.report.say("verifying")
        # Of the files of an earlier export, which this run may have made stale, `hessian verify` speaks.
        found = check(hessian, self.problem, parquet="parquet" in hessian.manifest.formats)
        self.output.put(VERIFY, json.dumps(found.to_json(), indent=1).encode())
        if not found.ok:
            remedy = f"; {REMEDY}" if found.faults else ""
            raise VerificationError(f"output {self.output.url}: {found.summary()}{remedy}")
        return found


def describe(made: JobPlan) -> str:
    """Say a plan in one line."""
    manifest = made.manifest
    engines = ", ".join(
        f"engine {name} (micro-batch {sizes.microbatch}, row group {sizes.row_group})"
        for name, sizes in sorted(manifest.sizes.items())
    )
    left = made.left_out
    unused = [p.name for p in manifest.layout if not made.at.gradient[p.place].any()]
    return (
        f"P = {made.tiling.size:,}, {made.tiling.side} x {made.tiling.side} chunks of {manifest.chunk}, "
        f"{len(made.tiling.tiles())} tiles, {engines}, {made.workers} workers, "
        f"predicted {made.makespan_seconds():.1f} s"
        + (f"; without effect on the loss: {', '.join(unused)}" if unused else "")
        + (f"; left out: {', '.join(left)}" if left else "")
    )


@contextmanager
def _destination(url: str | None, settings: Settings) -> Iterator[Output]:
    """Give the output; for a result kept in memory, a place that the executor's workers can reach."""
    if url is not None:
        output = Output(url, settings.endpoint_url)
        if output.is_memory and settings.executor == "ray":
            raise OutputError(
                f"output {url}: lies in this process, where Ray workers cannot write; use executor=serial"
            )
        yield output
    elif settings.executor == "serial":
        yield Output.private()
    else:
        with tempfile.TemporaryDirectory(prefix="hessian-") as folder:
            yield Output(folder)


def _kept_in_memory(outcome: Outcome, output: Output) -> Outcome:
    """Move a result into this process's memory."""
    memory = output
    if not output.is_memory:
        memory = Output.private()
        memory.check_room(outcome.hessian.manifest.matrix_bytes)
        for name in output.sizes():
            memory.put(name, output.get(name) or b"")
    return replace(outcome, hessian=Hessian(memory, outcome.hessian.manifest))
