"""What an engine costs, measured on the real model: seconds, FLOPs and bytes of one row group of one micro-batch."""

import math
import os
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.contexts import exact_kernels
from pipeline.data import Batch, microbatches, sample_count
from pipeline.engines import add_batch
from pipeline.engines.stages import Application
from pipeline.errors import HessianError, MemoryRefusedError, ProblemError, in_words
from pipeline.layout import Parameter
from pipeline.memory import mebibytes
from pipeline.problem import PlacedProblem
from pipeline.verdict import EngineSizes

PROBE_SECONDS = 5.0
PROBE_SAMPLES = 1024  # at most, of what is timed
PROBE_BYTES = 2**30  # of the rows that are computed
TIMED_SECONDS = 1.5  # of a call that is timed, about
FEWER = 8  # times, rows of the other call that is timed
REPEATED = 3  # since the first finds the memory it needs
LEAST_UNITS = 8  # at a time: products of few run slower
TIMINGS_SECONDS = 4.0  # of all that are timed

clock = time.perf_counter  # what all is timed by; a benchmark on a machine that is not its own may count CPU seconds


@dataclass(frozen=True)
class Habit:
    """What sizes an engine runs best with, as measured.

    Attributes:
        first_rows: of the first measurement, and
        first_samples: of it; with more its memory grows in proportion.
        most_rows: in a group; beyond, no gain.
        enough_samples: in a micro-batch; groups are made smaller before micro-batches are.
        bytes: held on a CPU and on a GPU; beyond, `jacrev` spends its time in page faults.
    """

    first_rows: int
    first_samples: int
    most_rows: int
    enough_samples: int
    bytes: dict[str, int]


_GENERAL = Habit(8, 8, 256, 128, {"cpu": 64 * 2**20, "cuda": 2**30})
HABITS = {"factored": Habit(1, 512, 32, 4096, {"cpu": 2**30, "cuda": 2**32}), "jacrev": _GENERAL, "rows": _GENERAL}


@dataclass(frozen=True)
class Measured:
    """One call of an engine: rows of one parameter, one micro-batch.

    Attributes:
        rows: rows computed.
        work: that is; see `work`.
        samples: in the micro-batch.
        seconds: wall time.
        flops: as torch counts them: matrix products and convolutions.
        peak_bytes: most bytes alive at once in tensors made by the call.
    """

    rows: int
    work: float
    samples: int
    seconds: float
    flops: int
    peak_bytes: int

    @property
    def seconds_per_row(self) -> float:
        """Seconds per row and sample."""
        return self.seconds / self.rows / self.samples

    @property
    def seconds_per_work(self) -> float:
        """Seconds per sample and what `work` counts."""
        return self.seconds / self.work / self.samples

    @property
    def flops_per_work(self) -> float:
        """FLOPs likewise."""
        return self.flops / self.work / self.samples


@dataclass(frozen=True)
class Timing:
    """Calls of an engine as workers make them: warm, a micro-batch each, with as many at work beside it.

    Attributes:
        call_seconds: of a call, whatever its rows and columns.
        work_seconds: of what `work` counts.
    """

    call_seconds: float
    work_seconds: float


