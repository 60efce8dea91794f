"""From a problem and settings to a frozen plan: everything is decided, measured and refused here, before the run."""

import heapq
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version

import numpy as np
import torch

from pipeline.contest import take_faster
from pipeline.contexts import exact_kernels, unchanged
from pipeline.data import microbatches
from pipeline.engines import ENGINES, add_batch, applications
from pipeline.engines.stages import Application
from pipeline.errors import BlockError, SpecError
from pipeline.layout import ParameterLayout
from pipeline.manifest import Fingerprint, Manifest
from pipeline.memory import (
    BUFFERED_TILES,
    PROCESS_BYTES,
    WorkerMemory,
    allowed_bytes,
    engine_budget_bytes,
    writer_bytes,
)
from pipeline.output import Output
from pipeline.parquet import require_room_in_lists
from pipeline.preflight import preflight
from pipeline.probe import (
    PROBE_SAMPLES,
    Measured,
    Segment,
    Timing,
    choose_sizes,
    rivals,
    seconds_of,
    time_calls,
    torch_threads,
    work,
)
from pipeline.problem import PlacedProblem, Problem
from pipeline.profiles import TileCost
from pipeline.reference import LossAndGradient, loss_and_gradient
from pipeline.spec import Settings
from pipeline.store import MatrixStore
from pipeline.tiling import MAX_CHUNK, Tile, TilingPlan, default_chunk, plan_tiles

REFERENCE_MICROBATCH = 1024  # samples at a time of the float64 loss and gradient
TILES_SHARE = 0.5  # of the memory allowed, for tile buffers
TILES_PER_WORKER = 4  # at least: the last ones are shared out well, and one that is lost costs little
MANY_WORKERS = 8  # from which on a few tiles each leave too many idle at the end:
TILES_OF_MANY = 24  # each then, as long as tiles have enough units
UNITS_A_SIDE = 14  # of a factored tile, even if there are fewer tiles: with 6, of 784 inputs, products ran at a third
FEW_SAMPLES = 64  # from which a chunk is computed that is like those of the run
LONE_TILE_BYTES = 2**28  # of a tile, where one worker has all of them


@dataclass(frozen=True)
class Finishing:
    """Seconds of what comes after the engines: for each entry of a tile, and for each object that is put."""

    entry_seconds: float
    chunk_seconds: float


