"""Executors: ways to run a plan's tiles. The serial one is the specification; Ray is one file beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.manifest import Manifest
from pipeline.output import Output
from pipeline.problem import Problem
from pipeline.receipts import Receipt
from pipeline.tally import Tally
from pipeline.tiling import Tile
from pipeline.worker import Worker


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


def serial(work: Work, tiles: Sequence[Tile], tally: Tally, check: Callable[[], None]) -> Iterator[Receipt]:
    """Compute tiles one after the other in this process.

    Args:
        work: the run.
        tiles: what to compute, in this order.
        tally: told about each.
        check: called before each; raises what stops the run.

    Yields:
        A receipt for each tile, once it is written.
    """
    worker = Worker(work.problem, work.manifest, work.output, work.device, work.concurrent_puts)
    try:
        for k, tile in enumerate(tiles):
            check()
            tally.staffed(1, len(tiles) - k - 1)
            yield from _noted(worker.compute(tile), tally)
        yield from _noted(worker.flush(), tally)
    finally:
        worker.close()


def _noted(receipts: Sequence[Receipt], tally: Tally) -> Sequence[Receipt]:
    for receipt in receipts:
        tally.finished(receipt)
    return receipts
