"""From a problem and settings to a frozen plan: everything is decided, measured and refused here, before the run."""

import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch

from pipeline.contest import take_faster
from pipeline.contexts import exact_kernels, unchanged
from pipeline.engines import ENGINES, applications
from pipeline.engines.stages import Application
from pipeline.errors import BlockError, ProblemError, SpecError
from pipeline.layout import ParameterLayout
from pipeline.manifest import Fingerprint, Manifest
from pipeline.memory import (
    BUFFERED_TILES,
    PROCESS_BYTES,
    SCRATCH,
    SHARE_OF_FREE,
    WorkerMemory,
    allowed_bytes,
    engine_budget_bytes,
    writer_bytes,
)
from pipeline.parquet import require_room_in_lists
from pipeline.placement import Staff, workers_on_gpu
from pipeline.preflight import preflight
from pipeline.probe import PROBE_SAMPLES, Measured, Segment, choose_sizes, torch_threads
from pipeline.problem import Problem
from pipeline.reference import LossAndGradient, loss_and_gradient
from pipeline.spec import Settings
from pipeline.tiling import MAX_CHUNK, Tile, TilingPlan, default_chunk, plan_tiles

REFERENCE_MICROBATCH = 1024  # samples at a time of the float64 loss and gradient
TILES_SHARE = 0.5  # of the memory allowed, for tile buffers
TILES_PER_WORKER = 4  # at least: the last ones are shared out well, and one that is lost costs little
UNITS_A_SIDE = 14  # of a factored tile, even if there are fewer tiles: with 6, of 784 inputs, products ran at a third
LONE_TILE_BYTES = 2**28  # of a tile, where one worker has all of them


@dataclass(frozen=True)
class JobPlan:
    """A run, decided.

    Attributes:
        manifest: its identity.
        tiling: its tiles.
        at: loss and gradient in float64.
        memory: projected, of the worst tile's worker.
        allowed_bytes: for one worker.
        allowed_device_bytes: on its GPU; None where it has none.
        workers: how many.
        costs: measured, by row parameter.
        left_out: parameters of the model that are frozen or not selected.
        place: the machine and device it was measured on.
    """

    manifest: Manifest
    tiling: TilingPlan
    at: LossAndGradient
    memory: WorkerMemory
    allowed_bytes: int
    allowed_device_bytes: int | None
    workers: int
    costs: dict[str, Measured]
    left_out: tuple[str, ...]
    place: str

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunks in all formats, before compression."""
        return len(self.manifest.formats) * self.manifest.matrix_bytes

    def tile_seconds(self, tile: Tile) -> float:
        """Predict the seconds of a tile on one worker."""
        return sum(rows * cost.seconds_per_row for rows, cost in self._work(tile))

    def flops(self) -> float:
        """Predict the FLOPs of all tiles."""
        return sum(rows * cost.flops_per_row for tile in self.tiling.tiles() for rows, cost in self._work(tile))

    def _work(self, tile: Tile) -> Iterator[tuple[float, Measured]]:
        """Give a tile's rows times samples, in terms of those measured."""
        cols, samples = self.tiling.span(tile.cols), self.manifest.fingerprint.samples
        for p, rows in self.manifest.layout.segments(self.tiling.span(tile.rows)):
            right = cols.stop - max(cols.start, rows.start)
            if right <= 0:
                continue
            cost, count = self.costs[p.name], len(rows)
            if self.manifest.engines[p.name] == "factored":  # works by entry; the others pull back all columns anyway
                below = range(max(cols.start, rows.start), min(cols.stop, rows.stop))
                yield samples * count * (right - len(below) / 2) / cost.cols, cost
            else:
                yield samples * count, cost

    def dearest_first(self) -> list[Tile]:
        """Give all tiles, those that take longest first."""
        return sorted(self.tiling.tiles(), key=self.tile_seconds, reverse=True)

    def makespan_seconds(self) -> float:
        """Predict the wall time of all tiles, each given to the worker that is free first."""
        loads = [0.0] * self.workers
        for tile in self.dearest_first():
            loads[loads.index(min(loads))] += self.tile_seconds(tile)
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
    verdict = preflight(problem, candidates, dtype, device)
    at = evaluate(problem)

    allowed, on_gpu = allowed_bytes(settings.memory, staff.beside), allowed_device_bytes(settings)
    threads = settings.cpus_per_worker if settings.executor == "ray" else None
    placed = problem.place(dtype, device)
    with torch_threads(threads), exact_kernels(problem.model), unchanged(problem.model):
        known = applications(placed, PROBE_SAMPLES)
        verdict = take_faster(placed, verdict, known)
    chunk = settings.chunk or default_chunk(layout.size, _unit(layout, verdict.engines))
    if "parquet" in settings.formats:
        require_room_in_lists(chunk, layout.size)
    chunk_bytes = chunk**2 * dtype.itemsize
    tiling = plan_tiles(layout, settings.blocks, chunk, (1, 1))
    writer = writer_bytes(settings.concurrent_puts * chunk_bytes, settings.formats)
    room = _tile_room(chunk_bytes, allowed - PROCESS_BYTES - writer)
    if on_gpu is not None:
        room = min(room, max(1, int(TILES_SHARE * (on_gpu - problem.byte_count) / chunk_bytes)))
    tile_shape = settings.tile or _tile_shape(tiling, verdict.engines, layout, chunk_bytes, room, staff.workers)
    tiling = TilingPlan(layout.size, chunk, tile_shape, tiling.selected)
    tiles = tiling.tiles()
    largest = max(tiles, key=lambda t: tiling.shape(t)[0] * tiling.shape(t)[1])
    rows, cols = tiling.shape(largest)
    held = WorkerMemory(
        problem.byte_count,
        rows * cols * dtype.itemsize,
        writer,
        0,
        f"{largest.id} ({rows} x {cols})",
        on_gpu is not None,
    )
    held.require(allowed, on_gpu)
    free = engine_budget_bytes(allowed - held.total_bytes)
    budget = free if on_gpu is None else int((on_gpu - held.device_bytes) / SCRATCH)

    with torch_threads(threads), unchanged(problem.model):
        probed = choose_sizes(
            placed,
            _segments(tiling, tiles, problem, verdict.engines, known),
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
        }
    )
    left_out = tuple(name for name, _ in problem.model.named_parameters() if name not in set(layout.names))
    place = f"{platform.node()}, {device_name(device)}"
    return JobPlan(manifest, tiling, at, memory, allowed, on_gpu, staff.workers, probed.costs, left_out, place)


