"""A run, decided: its identity, its tiles, and what they are going to cost."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.errors import ProblemError, counted, human_bytes, human_seconds
from pipeline.planning.costs import AroundTiles, Finishing, Measured, Timing, work
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.evaluation import LossAndGradient
from pipeline.planning.machine_profiles import TileCost
from pipeline.planning.manifest import Manifest
from pipeline.planning.memory import WorkerMemory
from pipeline.planning.notebook import card
from pipeline.planning.tiling import Tile, TilingPlan


@dataclass(frozen=True)
class JobPlan:
    """A run, decided.

    Attributes:
        manifest: its identity.
        at: loss and gradient in float64.
        memory: projected, of the worst tile's worker.
        allowed_bytes: for one worker.
        allowed_device_bytes: on its GPU; None where it has none.
        workers: how many.
        costs: measured, by row parameter.
        timings: of calls as the run makes them, for the row parameters that take most of it.
        finishing: seconds of what comes after the engines.
        around: seconds before and after the tiles.
        symmetric: parameters within which half of the entries are computed.
        device: that it was measured on.
        left_out: parameters of the model that are frozen or not selected.
        place: the machine and device it was measured on.
    """

    manifest: Manifest
    at: LossAndGradient
    memory: WorkerMemory
    allowed_bytes: int
    allowed_device_bytes: int | None
    workers: int
    costs: dict[str, Measured]
    timings: dict[str, Timing]
    finishing: Finishing
    around: AroundTiles
    symmetric: frozenset[str]
    device: str
    left_out: tuple[str, ...]
    place: str

    @property
    def tiling(self) -> TilingPlan:
        """The tiles."""
        return self.manifest.plan

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunks in all formats, before compression."""
        return len(self.manifest.formats) * self.manifest.matrix_bytes

    @property
    def smaller(self) -> str:
        """What would make the output smaller, of what is not taken yet, as an error says it."""
        manifest = self.manifest
        taken = {
            "symmetry=upper": manifest.symmetry == "upper",
            "store_dtype=float32": manifest.store_dtype == "float32",
        }
        return f"take {', '.join([*(way for way, is_taken in taken.items() if not is_taken), 'fewer blocks'])}"

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
        tensor_flops = 0.0
        before = None
        for p, rows in self.manifest.layout.segments(self.tiling.span(tile.rows)):
            if cols.stop <= rows.start:  # all below the diagonal: rows that the tile has for other ones' sake
                continue
            engine, cost = self._engines[p.name], self.costs[p.name]
            amount = work(engine, rows, cols, p.span if p.name in self.symmetric else range(0))
            if TRAITS[engine].on_tensor_cores:
                tensor_flops += amount * samples * cost.flops_per_work
            else:
                flops += amount * samples * cost.flops_per_work
            if timing := self.timings.get(p.name):
                calls = 0 if timing is before or not amount else 1  # a bias goes with its weight
                batches = samples / self.manifest.sizes[engine].microbatch
                each = timing.seconds(amount, max(cols.start, rows.start))
                seconds += batches * (calls * timing.call_seconds + each)
                before = timing
            else:
                seconds += amount * samples * cost.seconds_per_work
        chunks = len(self.manifest.places(tile))
        copied, written = chunks * self._chunk_bytes, chunks * self.finishing.chunk_seconds
        stored = len(self.manifest.formats) * copied
        return TileCost(seconds, written, flops, tensor_flops, stored, copied, self.manifest.codec)

    @cached_property
    def _engines(self) -> dict[str, str]:
        return self.manifest.engines

    @cached_property
    def _chunk_bytes(self) -> int:
        return self.tiling.chunk**2 * np.dtype(self.manifest.store_dtype).itemsize

    def _repr_html_(self) -> str:
        manifest, memory = self.manifest, self.memory
        values = [
            ("P", f"{self.tiling.size:,}"),
            ("tiles", f"{len(self.tiling.tiles()):,}, in chunks of side {manifest.chunk}"),
            ("predicted", self.time_text()),
            ("memory of each", f"{human_bytes(memory.total_bytes)}, {human_bytes(self.allowed_bytes)} allowed"),
            ("stored", f"{human_bytes(self.stored_bytes)} before compression"),
        ]
        rows = [(p.name, p.shape_text, f"{p.size:,}", manifest.engines[p.name]) for p in manifest.layout]
        columns = ("name", "shape", "rows", "engine")
        return card(f"Plan of {manifest.problem or 'a Hessian'}", values, "parameters", columns, rows)

    def flops(self) -> float:
        """Predict the FLOPs of all tiles."""
        costs = map(self.tile_cost, self.tiling.tiles())
        return sum(cost.flops + cost.tensor_flops for cost in costs)

    def dearest_first(self) -> list[Tile]:
        """Return all tiles, those that take longest first."""
        return sorted(self.tiling.tiles(), key=self.tile_seconds, reverse=True)

    def makespan_seconds(self) -> float:
        """Predict the wall time of all tiles, each given to the worker that is free first."""
        loads = [0.0] * self.workers
        for seconds in sorted(map(self.tile_seconds, self.tiling.tiles()), reverse=True):
            heapq.heapreplace(loads, loads[0] + seconds)
        return max(loads)

    def time_text(self) -> str:
        """Say how long the run takes, planning included, and what of it."""
        around, tiles = self.around, self.makespan_seconds()
        parts = {
            "planning": around.planning,
            "starting workers": around.start,
            f"tiles on {counted(self.workers, 'worker')}": tiles,
            "proof": around.proof,
        }
        each = ", ".join(f"{human_seconds(seconds)} {name}" for name, seconds in parts.items() if seconds)
        return f"{human_seconds(sum(parts.values()))} predicted in all: {each}"


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
