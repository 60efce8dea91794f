"""From a problem and settings to a frozen plan: everything is decided, measured and refused here, before the run."""

import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np
import torch

from pipeline.engines.cost import PROBE_SAMPLES, Segment, torch_threads
from pipeline.engines.registry import Part, add_batch, applications
from pipeline.engines.stages import Application
from pipeline.errors import BlockError, SpecError
from pipeline.planning.costs import AroundTiles, Finishing, Measured
from pipeline.planning.engine_traits import TRAITS, candidates
from pipeline.planning.evaluation import LossAndGradient
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.machine_profiles import CPU_START_SECONDS, GPU_START_SECONDS
from pipeline.planning.manifest import Fingerprint, Manifest
from pipeline.planning.memory import (
    FLOAT_BYTES,
    SCRATCH,
    WorkerMemory,
    allowed_bytes,
    engine_budget_bytes,
    leaving_bytes,
    writer_bytes,
)
from pipeline.planning.placement import Staff
from pipeline.planning.tile_shapes import choose_tiling
from pipeline.planning.tiling import MAX_CHUNK, Tile, TilingPlan, plan_tiles
from pipeline.planning.verdict import EngineSizes, PreflightVerdict
from pipeline.preflight.call_timing import rivals, seconds_of, time_calls
from pipeline.preflight.checks import preflight
from pipeline.preflight.contest import take_faster
from pipeline.preflight.devices import (
    allowed_device_bytes,
    device_name,
    local_staff,
    require_device,
)
from pipeline.preflight.engine_sizes import Probed, choose_sizes
from pipeline.preflight.proof_timing import proof_seconds
from pipeline.preflight.remembered import Measurements, kind, recall, remember
from pipeline.problem.contexts import exact_kernels, is_deterministic, ordered_sums, unchanged
from pipeline.problem.double_backward import (
    evaluate,
    reference_samples,
)
from pipeline.problem.problem import PlacedProblem, Problem
from pipeline.spec import Settings, device_of
from pipeline.storage.chunk_formats import store_chunk
from pipeline.storage.output import Output
from pipeline.storage.zarr_store import MatrixStore

FEW_SAMPLES = 8  # from which a chunk is computed that is like those of the run,
CHUNK_SECONDS = 0.25  # in about that time: where it takes longer, from fewer rows


def fingerprint(problem: Problem, at: LossAndGradient) -> Fingerprint:
    """Identify a problem by its weights, its data and what it evaluates to."""
    return Fingerprint(
        weights=problem.weights_digest(),
        data=problem.data_digest(),
        samples=problem.sample_count,
        loss=at.loss,
        weight=at.weight,
        reduction=problem.reduction,
        separable=problem.separable,
        l2=problem.l2,
        checkpoint=problem.checkpoint,
    )


def make_plan(
    problem: Problem,
    settings: Settings,
    name: str | None = None,
    staff: Staff | None = None,
    before: JobPlan | None = None,
) -> JobPlan:
    """Decide everything about a run, on a machine and a device like those that will compute it.

    Args:
        problem: with its parameters selected.
        settings: how to compute.
        name: of the problem, for the manifest.
        staff: the workers; this machine's CPUs and GPUs shared out when None.
        before: a plan of the same run for other workers on this machine: what it found of the problem holds.

    Returns:
        The plan.

    Raises:
        ProblemError: the problem has no well-defined Hessian, or no engine gets it right.
        BlockError: `blocks` names an unknown parameter.
        SpecError: settings contradict each other or this machine.
        MemoryRefusedError: a worker would need more memory than is allowed.
    """
    require_entries(problem, settings)
    require_device(device_of(settings))
    with ordered_sums(deterministic=is_deterministic(asked=settings.deterministic)):
        return _Planning(problem, settings, staff or local_staff(settings), before).plan(name)


def require_entries(problem: Problem, settings: Settings) -> None:
    """Refuse blocks without an entry."""
    if not plan_tiles(problem.layout, settings.blocks, settings.chunk or MAX_CHUNK, (1, 1)).selected.any():
        raise BlockError(
            f"`blocks` got {settings.blocks!r}, which holds no entry: give pairs of parameters with entries"
        )