def common_plan(plans: Sequence[JobPlan]) -> JobPlan:
    """Choose among plans that were made on different kinds of machines the one that all can carry out.

    Args:
        plans: of one problem, at least one.

    Returns:
        The one made with the least memory.

    Raises:
        ProblemError: one of its engines was not found right on all of them.
        MemoryRefusedError: it does not fit into another's memory all the same.
    """
    least = min(plans, key=lambda plan: (plan.allowed_device_bytes or 0, plan.allowed_bytes))
    for other in plans:
        least.memory.require(other.allowed_bytes, other.allowed_device_bytes)
        for name, found in least.manifest.preflight.parameters.items():
            there = other.manifest.preflight.parameters[name]
            if found.engine not in {there.engine, there.rival}:
                raise ProblemError(
                    f"`{name}`: engine {found.engine} is right on {least.place}, but on {other.place} "
                    f"{there.engine} was chosen; set `engine`, or take one kind of node by `label_selector`"
                )
    return least


def local_staff(settings: Settings) -> Staff:
    """Give the workers of a run on this machine."""
    count = worker_count(settings)
    return Staff(count, count)


def worker_count(settings: Settings) -> int:
    """Give the number of workers: as set, or this machine's CPUs and GPUs shared out."""
    if settings.executor == "serial":
        if settings.resources or settings.label_selector:
            raise SpecError(
                "`resources` and `label_selector` choose nodes of a cluster, but executor=serial computes in this "
                "process: use executor=ray"
            )
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


def _tile_room(chunk_bytes: int, free_bytes: int) -> int:
    """Give the chunks of the largest tile that memory has room for."""
    return max(1, int(TILES_SHARE * free_bytes / (BUFFERED_TILES * chunk_bytes)))


def _unit(layout: ParameterLayout, engines: dict[str, str]) -> int:
    """Give the rows of one output of the largest factored layer; 1 where there is none."""
    weights = [p for p in layout if engines[p.name] == "factored" and len(p.shape) > 1 and p.size]
    largest = max(weights, key=lambda p: p.size, default=None)
    return largest.size // largest.shape[0] if largest else 1


def _tile_shape(
    tiling: TilingPlan, engines: dict[str, str], layout: ParameterLayout, chunk_bytes: int, room: int, workers: int
) -> tuple[int, int]:
    """Give the chunk rows and columns of a tile; `room` is for how many chunks."""
    factored = sum(p.size for p in layout if engines[p.name] == "factored")
    whole = int(tiling.selected.sum()) == tiling.side * (tiling.side + 1) // 2
    if factored < layout.size / 2 or not whole:
        # Other engines pull a row back through the whole network whatever its columns: as wide as memory allows. Where
        # only some blocks are wanted, a higher tile would hold others.
        return 1, min(tiling.side, room)
    # Here what is pulled back, and the operands of products, are made anew for each tile: large squares.
    chunks = int(tiling.selected.sum())
    tiles = TILES_PER_WORKER * workers if workers > 1 else math.ceil(chunks * chunk_bytes / LONE_TILE_BYTES)
    wanted = tiling.side if tiles == 1 else int(tiling.side / math.sqrt(2 * tiles))  # half of the squares are empty
    enough = math.ceil(UNITS_A_SIDE * _unit(layout, engines) / tiling.chunk)
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
        SpecError: Ray workers are to compute on GPUs that they do not ask for.
    """
    if settings.device == "cuda" and settings.executor == "ray" and not settings.gpus_per_worker:
        raise SpecError("`device` got cuda, but workers have no GPU: give `gpus_per_worker`, 1 or a fraction")
    if settings.device == "auto":
        return "cuda" if settings.gpus_per_worker > 0 else "cpu"
    return settings.device


def require_device(device: str) -> None:
    """Refuse to compute on a device that is not here.

    Args:
        device: "cuda" or "cpu".

    Raises:
        SpecError: a GPU is wanted where torch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecError(
            f"`device` is cuda, but torch {torch.__version__} finds no CUDA device on {platform.node()}: compute where "
            "there is one (`address` names a cluster), or give device=cpu"
        )


def device_name(device: str) -> str:
    """Name a device for people."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def allowed_device_bytes(settings: Settings) -> int | None:
    """Give what one worker may hold on its GPU: of the whole, shared with the others on it; None on a CPU."""
    if device_of(settings) == "cpu":
        return None
    _, total = torch.cuda.mem_get_info()
    return int(SHARE_OF_FREE * total / workers_on_gpu(settings.gpus_per_worker or 1))