class Meter(TorchDispatchMode):
    """Counts FLOPs, as torch does for matrix products and convolutions, and the bytes alive in storages made inside.

    Args:
        out: what results are added to; not counted.

    torch's own FlopCounterMode also tracks modules, by hooks that parametrised modules and losses that differentiate
    do not bear.
    """

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known = {out.untyped_storage()._cdata: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


@dataclass(frozen=True)
class Segment:
    """Rows of one parameter and the columns they are computed against, as the plan will ask for them.

    Attributes:
        parameter: that rows belong to.
        cols: flat indices.
        engine: that computes them.
        units: that the engine counts in its groups: single rows, or outputs of a layer for the factored engine.
        unit_rows: of each; where units share rows, all.
        is_symmetric: whether half of the parameter's entries with itself are computed, the rest being mirror images.
        leader: the parameter that a bias is computed with.
    """

    parameter: Parameter
    cols: range
    engine: str
    units: int
    unit_rows: int
    is_symmetric: bool = False
    leader: str | None = None

    @classmethod
    def of(cls, parameter: Parameter, cols: range, engine: str, known: Mapping[str, Application]) -> "Segment":
        """Count the units of a parameter's rows.

        Args:
            parameter: that rows belong to.
            cols: flat indices.
            engine: that computes them.
            known: how parameters are applied.

        Returns:
            The segment.
        """
        if engine == "factored":
            found = known[parameter.name]
            return cls(parameter, cols, engine, found.units, found.unit_rows, found.positions == 1, found.weight)
        return cls(parameter, cols, engine, parameter.size, 1)

    def rows(self, row_group: int) -> int:
        """Give the rows that are treated at a time."""
        return min(row_group * self.unit_rows, self.parameter.size)

    def work(self, rows: range) -> float:
        """Count what is done for some of the rows; see `work`."""
        return work(self.engine, rows, self.cols, self.parameter.span if self.is_symmetric else range(0))


def work(engine: str, rows: range, cols: range, symmetric: range) -> float:
    """Count what an engine does, in terms that its seconds are in proportion to.

    Args:
        engine: its name.
        rows: of one parameter.
        cols: of the tile, those below the diagonal too.
        symmetric: columns with which half of the entries are computed.

    Returns:
        For the factored engine entries at or right of the diagonal; for the others rows, as each is pulled back through
        the whole network whatever the columns.
    """
    right = range(max(cols.start, rows.start), cols.stop)
    if engine != "factored" or not right:
        return float(len(rows) * bool(right))
    below = max(min(rows.stop, right.stop) - right.start, 0) / 2
    twice = max(min(symmetric.stop, right.stop) - max(symmetric.start, right.start) - below, 0) / 2
    return len(rows) * (len(right) - below - twice)


def measure(placed: PlacedProblem, segment: Segment, samples: int | None, row_group: int) -> Measured:
    """Run an engine once on real data.

    Args:
        placed: the problem in the run's type, on its device.
        segment: which rows, columns and engine.
        samples: in the micro-batch, taken from the largest batch; None for all.
        row_group: rows at a time; as many are computed.

    Returns:
        What it took.
    """
    batch, rows = _batch(placed, samples), _rows(placed, segment, row_group)
    out = torch.zeros(len(rows), len(segment.cols), dtype=placed.dtype, device=placed.device)
    with exact_kernels(placed.problem.model), Meter(out) as meter:
        start = clock()
        _call(placed, row_group, batch, rows, segment, out)
        seconds = clock() - start
    return Measured(len(rows), segment.work(rows), sample_count(batch), seconds, meter.flops, meter.peak)


def time_calls(
    placed: PlacedProblem,
    segments: Sequence[Segment],
    sizes: Mapping[str, EngineSizes],
    costs: Mapping[str, Measured],
) -> dict[str, Timing]:
    """Time engines as workers are going to call them, those first that take most of the run.

    Args:
        placed: the problem in the run's type, on its device.
        segments: one for each row parameter, as wide as the plan's tiles.
        sizes: by engine.
        costs: by row parameter.

    Returns:
        By row parameter, as far as a few seconds suffice; a bias has its weight's, whose calls do for both.
    """
    timings: dict[str, Timing] = {}
    begun = clock()
    dearest = sorted(segments, key=lambda s: -s.parameter.size * costs[s.parameter.name].seconds_per_row)
    for segment in dearest:
        if clock() - begun > TIMINGS_SECONDS:
            break
        if segment.leader in timings:
            timings[segment.parameter.name] = timings[segment.leader]
            continue
        size, cost = sizes[segment.engine], costs[segment.parameter.name]
        with suppress(torch.OutOfMemoryError):  # a worker will take a smaller group; what was measured has to do
            timings[segment.parameter.name] = _timing(placed, segment, size, cost)
    return timings


def _timing(placed: PlacedProblem, segment: Segment, size: EngineSizes, cost: Measured) -> Timing:
    """Time a call with few rows, and one with as many as a second or two allow."""
    affordable = int(TIMED_SECONDS / (cost.seconds_per_row * size.microbatch)) // segment.unit_rows
    most = max(affordable, LEAST_UNITS) * segment.unit_rows
    rows = _rows(placed, segment, size.row_group)[:most]
    few = rows[: max(1, len(rows) // FEWER // segment.unit_rows) * segment.unit_rows]
    batch = _batch(placed, size.microbatch)
    out = torch.zeros(len(rows), len(segment.cols), dtype=placed.dtype, device=placed.device)

    def seconds(span: range) -> float:
        start = clock()
        _call(placed, size.row_group, batch, span, segment, out[: len(span)])
        return clock() - start

    with exact_kernels(placed.problem.model):
        some = min(seconds(few) for _ in range(REPEATED))
        if len(few) == len(rows):
            return Timing(0.0, some / segment.work(rows))
        each = max(seconds(rows) - some, 0.0) / (segment.work(rows) - segment.work(few))
        return Timing(max(some - each * segment.work(few), 0.0), each)


def _batch(placed: PlacedProblem, samples: int | None) -> Batch:
    """Give so many samples of the largest batch."""
    return placed.cast(next(microbatches((max(placed.problem.batches, key=sample_count),), samples)))


def _rows(placed: PlacedProblem, segment: Segment, row_group: int) -> range:
    """Give the rows of a group, as many as memory for a probe has room for, in whole units."""
    most = max(1, PROBE_BYTES // (len(segment.cols) * placed.dtype.itemsize))
    most -= most % segment.unit_rows if most > segment.unit_rows else 0
    return segment.parameter.span[: min(segment.rows(row_group), most)]


def seconds_of(call: Callable[[], object]) -> float:
    """Time a call, the faster of two: the first finds the memory it needs."""

    def once() -> float:
        start = clock()
        call()
        return clock() - start

    return min(once(), once())


def _call(placed: PlacedProblem, row_group: int, batch: Batch, rows: range, segment: Segment, out: Tensor) -> None:
    """Run an engine, and wait for it."""
    _synchronize(placed.device)
    _add(placed, row_group, batch, rows, segment, out)
    _synchronize(placed.device)


def _add(placed: PlacedProblem, row_group: int, batch: Batch, rows: range, segment: Segment, out: Tensor) -> None:
    """Run an engine; preflight let it pass, but for other columns."""
    try:
        add_batch(segment.engine, placed, row_group, batch, rows, segment.cols, out)
    except (HessianError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ProblemError(
            f"engine {segment.engine} on the rows of `{segment.parameter.name}` raised "
            f"{in_words(error)}; take engine=rows, or leave it out with params"
        ) from error


@dataclass(frozen=True)
class Probed:
    """Working sizes and what was measured with them.

    Attributes:
        sizes: by engine.
        costs: by row parameter.
        engine_bytes: the largest peak.
    """

    sizes: dict[str, EngineSizes]
    costs: dict[str, Measured]
    engine_bytes: int


def choose_sizes(
    placed: PlacedProblem,
    segments: Sequence[Segment],
    budget_bytes: int,
    microbatch: int | None,
    row_group: int | None,
) -> Probed:
    """Choose micro-batch and row group of every engine by measuring.

    Args:
        placed: the problem in the run's type, on its device.
        segments: one for each row parameter.
        budget_bytes: what an engine may hold.
        microbatch: taken as it is when given.
        row_group: taken as it is when given.

    Returns:
        The sizes.

    Raises:
        MemoryRefusedError: not even one row of the smallest micro-batch fits.
    """
    by_engine: dict[str, list[Segment]] = {}
    for segment in segments:
        by_engine.setdefault(segment.engine, []).append(segment)
    sizes: dict[str, EngineSizes] = {}
    costs: dict[str, Measured] = {}
    peak = 0
    for name, own in by_engine.items():
        sizes[name], found, bytes_ = _Chooser(placed, own, budget_bytes).choose(microbatch, row_group)
        costs |= found
        peak = max(peak, bytes_)
    return Probed(sizes, costs, peak)


class _Chooser:
    """Chooses the sizes of one engine.

    Args:
        placed: the problem.
        segments: one for each row parameter of the engine.
        budget_bytes: what it may hold.
    """

    def __init__(self, placed: PlacedProblem, segments: Sequence[Segment], budget_bytes: int) -> None:
        self._placed, self._segments, self._budget = placed, segments, budget_bytes
        self._engine = segments[0].engine
        # The one with the most columns, and of these with the longest unit, needs the most memory.
        self._widest = max(segments, key=lambda s: (len(s.cols), s.unit_rows))
        self._largest = max(sample_count(batch) for batch in placed.problem.batches)

    def choose(self, microbatch: int | None, row_group: int | None) -> tuple[EngineSizes, dict[str, Measured], int]:
        """Choose; see `choose_sizes`."""
        habit, separable = HABITS[self._engine], self._placed.problem.separable
        fixed = min(microbatch or self._largest, self._largest) if separable else self._largest
        may_cut = separable and microbatch is None
        target = min(self._budget, habit.bytes[self._placed.device.type])
        model = _BytesModel.fit(self._placed, self._widest, self._largest if may_cut else fixed, habit)
        rows = row_group or habit.most_rows
        while row_group is None and rows > 1 and model.most_samples(rows, target) < min(fixed, habit.enough_samples):
            rows //= 2
        samples = max(1, min(fixed, model.most_samples(rows, target))) if may_cut else fixed
        samples = math.ceil(fixed / math.ceil(fixed / samples))  # as few micro-batches, of one size
        while True:
            try:
                costs = self._costs(samples, rows)
                peak = max(cost.peak_bytes for cost in costs.values())
                if samples > PROBE_SAMPLES or costs[self._widest.parameter.name].rows < self._widest.rows(rows):
                    peak = max(peak, model.bytes(rows, samples))  # less was measured than is going to be asked for
                if peak <= self._budget:
                    return EngineSizes(samples, rows), costs, peak
            except torch.OutOfMemoryError:
                peak = self._budget
            if row_group is None and rows > 1:
                rows //= 2
            elif may_cut and samples > 1:
                samples //= 2
            else:
                raise MemoryRefusedError(
                    f"{rows} rows of {samples} samples need {mebibytes(peak)} in the {self._engine} engine, "
                    f"{mebibytes(max(self._budget, 0))} are left for it: raise `memory`, or lower `workers`, `chunk`, "
                    "`tile`, `row_group` or `microbatch`"
                )

    def _costs(self, samples: int, row_group: int) -> dict[str, Measured]:
        """Measure the row parameters for a few seconds, the rest is taken as their mean."""
        # The widest is always measured: it needs the most memory. Then those with the most rows.
        costs: dict[str, Measured] = {}
        spent = 0.0
        for segment in sorted(self._segments, key=lambda s: (s is not self._widest, -s.parameter.size)):
            if spent > PROBE_SECONDS:
                break
            if segment.leader in costs:  # a bias, whose weight's calls do for both
                costs[segment.parameter.name] = costs[segment.leader]
                continue
            cost = measure(self._placed, segment, min(samples, PROBE_SAMPLES), row_group)
            costs[segment.parameter.name] = cost
            spent += cost.seconds
        known = list(costs.values())
        mean = Measured(
            sum(c.rows for c in known),
            sum(c.work for c in known),
            known[0].samples,
            sum(c.seconds for c in known),
            sum(c.flops for c in known),
            max(c.peak_bytes for c in known),
        )
        return {s.parameter.name: costs.get(s.parameter.name, mean) for s in self._segments}


@dataclass(frozen=True)
class _BytesModel:
    """Bytes of an engine's call: fixed + rows x per_row + samples x (per_sample + rows x slope)."""

    fixed: float
    per_row: float
    per_sample: float
    slope: float

    @classmethod
    def fit(cls, placed: PlacedProblem, segment: Segment, largest: int, habit: Habit) -> "_BytesModel":
        """Measure with few rows and samples, and twice as many of either."""
        few, rows = max(1, min(habit.first_samples, largest // 2)), habit.first_rows
        samples = few, min(2 * few, largest)
        (a, b), (c, d) = ([measure(placed, segment, some, group) for some in samples] for group in (rows, 2 * rows))
        first = min(rows, segment.units)  # there may be but one
        more, step = max(min(2 * rows, segment.units) - first, 1), max(samples[1] - few, 1)
        slope = max((d.peak_bytes - c.peak_bytes - b.peak_bytes + a.peak_bytes) / more / step, 0.0)
        per_row = max((c.peak_bytes - a.peak_bytes) / more - few * slope, 0.0)
        per_sample = max((b.peak_bytes - a.peak_bytes) / step - first * slope, 0.0)
        fixed = max(a.peak_bytes - first * per_row - few * (per_sample + first * slope), 0.0)
        return cls(fixed, per_row, per_sample, slope)

    def bytes(self, rows: int, samples: int) -> int:
        """Give the bytes of a call."""
        return int(self.fixed + rows * self.per_row + samples * (self.per_sample + rows * self.slope))

    def most_samples(self, rows: int, target_bytes: int) -> int:
        """Give the samples that fit beside so many rows."""
        return int((target_bytes - self.fixed - rows * self.per_row) / max(self.per_sample + rows * self.slope, 1.0))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Use so many CPU threads inside the context; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def rivals(count: int, work: Callable[[], object]) -> Iterator[None]:
    """Have processes do some work, again and again, while something is timed that will not be alone in the run either.

    Args:
        count: of them, forks of this process; none where there is no fork.
        work: on a CPU.
    """
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a fork does not have: it needs none
        children = [_rival(parent, work) for _ in range(count if hasattr(os, "fork") else 0)]
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _rival(parent: int, work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            while os.getppid() == parent:
                work()
        finally:
            os._exit(1)  # whatever it is: the parent does the same, and will say
    return child


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