@dataclass(frozen=True)
class JobPlan:
    """A run, decided.

    Attributes:
        manifest: its identity.
        tiling: its tiles.
        at: loss and gradient in float64.
        memory: projected, of the worst tile's worker.
        allowed_bytes: for one worker.
        workers: how many.
        costs: measured, by row parameter.
        timings: of calls as the run makes them, for the row parameters that take most of it.
        finishing: seconds of what comes after the engines.
        symmetric: parameters within which half of the entries are computed.
        device: that it was measured on.
        left_out: parameters of the model that are frozen or not selected.
    """

    manifest: Manifest
    tiling: TilingPlan
    at: LossAndGradient
    memory: WorkerMemory
    allowed_bytes: int
    workers: int
    costs: dict[str, Measured]
    timings: dict[str, Timing]
    finishing: Finishing
    symmetric: frozenset[str]
    device: str
    left_out: tuple[str, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunks in all formats, before compression."""
        return len(self.manifest.formats) * self.manifest.matrix_bytes

    @property
    def overlaps(self) -> bool:
        """Whether writing costs no computing: not so where a worker's CPU does both."""
        return self.device != "cpu"

    def tile_seconds(self, tile: Tile) -> float:
        """Predict the seconds of a tile on one worker, of computing and writing."""
        cost = self.tile_cost(tile)
        both = cost.compute_seconds, cost.write_seconds
        return max(both) if self.overlaps else sum(both)

    def tile_cost(self, tile: Tile) -> TileCost:
        """Predict what a tile costs on one worker."""
        cols, samples = self.tiling.span(tile.cols), self.manifest.fingerprint.samples
        seconds, flops = math.prod(self.tiling.shape(tile)) * self.finishing.entry_seconds, 0.0
        before = None
        for p, rows in self.manifest.layout.segments(self.tiling.span(tile.rows)):
            engine, cost = self._engines[p.name], self.costs[p.name]
            amount = work(engine, rows, cols, p.span if p.name in self.symmetric else range(0))
            flops += amount * samples * cost.flops_per_work
            if timing := self.timings.get(p.name):
                calls = 0 if timing is before or not amount else 1  # a bias goes with its weight
                batches = samples / self.manifest.sizes[engine].microbatch
                seconds += batches * (calls * timing.call_seconds + amount * timing.work_seconds)
                before = timing
            else:
                seconds += amount * samples * cost.seconds_per_work
        chunks = sum(1 if i == j else self._copies for i, j in self.tiling.chunks(tile))
        return TileCost(seconds, chunks * self.finishing.chunk_seconds, flops, chunks * self._chunk_bytes)

    @cached_property
    def _engines(self) -> dict[str, str]:
        return self.manifest.engines

    @property
    def _copies(self) -> int:
        return 2 if self.manifest.symmetry == "mirrored" else 1

    @cached_property
    def _chunk_bytes(self) -> int:
        entries, formats = self.tiling.chunk**2, len(self.manifest.formats)
        return entries * np.dtype(self.manifest.store_dtype).itemsize * formats

    def flops(self) -> float:
        """Predict the FLOPs of all tiles."""
        return sum(self.tile_cost(tile).flops for tile in self.tiling.tiles())

    def dearest_first(self) -> list[Tile]:
        """Give all tiles, those that take longest first."""
        return sorted(self.tiling.tiles(), key=self.tile_seconds, reverse=True)

    def makespan_seconds(self) -> float:
        """Predict the wall time of all tiles, each given to the worker that is free first."""
        loads = [0.0] * self.workers
        for seconds in sorted(map(self.tile_seconds, self.tiling.tiles()), reverse=True):
            heapq.heapreplace(loads, loads[0] + seconds)
        return max(loads)


def evaluate(problem: Problem) -> LossAndGradient:
    """Evaluate loss and gradient in float64, and the fingerprint's total weight; see `loss_and_gradient`."""
    with exact_kernels(problem.model), unchanged(problem.model):
        return loss_and_gradient(problem.place(torch.float64), REFERENCE_MICROBATCH)


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
    )


