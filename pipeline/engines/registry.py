"""Engines: ways to compute a tile, all exact, behind one method.

    engine.add(batch, rows, cols, out)

adds the un-normalised contribution of one micro-batch to `out`  # shape: (len(rows), len(cols)). Rows and columns are
consecutive flat indices. The worker alone loops micro-batches, gives each engine the rows it was chosen for, adds the
L2 term and divides by the total weight.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from pipeline.engines.differences import Differences
from pipeline.engines.factored import Factored
from pipeline.engines.jacrev import Jacrev
from pipeline.engines.rows import Rows
from pipeline.engines.stages import Application, NotFactoredError, Stages
from pipeline.errors import ProblemError
from pipeline.problem.batches import Batch
from pipeline.problem.problem import PlacedProblem


class Engine(Protocol):
    """A way to compute a tile."""

    def add(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add one micro-batch's un-normalised part of H[rows, cols] to `out`.

        Args:
            batch: of the problem's type, on its device.
            rows: consecutive flat indices.
            cols: consecutive flat indices.
            out: changed in place.  # shape: (len(rows), len(cols))
        """


class Part(NamedTuple):
    """A part of the matrix, and where it is summed.

    Attributes:
        rows: consecutive flat indices.
        cols: likewise.
        out: changed in place.  # shape: (len(rows), len(cols))
    """

    rows: range
    cols: range
    out: Tensor


def add_batch(name: str, placed: PlacedProblem, row_group: int, batch: Batch, parts: Iterable[Part]) -> None:
    """Add one micro-batch by an engine; by `jacrev` where the batch is unlike those that preflight saw.

    Args:
        name: of the engine.
        placed: the problem.
        row_group: see `ENGINES`.
        batch: as for `Engine.add`.
        parts: to be added to, by one engine, which need not look at the batch anew for each.
    """
    engine = ENGINES[name](placed, row_group)
    for part in parts:
        try:
            engine.add(batch, *part)
        except NotFactoredError:  # raised before anything is added: other positions, or another layer, for these
            ENGINES["jacrev"](placed, row_group).add(batch, *part)


def applications(placed: PlacedProblem, samples: int | None) -> dict[str, Application]:
    """Describe the parameters that the factored engine can treat.

    Args:
        placed: the problem.
        samples: of a micro-batch; the first is looked at. None for a whole batch.

    Returns:
        By name.
    """
    if not placed.problem.is_cuttable:
        return {}
    try:
        stages = Stages(placed, next(placed.batches(samples)))
    except (NotFactoredError, ProblemError):  # the latter: torch.func cannot evaluate it, or the user's code failed
        return {}
    return {p.name: found for p in placed.layout if (found := stages.application(p.name))}


# Fastest first. An engine is made from a placed problem and the number of rows it may treat at a time.
ENGINES: dict[str, Callable[[PlacedProblem, int], Engine]] = {
    "factored": Factored,
    "factored_tf32x3": partial(Factored, splits=True),  # for the tensor cores of GPUs
    "jacrev": Jacrev,
    "rows": lambda placed, _: Rows(placed),  # one at a time
    "differences": lambda placed, _: Differences(placed),  # where double backward is wrong or missing
}