class _Planning:
    """A plan in the making: engines are chosen, the matrix is cut, sizes are measured, seconds predicted.

    Args:
        problem: with its parameters selected.
        settings: how to compute.
        staff: the workers.
        before: see `make_plan`.
    """

    def __init__(self, problem: Problem, settings: Settings, staff: Staff, before: JobPlan | None) -> None:
        self.begun = time.monotonic() - (before.around.planning if before else 0.0)
        self.problem, self.settings, self.staff, self.layout = problem, settings, staff, problem.layout
        self.device = device_of(settings)
        self.dtype: torch.dtype = getattr(torch, settings.dtype) if settings.dtype else problem.dtype
        if self.dtype != torch.float32 and settings.engine != "auto" and TRAITS[settings.engine].on_tensor_cores:
            raise SpecError(f"`engine` got {settings.engine}, which computes in float32: set dtype=float32 too")
        self.allowed = allowed_bytes(settings.memory, staff.beside)
        self.on_gpu = allowed_device_bytes(settings)
        threads = settings.cpus_per_worker if settings.executor == "ray" else None
        self.as_workers = partial(torch_threads, threads)
        self.verdict, self.at = self._judged() if before is None else (before.manifest.preflight, before.at)
        self.placed = problem.place(self.dtype, self.device)
        with self.as_workers(), exact_kernels(problem.model), unchanged(*problem.modules):
            self.known = applications(self.placed, PROBE_SAMPLES)
            self.kind = self._kind()
            self.before = recall(self.kind, self.verdict)
            if self.before is not None:
                self.verdict = self.verdict.led_by(self.before.engines)
            elif before is None:
                self.verdict = take_faster(self.placed, self.verdict, self.known)

    def _judged(self) -> tuple[PreflightVerdict, LossAndGradient]:
        """Check the problem, and evaluate it."""
        samples = reference_samples(self.settings.microbatch)
        verdict = preflight(self.problem, candidates(self.settings.engine), self.dtype, self.device, samples)
        return verdict, evaluate(self.problem, samples)

    def _kind(self) -> str:
        """Identify runs that measure the same: each engine is one of the same two that are right."""
        right = {name: sorted({v.engine, v.rival or v.engine}) for name, v in self.verdict.parameters.items()}
        return kind(self.problem, self.settings, self.staff, self.dtype, self._place(), versions(), right)

    def _place(self) -> str:
        return f"{platform.node()}, {device_name(self.device)}"

    def plan(self, name: str | None) -> JobPlan:
        """Cut, size, time and freeze; see `make_plan`."""
        tiling = self._cut()
        tiles = tiling.tiles()
        held = self._held(tiling, tiles)
        segments = _segments(tiling, tiles, self.problem, self.verdict.engines, self.known)
        found = self.before
        if found is None or not self._has_all(found, held, segments):
            found = self._measured(tiling, held, segments, name)
            remember(self.kind, found)
        manifest = self._manifest(tiling, found.sizes, name)
        selected = set(self.layout.names)
        return JobPlan(
            manifest=manifest,
            at=self.at,
            memory=replace(held, engine_bytes=found.engine_bytes),
            allowed_bytes=self.allowed,
            allowed_device_bytes=self.on_gpu,
            workers=self.staff.workers,
            costs=found.costs,
            timings=found.timings,
            finishing=found.finishing,
            around=self._around(found.proof_seconds),
            symmetric=frozenset(segment.parameter.name for segment in segments if segment.is_symmetric),
            device=self.placed.device.type,
            left_out=tuple(each for each, _ in self.problem.model.named_parameters() if each not in selected),
            place=self._place() + (", earlier (`hessian cache --clear` forgets it)" if found is self.before else ""),
        )

    def _has_all(self, found: Measurements, held: WorkerMemory, segments: Sequence[Segment]) -> bool:
        """Whether what was measured before tells of all rows, and there is room for it now."""
        fits = replace(held, engine_bytes=found.engine_bytes).fits(self.allowed, self.on_gpu)
        return fits and {segment.parameter.name for segment in segments} <= found.costs.keys()

    def _measured(
        self, tiling: TilingPlan, held: WorkerMemory, segments: Sequence[Segment], name: str | None
    ) -> Measurements:
        """Choose sizes, and time engines, what comes after them, and the proof."""
        probed = self._sizes(held, segments)
        manifest = self._manifest(tiling, probed.sizes, name)
        spans = sorted({tiling.span(tile.cols) for tile in tiling.tiles()}, key=lambda span: span.start)
        measure = partial(time_calls, self.placed, segments, probed.sizes, probed.costs, spans)
        beside, proof = _beside(self.settings, self.staff), 0.0
        with self.as_workers(), unchanged(*self.problem.modules), rivals(beside, measure):
            timings = measure()
            finishing = _finishing(manifest, self.placed, self.at, probed.costs)
        if self.settings.verify:
            exact = self.problem.place(torch.float64, self.device)
            with unchanged(*self.problem.modules):
                proof = proof_seconds(exact, manifest, finishing.chunk_seconds)
        sizes, costs, peak = probed.sizes, probed.costs, probed.engine_bytes
        return Measurements(self.verdict.engines, sizes, costs, peak, timings, finishing, proof)

    def _around(self, proof: float) -> AroundTiles:
        """Predict what comes before the tiles and after them."""
        start = 0.0
        if self.settings.executor == "ray":
            start = GPU_START_SECONDS if self.device == "cuda" else CPU_START_SECONDS
        return AroundTiles(time.monotonic() - self.begun, start, proof)

    def _cut(self) -> TilingPlan:
        """Choose chunks and tiles."""
        most = None if self.on_gpu is None else max(self.on_gpu - self.placed.byte_count, 0)
        itemsize, workers = self.dtype.itemsize, self.staff.workers
        return choose_tiling(self.layout, self.verdict.engines, self.settings, itemsize, self.allowed, workers, most)

    def _held(self, tiling: TilingPlan, tiles: Sequence[Tile]) -> WorkerMemory:
        """Project what a worker holds besides what its engine does, and require that it may."""
        largest = max(tiles, key=lambda t: tiling.shape(t)[0] * tiling.shape(t)[1])
        rows, cols = tiling.shape(largest)
        stored = FLOAT_BYTES[self.settings.store_dtype] if self.settings.store_dtype else self.dtype.itemsize
        held = WorkerMemory(
            self.problem.byte_count if self.on_gpu is None else self.placed.byte_count,
            rows * cols * self.dtype.itemsize,
            writer_bytes(self.settings.concurrent_puts * tiling.chunk**2 * self.dtype.itemsize, self.settings.formats),
            0,
            f"{largest.id} ({rows} x {cols})",
            self.on_gpu is not None,
            0 if self.on_gpu is None else leaving_bytes(rows * cols, stored, self.settings.symmetry),
        )
        held.require(self.allowed, self.on_gpu)
        return held

    def _sizes(self, held: WorkerMemory, segments: Sequence[Segment]) -> Probed:
        """Choose micro-batches and row groups that fit beside what a worker holds."""
        free = engine_budget_bytes(self.allowed - held.total_bytes)
        budget = free if self.on_gpu is None else int((self.on_gpu - held.device_bytes) / SCRATCH)
        with self.as_workers(), unchanged(*self.problem.modules):
            probed = choose_sizes(self.placed, segments, budget, self.settings.microbatch, self.settings.row_group)
        replace(held, engine_bytes=probed.engine_bytes).require(self.allowed, self.on_gpu)
        return probed

    def _manifest(self, tiling: TilingPlan, sizes: Mapping[str, EngineSizes], name: str | None) -> Manifest:
        """Freeze what makes two runs the same."""
        settings, type_name = self.settings, str(self.dtype).removeprefix("torch.")
        return Manifest.model_validate(
            {
                "parameters": self.layout.to_json(),
                "fingerprint": fingerprint(self.problem, self.at),
                "blocks": settings.blocks,
                "dtype": type_name,
                "store_dtype": settings.store_dtype or type_name,
                "symmetry": settings.symmetry,
                "codec": settings.codec,
                "formats": settings.formats,
                "chunk": tiling.chunk,
                "tile_shape": tiling.tile_shape,
                "sizes": sizes,
                "preflight": self.verdict,
                "problem": name,
                "versions": versions(),
                "deterministic": is_deterministic(asked=settings.deterministic),
            }
        )