def make_plan(problem: Problem, settings: Settings, name: str | None = None) -> JobPlan:
    """Decide everything about a run.

    Args:
        problem: with its parameters selected.
        settings: how to compute.
        name: of the problem, for the manifest.

    Returns:
        The plan.

    Raises:
        ProblemError: the problem has no well-defined Hessian, or no engine gets it right.
        BlockError: `blocks` names an unknown parameter.
        SpecError: settings contradict each other or this machine.
        MemoryRefusedError: a worker would need more memory than is allowed.
    """
    layout = problem.layout
    if not plan_tiles(layout, settings.blocks, settings.chunk or MAX_CHUNK, (1, 1)).selected.any():
        raise BlockError(
            f"`blocks` got {settings.blocks!r}, which holds no entry: give pairs of parameters with entries"
        )
    dtype: torch.dtype = getattr(torch, settings.dtype) if settings.dtype else problem.dtype
    candidates = list(ENGINES) if settings.engine == "auto" else [settings.engine]
    verdict = preflight(problem, candidates, dtype, device_of(settings))
    at = evaluate(problem)

    workers = worker_count(settings)
    allowed = allowed_bytes(settings.memory, workers)
    threads = settings.cpus_per_worker if settings.executor == "ray" else None
    placed = problem.place(dtype, device_of(settings))
    with torch_threads(threads), exact_kernels(problem.model), unchanged(problem.model):
        known = applications(placed, PROBE_SAMPLES)
        verdict = take_faster(placed, verdict, known)
    tiling = choose_tiling(layout, verdict.engines, settings, dtype.itemsize, allowed, workers)
    chunk, tile_shape = tiling.chunk, tiling.tile_shape
    writer = writer_bytes(settings.concurrent_puts * chunk**2 * dtype.itemsize, settings.formats)
    tiles = tiling.tiles()
    largest = max(tiles, key=lambda t: tiling.shape(t)[0] * tiling.shape(t)[1])
    rows, cols = tiling.shape(largest)
    held = WorkerMemory(problem.byte_count, rows * cols * dtype.itemsize, writer, 0, f"{largest.id} ({rows} x {cols})")
    held.require(allowed)

    segments = _segments(tiling, tiles, problem, verdict.engines, known)
    with torch_threads(threads), unchanged(problem.model):
        probed = choose_sizes(
            placed,
            segments,
            engine_budget_bytes(allowed - held.total_bytes),
            settings.microbatch,
            settings.row_group,
        )
    memory = WorkerMemory(held.problem_bytes, held.tile_bytes, held.writer_bytes, probed.engine_bytes, held.tile)
    memory.require(allowed)
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
        }
    )
    left_out = tuple(name for name, _ in problem.model.named_parameters() if name not in set(layout.names))
    measure = partial(time_calls, placed, segments, probed.sizes, probed.costs)
    beside = _beside(settings, workers)
    with torch_threads(threads), unchanged(problem.model), rivals(beside, measure):
        timings = measure()
        finishing = _finishing(manifest, tiling, placed, at)
    symmetric = frozenset(segment.parameter.name for segment in segments if segment.is_symmetric)
    return JobPlan(
        manifest, tiling, at, memory, allowed, workers, probed.costs, timings, finishing, symmetric,
        placed.device.type, left_out,
    )  # fmt: skip


