"""The driver's own loop against workers that only say how long they would take, by a clock that jumps ahead.

Nothing is computed and nothing stored. Workers start, compute, write one call behind, die and are pre-empted with their
nodes; the driver is `pipeline.execution.driver.Driver`, and what it takes of this processor is measured.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pipeline.errors import SpecError
from pipeline.execution.driver import Driver, Pool
from pipeline.execution.events import Tally
from pipeline.execution.virtual_pool import Circumstances, TileSeconds, VirtualPool
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.machine_profiles import Profile, at_hand
from pipeline.planning.tiling import Tile
from pipeline.storage.output import Output
from pipeline.storage.receipts import begun_tiles, own_receipt
from pipeline.storage.run_files import read_manifest


@dataclass(frozen=True)
class Simulation:
    """What became of it; all seconds are virtual, except the driver's.

    Attributes:
        workers: to be kept up.
        tiles: computed.
        bytes: put.
        bound_seconds: all computing, or all writing if that is more, shared out evenly.
        makespan_seconds: from nothing to the last receipt, workers' start included.
        tail_seconds: of it, after the first worker found nothing more to do.
        balance: seconds at work of the mean worker, over those of the busiest.
        started: workers, in all.
        lost: tiles given to workers that did not finish them, by what became of these.
        answers: that the driver got.
        driver_seconds: of this processor, in the driver's own loop.
    """

    workers: int
    tiles: int
    bytes: int
    bound_seconds: float
    makespan_seconds: float
    tail_seconds: float
    balance: float
    started: int
    lost: Mapping[str, int]
    answers: int
    driver_seconds: float

    @property
    def efficiency(self) -> float:
        """The bound over the makespan."""
        return self.bound_seconds / self.makespan_seconds

    @property
    def bytes_per_second(self) -> float:
        """Put by all workers, over the makespan."""
        return self.bytes / self.makespan_seconds


def simulate(costs: Mapping[Tile, TileSeconds], workers: int, around: Circumstances) -> Simulation:
    """Run tiles on workers that are not there.

    Args:
        costs: by tile, dearest first.
        workers: how many are kept up.
        around: what they meet with.

    Returns:
        What became of it.
    """
    pool, tally = VirtualPool(costs, around), _Quiet()
    timed = _Timed(pool)
    begun = time.process_time()
    Driver(cast(Pool, timed), list(costs), workers, tally).run()
    driver_seconds = time.process_time() - begun - timed.seconds
    computing, writing = sum(c.compute for c in costs.values()), sum(c.write for c in costs.values())
    all_seconds = max(computing, writing) if around.overlaps else computing + writing
    return Simulation(
        workers,
        tally.done,
        tally.bytes,
        all_seconds / workers,
        pool.now(),
        pool.now() - min(pool.first_idle, pool.now()),
        pool.balance(),
        pool.started,
        dict(tally.lost),
        pool.answered,
        driver_seconds,
    )


def forecast(made: JobPlan, profile: Profile, workers: int) -> Simulation:
    """Predict a run in which nothing goes wrong.

    Args:
        made: its plan.
        profile: of its workers.
        workers: how many.

    Returns:
        What becomes of it.
    """
    around = Circumstances(start_seconds=profile.start_seconds, overlaps=profile.overlaps)
    return simulate(tile_seconds(made, profile), workers, around)


def tile_seconds(made: JobPlan, profile: Profile) -> dict[Tile, TileSeconds]:
    """Return what each tile of a plan takes of a worker, dearest first."""
    costs = {tile: made.tile_cost(tile) for tile in made.tiling.tiles()}
    found = {tile: TileSeconds(*profile.seconds(c, made.manifest.dtype), c.bytes) for tile, c in costs.items()}
    return dict(sorted(found.items(), key=lambda item: -(item[1].compute + item[1].write)))


def measured_in(made: JobPlan, output: Output) -> Profile:
    """Calibrate a plan by the receipts of a run of the same network, whatever its samples, tiles and progress.

    Args:
        made: the plan.
        output: of that run.

    Returns:
        The profile of the workers that the run had.

    Raises:
        SpecError: it was a run of something else, or has no finished tile yet.
    """
    other = read_manifest(output)
    same = other and all(getattr(other, key) == getattr(made.manifest, key) for key in ("parameters", "dtype"))
    if other is None or not same or other.engines != made.manifest.engines:
        raise SpecError(f"output {output.url}: is no run of the same parameters, type and engines: plan those first")
    then = replace(made, manifest=other)
    done = [(tile, receipt) for tile in begun_tiles(output, other) if (receipt := own_receipt(output, other, tile))]
    if not done:
        raise SpecError(f"output {output.url}: has no finished tile to calibrate by")
    planned = [then.tile_cost(tile) for tile, _ in done]
    receipts = [receipt for _, receipt in done]
    compute = sum(r.compute_seconds for r in receipts) / sum(cost.compute_seconds for cost in planned)
    write = sum(r.write_seconds for r in receipts) / sum(cost.write_seconds for cost in planned)
    device = receipts[-1].device
    name = f"workers of {output.url} ({device} of {receipts[-1].host})"
    return at_hand(overlaps=not device.startswith("cpu"), name=name, measured=(compute, write))


class _Quiet(Tally):
    """Counts, and tells nobody: no worker is lost."""

    def _tell(self, *_: Any, **__: Any) -> None:
        return


class _Timed:
    """A pool of which every call is timed, so that the driver's own time is known."""

    def __init__(self, pool: Pool) -> None:
        self.seconds, self._pool = 0.0, pool

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._pool, name)

        def timed(*arguments: Any) -> Any:
            begun = time.process_time()
            result = method(*arguments)
            self.seconds += time.process_time() - begun
            return result

        setattr(self, name, timed)
        return timed
