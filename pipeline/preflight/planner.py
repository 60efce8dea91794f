"""From a problem and settings to a frozen plan: everything is decided, measured and refused here, before the run."""

import os
import platform
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import torch

from pipeline.engines.cost import PROBE_SAMPLES, Segment, torch_threads
from pipeline.engines.registry import ENGINES, add_batch, applications
from pipeline.engines.stages import Application
from pipeline.errors import BlockError
from pipeline.planning.costs import Finishing
from pipeline.planning.evaluation import LossAndGradient
from pipeline.planning.job_plan import (
    JobPlan,
)
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
from pipeline.preflight.call_timing import rivals, seconds_of, time_calls
from pipeline.preflight.checks import preflight
from pipeline.preflight.devices import (
    allowed_device_bytes,
    device_name,
    local_staff,
    require_device,
)
from pipeline.preflight.engine_sizes import choose_sizes
from pipeline.preflight.engine_trial import take_faster
from pipeline.problem.contexts import exact_kernels, is_deterministic, ordered_sums, unchanged
from pipeline.problem.double_backward import (
    evaluate,
    reference_samples,
)
from pipeline.problem.problem import PlacedProblem, Problem
from pipeline.spec import Settings, device_of
from pipeline.storage.output import Output
from pipeline.storage.zarr_store import MatrixStore

FEW_SAMPLES = 64  # from which a chunk is computed that is like those of the run


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


def make_plan(problem: Problem, settings: Settings, name: str | None = None, staff: Staff | None = None) -> JobPlan:
    """Decide everything about a run, on a machine and a device like those that will compute it.

    Args:
        problem: with its parameters selected.
        settings: how to compute.
        name: of the problem, for the manifest.
        staff: the workers; this machine's CPUs and GPUs shared out when None.

    Returns:
        The plan.

    Raises:
        ProblemError: the problem has no well-defined Hessian, or no engine gets it right.
        BlockError: `blocks` names an unknown parameter.
        SpecError: settings contradict each other or this machine.
        MemoryRefusedError: a worker would need more memory than is allowed.
    """
    with ordered_sums(deterministic=is_deterministic(asked=settings.deterministic)):
        return _make_plan(problem, settings, name, staff)