def _beside(settings: Settings, workers: int) -> int:
    """Count the workers that are at work on the same machine as any one, where they share its CPUs."""
    if settings.executor == "serial" or settings.gpus_per_worker > 0:
        return 0
    return min(workers, len(os.sched_getaffinity(0)) // settings.cpus_per_worker) - 1


def _finishing(manifest: Manifest, tiling: TilingPlan, placed: PlacedProblem, at: LossAndGradient) -> Finishing:
    """Compute a chunk from a few samples, and time what a worker does with it."""
    tile = tiling.tiles()[len(tiling.tiles()) // 2]
    i, j = tiling.chunks(tile)[-1]
    rows, cols = (tiling.span(range(k, k + 1)) for k in (i, j))
    out = torch.zeros(len(rows), len(cols), dtype=placed.dtype, device=placed.device)
    batch = placed.cast(
        next(microbatches(placed.problem.batches, None if not placed.problem.separable else FEW_SAMPLES))
    )
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
        store = MatrixStore(Output(folder), manifest, write=True)
        writing = seconds_of(partial(store.write_chunk, i, j, values))
    passes = seconds_of(lambda: bool(out.zero_().div_(2).sum().isfinite()))
    objects = 2 if manifest.symmetry == "mirrored" and i != j else 1
    return Finishing(passes / out.numel(), writing / objects)


def worker_count(settings: Settings) -> int:
    """Give the number of workers: as set, or this machine's CPUs and GPUs shared out."""
    if settings.executor == "serial":
        if settings.workers not in {None, 1}:
            raise SpecError(
                f"`workers` got {settings.workers} with executor=serial, which computes in this process: "
                "use executor=ray"
            )
        return 1
    if settings.workers is not None:
        return settings.workers
    by_cpu = len(os.sched_getaffinity(0)) // settings.cpus_per_worker
    if settings.gpus_per_worker > 0:
        return max(1, min(by_cpu, int(torch.cuda.device_count() / settings.gpus_per_worker)))
    return max(1, by_cpu)


def versions() -> dict[str, str]:
    """Give the versions that numbers may depend on."""
    names = ("hessian-pipeline", "torch", "zarr", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def choose_tiling(
    layout: ParameterLayout, engines: dict[str, str], settings: Settings, itemsize: int, allowed: int, workers: int
) -> TilingPlan:
    """Choose chunks and tiles.

    Args:
        layout: the parameters.
        engines: by parameter.
        settings: how to compute.
        itemsize: bytes of an entry as it is computed.
        allowed: bytes of a worker.
        workers: how many.

    Returns:
        The tiling.

    Raises:
        SpecError: a chunk is too large for a list of Parquet.
    """
    unit, factored = _unit(layout, engines), _is_factored(layout, engines)
    # Tiles of other engines are bands of one chunk row: there are no more of them than that.
    chunk = settings.chunk or default_chunk(layout.size, unit, 1 if factored else TILES_PER_WORKER * workers)
    if "parquet" in settings.formats:
        require_room_in_lists(chunk, layout.size)
    chunk_bytes = chunk**2 * itemsize
    tiling = plan_tiles(layout, settings.blocks, chunk, (1, 1))
    free = allowed - PROCESS_BYTES - writer_bytes(settings.concurrent_puts * chunk_bytes, settings.formats)
    room = max(1, int(TILES_SHARE * free / (BUFFERED_TILES * chunk_bytes)))
    shape = settings.tile or _tile_shape(tiling, unit if factored else None, chunk_bytes, room, workers)
    return replace(tiling, tile_shape=shape)


def _is_factored(layout: ParameterLayout, engines: dict[str, str]) -> bool:
    """Say whether most rows are of the factored engine."""
    return sum(p.size for p in layout if engines[p.name] == "factored") >= layout.size / 2


def _unit(layout: ParameterLayout, engines: dict[str, str]) -> int:
    """Give the rows of one output of the largest factored layer; 1 where there is none."""
    weights = [p for p in layout if engines[p.name] == "factored" and len(p.shape) > 1 and p.size]
    largest = max(weights, key=lambda p: p.size, default=None)
    return largest.size // largest.shape[0] if largest else 1


def _tile_shape(tiling: TilingPlan, unit: int | None, chunk_bytes: int, room: int, workers: int) -> tuple[int, int]:
    """Give the chunk rows and columns of a tile; `room` is for how many chunks, `unit` for the factored engine."""
    whole = int(tiling.selected.sum()) == tiling.side * (tiling.side + 1) // 2
    if unit is None or not whole:
        # Other engines pull a row back through the whole network whatever its columns: as wide as memory allows. Where
        # only some blocks are wanted, a higher tile would hold others.
        return 1, min(tiling.side, room)
    # Here what is pulled back, and the operands of products, are made anew for each tile: large squares.
    chunks = int(tiling.selected.sum())
    tiles = TILES_PER_WORKER * workers if workers > 1 else math.ceil(chunks * chunk_bytes / LONE_TILE_BYTES)
    wanted = tiling.side if tiles == 1 else int(tiling.side / math.sqrt(2 * tiles))  # half of the squares are empty
    enough = math.ceil(UNITS_A_SIDE * unit / tiling.chunk)
    if workers >= MANY_WORKERS:
        finer = int(tiling.side / math.sqrt(2 * TILES_OF_MANY * workers))
        wanted = max(finer, min(enough, wanted))
    wanted = max(wanted, min(enough, int(tiling.side / math.sqrt(2 * workers))))
    side = max(1, min(wanted, math.isqrt(room)))
    return side, side


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


def device_of(settings: Settings) -> str:
    """Give the device that engines run on.

    Args:
        settings: how to compute.

    Returns:
        "cuda" or "cpu".

    Raises:
        SpecError: a GPU is asked for where torch finds none.
    """
    if settings.gpus_per_worker > 0 and not torch.cuda.is_available():
        raise SpecError(f"`gpus_per_worker` got {settings.gpus_per_worker}, but torch finds no CUDA device here")
    return "cuda" if settings.gpus_per_worker > 0 else "cpu"