def _beside(settings: Settings, staff: Staff) -> int:
    """Count the workers that are at work on the same machine as any one, where they share its CPUs."""
    if settings.executor == "serial" or device_of(settings) != "cpu":
        return 0
    return min(staff.beside, len(os.sched_getaffinity(0)) // settings.cpus_per_worker) - 1


def _finishing(
    manifest: Manifest, placed: PlacedProblem, at: LossAndGradient, costs: Mapping[str, Measured]
) -> Finishing:
    """Compute a chunk from a few samples, and time what a worker does with it."""
    tiling = manifest.plan
    tile = tiling.tiles()[len(tiling.tiles()) // 2]
    i, j = tiling.chunks(tile)[-1]
    rows, cols = (tiling.span(range(k, k + 1)) for k in (i, j))
    out = torch.zeros(len(rows), len(cols), dtype=placed.dtype, device=placed.device)
    batch = next(placed.batches(FEW_SAMPLES))
    with exact_kernels(placed.problem.model):
        for p, segment in manifest.layout.segments(rows):
            right = range(max(cols.start, segment.start), cols.stop)
            if right:
                engine = manifest.engines[p.name]
                part = out[segment.start - rows.start : segment.stop - rows.start, right.start - cols.start :]
                affordable = CHUNK_SECONDS * len(segment) / len(rows) / (FEW_SAMPLES * costs[p.name].seconds_per_row)
                some = segment[: max(1, int(affordable))]
                add_batch(
                    engine, placed, manifest.sizes[engine].row_group, batch, [Part(some, right, part[: len(some)])]
                )
                _fill(part, len(some))
    with np.errstate(over="ignore"):  # what the stored type cannot hold is refused with its name, by a worker
        values = out.cpu().numpy().astype(manifest.store_dtype)
    with tempfile.TemporaryDirectory(prefix="hessian-") as folder:
        MatrixStore.create(Output(folder), manifest, at.gradient)
        put = partial(store_chunk, [MatrixStore(Output(folder), manifest)], manifest, i, j, values)
        # On a thread, as a worker does: on the main one Blosc takes all CPUs.
        with ThreadPoolExecutor(1) as putter:
            writing = seconds_of(lambda: putter.submit(put).result())
    passes = seconds_of(lambda: bool(out.zero_().div_(2).sum().isfinite()))
    return Finishing(passes / out.numel(), writing / len(manifest.images(i, j)))


def _fill(part: torch.Tensor, computed: int) -> None:
    """Fill rows with those that were computed, each times a number of its own: to a codec they are as new."""
    if more := len(part) - computed:
        own = torch.linspace(0.5, 1.5, more, dtype=part.dtype, device=part.device)
        part[computed:] = part[torch.arange(more, device=part.device) % computed] * own[:, None]


def versions() -> dict[str, str]:
    """Return the versions that numbers may depend on."""
    names = ("hessian-pipeline", "torch", "zarr", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _segments(
    tiling: TilingPlan,
    tiles: Sequence[Tile],
    problem: Problem,
    engines: dict[str, str],
    known: dict[str, Application],
) -> list[Segment]:
    """Return, for each row parameter, the columns of the widest tile it is computed in."""
    widest: dict[str, Segment] = {}
    for tile in tiles:
        cols = tiling.span(tile.cols)
        for p, rows in problem.layout.segments(tiling.span(tile.rows)):
            right = range(max(cols.start, rows.start), cols.stop)
            if right and (p.name not in widest or len(right) > len(widest[p.name].cols)):
                widest[p.name] = Segment.of(p, right, engines[p.name], known)
    return list(widest.values())