def _make_plan(problem: Problem, settings: Settings, name: str | None, staff: Staff | None) -> JobPlan:
    layout = problem.layout
    if not plan_tiles(layout, settings.blocks, settings.chunk or MAX_CHUNK, (1, 1)).selected.any():
        raise BlockError(
            f"`blocks` got {settings.blocks!r}, which holds no entry: give pairs of parameters with entries"
        )
    dtype: torch.dtype = getattr(torch, settings.dtype) if settings.dtype else problem.dtype
    candidates = list(ENGINES) if settings.engine == "auto" else [settings.engine]
    device = device_of(settings)
    require_device(device)
    staff = staff or local_staff(settings)
    samples = reference_samples(settings.microbatch)
    verdict = preflight(problem, candidates, dtype, device, samples)
    at = evaluate(problem, samples)

    allowed, on_gpu = allowed_bytes(settings.memory, staff.beside), allowed_device_bytes(settings)
    threads = settings.cpus_per_worker if settings.executor == "ray" else None
    placed = problem.place(dtype, device)
    with torch_threads(threads), exact_kernels(problem.model), unchanged(problem.model):
        known = applications(placed, PROBE_SAMPLES)
        verdict = take_faster(placed, verdict, known)
    most = None if on_gpu is None else max(on_gpu - placed.byte_count, 0)
    tiling = choose_tiling(layout, verdict.engines, settings, dtype.itemsize, allowed, staff.workers, most)
    chunk, tile_shape = tiling.chunk, tiling.tile_shape
    writer = writer_bytes(settings.concurrent_puts * chunk**2 * dtype.itemsize, settings.formats)
    tiles = tiling.tiles()
    largest = max(tiles, key=lambda t: tiling.shape(t)[0] * tiling.shape(t)[1])
    rows, cols = tiling.shape(largest)
    stored = FLOAT_BYTES[settings.store_dtype] if settings.store_dtype else dtype.itemsize
    held = WorkerMemory(
        problem.byte_count if on_gpu is None else placed.byte_count,
        rows * cols * dtype.itemsize,
        writer,
        0,
        f"{largest.id} ({rows} x {cols})",
        on_gpu is not None,
        0 if on_gpu is None else leaving_bytes(rows * cols, stored, settings.symmetry),
    )
    held.require(allowed, on_gpu)
    free = engine_budget_bytes(allowed - held.total_bytes)
    budget = free if on_gpu is None else int((on_gpu - held.device_bytes) / SCRATCH)

    segments = _segments(tiling, tiles, problem, verdict.engines, known)
    with torch_threads(threads), unchanged(problem.model):
        probed = choose_sizes(
            placed,
            segments,
            budget,
            settings.microbatch,
            settings.row_group,
        )
    memory = replace(held, engine_bytes=probed.engine_bytes)
    memory.require(allowed, on_gpu)
    type_name = str(dtype).removeprefix("torch.")
    manifest = Manifest.model_validate(
        {
            "parameters": layout.to_json(),
            "fingerprint": fingerprint(problem, at),
            "blocks": settings.blocks,
            "dtype": type_name,
            "store_dtype": settings.store_dtype or type_name,
            "symmetry": settings.symmetry,
            "codec": settings.codec,
            "formats": settings.formats,
            "chunk": chunk,
            "tile_shape": tile_shape,
            "sizes": probed.sizes,
            "preflight": verdict,
            "problem": name,
            "versions": versions(),
            "deterministic": is_deterministic(asked=settings.deterministic),
        }
    )
    left_out = tuple(name for name, _ in problem.model.named_parameters() if name not in set(layout.names))
    spans = sorted({tiling.span(tile.cols) for tile in tiles}, key=lambda span: span.start)
    measure = partial(time_calls, placed, segments, probed.sizes, probed.costs, spans)
    beside = _beside(settings, staff)
    with torch_threads(threads), unchanged(problem.model), rivals(beside, measure):
        timings = measure()
        finishing = _finishing(manifest, tiling, placed, at)
    symmetric = frozenset(segment.parameter.name for segment in segments if segment.is_symmetric)
    place = f"{platform.node()}, {device_name(device)}"
    return JobPlan(
        manifest, tiling, at, memory, allowed, on_gpu, staff.workers, probed.costs, timings, finishing, symmetric,
        placed.device.type, left_out, place,
    )  # fmt: skip


def _beside(settings: Settings, staff: Staff) -> int:
    """Count the workers that are at work on the same machine as any one, where they share its CPUs."""
    if settings.executor == "serial" or device_of(settings) != "cpu":
        return 0
    return min(staff.beside, len(os.sched_getaffinity(0)) // settings.cpus_per_worker) - 1


def _finishing(manifest: Manifest, tiling: TilingPlan, placed: PlacedProblem, at: LossAndGradient) -> Finishing:
    """Compute a chunk from a few samples, and time what a worker does with it."""
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
                add_batch(engine, placed, manifest.sizes[engine].row_group, batch, segment, right, part)
    values = out.cpu().numpy().astype(manifest.store_dtype)
    with tempfile.TemporaryDirectory(prefix="hessian-") as folder:
        MatrixStore.create(Output(folder), manifest, at.gradient)
        put = partial(MatrixStore(Output(folder), manifest).write_chunk, i, j, values)
        # On a thread, as a worker does: on the main one Blosc takes all CPUs.
        with ThreadPoolExecutor(1) as putter:
            writing = seconds_of(lambda: putter.submit(put).result())
    passes = seconds_of(lambda: bool(out.zero_().div_(2).sum().isfinite()))
    objects = 2 if manifest.symmetry == "mirrored" and i != j else 1
    return Finishing(passes / out.numel(), writing / objects)


def versions() -> dict[str, str]:
    """Give the versions that numbers may depend on."""
    names = ("hessian-pipeline", "torch", "zarr", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _segments(
    tiling: TilingPlan,
    tiles: Sequence[Tile],
    problem: Problem,
    engines: dict[str, str],
    known: dict[str, Application],
) -> list[Segment]:
    """Give, for each row parameter, the columns of the widest tile it is computed in."""
    widest: dict[str, Segment] = {}
    for tile in tiles:
        cols = tiling.span(tile.cols)
        for p, rows in problem.layout.segments(tiling.span(tile.rows)):
            right = range(max(cols.start, rows.start), cols.stop)
            if right and (p.name not in widest or len(right) > len(widest[p.name].cols)):
                widest[p.name] = Segment.of(p, right, engines[p.name], known)
    return list(widest.values())
