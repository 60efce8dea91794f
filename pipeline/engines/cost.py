"""What an engine costs, measured on the real model: seconds, FLOPs and bytes of one row group of one micro-batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.engines.meter import metered
from pipeline.engines.registry import Part, add_batch
from pipeline.engines.stages import Application
from pipeline.errors import HessianError, ProblemError, in_words
from pipeline.planning.costs import Measured, work
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.parameters import Parameter
from pipeline.problem.batches import Batch, sample_count
from pipeline.problem.contexts import exact_kernels
from pipeline.problem.problem import PlacedProblem

PROBE_SAMPLES = 1024  # at most, of what is timed
SHARED_SAMPLES = 2  # of a call that computes all rows at once, which with more samples would take as long as the run
PROBE_BYTES = 2**30  # of the rows that are computed


@dataclass(frozen=True)
class Segment:
    """Rows of one parameter and the columns they are computed against, as the plan will ask for them.

    Attributes:
        parameter: that rows belong to.
        cols: flat indices.
        engine: that computes them.
        units: that the engine counts in its groups: single rows, or outputs of a layer where it goes by units.
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
        if TRAITS[engine].by_units:
            found = known[parameter.name]
            return cls(parameter, cols, engine, found.units, found.unit_rows, found.positions == 1, found.weight)
        return cls(parameter, cols, engine, parameter.size, 1)

    @property
    def shares_rows(self) -> bool:
        """Whether a call for one unit takes as long as for all, since all have the same rows: of an embedding."""
        return self.units > 1 and self.unit_rows == self.parameter.size

    def rows(self, row_group: int) -> int:
        """Return the rows that are treated at a time."""
        return min(row_group * self.unit_rows, self.parameter.size)

    def work(self, rows: range) -> float:
        """Count what is done for some of the rows; see `work`."""
        return work(self.engine, rows, self.cols, self.parameter.span if self.is_symmetric else range(0))


def measure(
    placed: PlacedProblem, segment: Segment, samples: int | None, row_group: int, *, counted: bool = False
) -> Measured:
    """Run an engine once on real data.

    Args:
        placed: the problem in the run's type, on its device.
        segment: which rows, columns and engine.
        samples: in the micro-batch, taken from the largest batch; None for all.
        row_group: rows at a time; as many are computed.
        counted: whether FLOPs are, which slows small operators.

    Returns:
        What it took.
    """
    batch, rows = batch_of(placed, samples), rows_of(placed, segment, row_group)
    out = torch.zeros(len(rows), len(segment.cols), dtype=placed.dtype, device=placed.device)
    call = partial(call_engine, placed, row_group, batch, rows, segment, out)
    count = sample_count(batch)
    with exact_kernels(placed.problem.model):
        took = metered(call, placed.device, placed.dtype, count, counted=counted)
    return Measured(len(rows), segment.work(rows), count, took.seconds, took.flops, took.peak_bytes)


def batch_of(placed: PlacedProblem, samples: int | None) -> Batch:
    """Return so many samples of the largest batch."""
    largest = max(placed.problem.batches, key=sample_count)
    return placed.cast(next(placed.problem.on((largest,), l2=0.0).microbatches(samples)))


def rows_of(placed: PlacedProblem, segment: Segment, row_group: int) -> range:
    """Return the rows of a group, as many as memory for a probe has room for, in whole units."""
    most = max(1, PROBE_BYTES // (len(segment.cols) * placed.dtype.itemsize))
    most -= most % segment.unit_rows if most > segment.unit_rows else 0
    return segment.parameter.span[: min(segment.rows(row_group), most)]


def call_engine(
    placed: PlacedProblem, row_group: int, batch: Batch, rows: range, segment: Segment, out: Tensor
) -> None:
    """Run an engine, and wait for it."""
    _synchronize(placed.device)
    _add(placed, row_group, batch, rows, segment, out)
    _synchronize(placed.device)


def _add(placed: PlacedProblem, row_group: int, batch: Batch, rows: range, segment: Segment, out: Tensor) -> None:
    """Run an engine; preflight let it pass, but for other columns."""
    try:
        add_batch(segment.engine, placed, row_group, batch, [Part(rows, segment.cols, out)])
    except (HessianError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ProblemError(
            f"engine {segment.engine} on the rows of `{segment.parameter.name}` raised "
            f"{in_words(error)}; take engine=rows, or leave it out with params"
        ) from error


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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
