"""Executors: where runs are planned and computed. The serial one is the specification; Ray is one file beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.execution.events import Tally
from pipeline.execution.worker import Worker
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.manifest import Manifest
from pipeline.planning.tiling import Tile
from pipeline.preflight.planner import make_plan
from pipeline.problem.problem import Problem
from pipeline.results.reference import Reference
from pipeline.spec import Settings
from pipeline.storage.output import Output


@dataclass(frozen=True)
class Work:
    """What every worker of a run needs.

    Attributes:
        problem: with the run's weights.
        manifest: the run.
        output: where tiles go.
        device: of the engines.
        concurrent_puts: of chunks, by one worker.
    """

    problem: Problem
    manifest: Manifest
    output: Output
    device: str = "cpu"
    concurrent_puts: int = 1


class Executor(Protocol):
    """Where the workers are."""

    def plan(
        self, problem: Problem, name: str | None, check: Callable[[], None], before: JobPlan | None = None
    ) -> JobPlan:
        """Plan a run where it will be computed; see `make_plan`. `check` raises what stops the run."""

    def execute(self, work: Work, tiles: Sequence[Tile], tally: Tally, check: Callable[[], None]) -> None:
        """Compute tiles, dearest first; the tally is told of each once it is written, in the order they finish."""

    def reference(self, problem: Problem, samples: int, tell: Callable[[str], None]) -> Reference | None:
        """Return where the proof's products are computed, so many samples at a time; None for the proof's process."""


class Serial:
    """This process.

    Args:
        settings: how to compute.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def plan(
        self,
        problem: Problem,
        name: str | None,
        check: Callable[[], None],  # noqa: ARG002
        before: JobPlan | None = None,
    ) -> JobPlan:
        """See `make_plan`."""
        return make_plan(problem, self._settings, name, before=before)

    def execute(self, work: Work, tiles: Sequence[Tile], tally: Tally, check: Callable[[], None]) -> None:
        """See `serial`."""
        serial(work, tiles, tally, check)

    def reference(self, problem: Problem, samples: int, tell: Callable[[str], None]) -> None:
        """None: see `Executor`."""


def serial(work: Work, tiles: Sequence[Tile], tally: Tally, check: Callable[[], None]) -> None:
    """Compute tiles one after the other in this process.

    Args:
        work: the run.
        tiles: what to compute, in this order.
        tally: told about each, once it is written.
        check: called before each; raises what stops the run.
    """
    worker = Worker(work.problem, work.manifest, work.output, work.device, work.concurrent_puts)
    try:
        for k, tile in enumerate(tiles):
            check()
            tally.staffed(1, len(tiles) - k - 1)
            tally.finished(worker.compute(tile))
        tally.finished(worker.flush())
    finally:
        worker.close()
