"""Tiles on Ray: one actor per GPU or share of CPUs, our own loop over `ray.wait`, no tile through the object store.

The driver owns the queue, the attempts and the actors; an actor owns nothing. An actor that dies, or fails, is
replaced, and its unfinished tiles go back into the queue.
"""

import os
import sys
import sysconfig
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.errors import BAD_INPUT, HessianError, NotFiniteError, TileError, WorkerError
from pipeline.executors import Work
from pipeline.manifest import Manifest
from pipeline.output import Output
from pipeline.receipts import Receipt
from pipeline.spec import Settings
from pipeline.tiling import Tile
from pipeline.worker import Worker

IN_FLIGHT = 2  # calls per actor: one running, one waiting, so that it never waits for the driver
MOST_ATTEMPTS = 3  # of a tile
MOST_FAILED_STARTS = 3  # of actors, in a row
START_SECONDS = 300  # for the first actor: a cluster may have to add a node


class _Actor:
    """A worker in a process of its own."""

    def __init__(
        self, problem: bytes, manifest: Manifest, output: Output, device: str, puts: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._worker = Worker(ray.cloudpickle.loads(problem), manifest, output, device, puts)

    def compute(self, tile: Tile, attempt: int) -> list[Receipt]:
        return self._worker.compute(tile, attempt)

    def flush(self) -> list[Receipt]:
        return self._worker.flush()


@dataclass(eq=False)
class _Handle:
    """An actor as the driver sees it."""

    actor: Any
    started: bool = False
    in_flight: int = 0
    owed: dict[str, Tile] = field(default_factory=dict)  # tiles given to it that have no receipt yet


def execute(work: Work, tiles: Sequence[Tile], settings: Settings, workers: int) -> Iterator[Receipt]:
    """Compute tiles on Ray workers.

    Args:
        work: the run.
        tiles: what to compute, dearest first.
        settings: shares of CPUs and GPUs, cluster address.
        workers: how many actors.

    Yields:
        A receipt for each tile, once it is written, in the order they finish.

    Raises:
        WorkerError: actors cannot be started.
        TileError: a tile failed too often.
        HessianError: what a worker raised that no second attempt would mend.
    """
    with _ray(settings, workers):
        pool = _Pool(work, deque(tiles), settings)
        try:
            for _ in range(min(workers, len(tiles))):
                pool.start_actor()
            yield from pool.receipts()
        finally:
            pool.stop()


class _Pool:
    """The driver's loop."""

    def __init__(self, work: Work, queue: deque[Tile], settings: Settings) -> None:
        self._queue = queue
        self._unfinished = {tile.id for tile in queue}
        self._attempts: Counter[str] = Counter()
        self._handles: list[_Handle] = []
        self._calls: dict[Any, _Handle] = {}
        self._failed_starts = 0
        self._shares = {"num_cpus": settings.cpus_per_worker, "num_gpus": settings.gpus_per_worker}
        self._actor = ray.remote(_Actor).options(**self._shares, max_restarts=0, max_task_retries=0)
        self._arguments = (
            ray.put(_pickle(work)),
            work.manifest,
            work.output,
            work.device,
            work.concurrent_puts,
            settings.cpus_per_worker,
        )

    def start_actor(self) -> None:
        """Start one more actor; its first call tells whether it came up."""
        handle = _Handle(self._actor.remote(*self._arguments))
        self._handles.append(handle)
        self._call(handle, None)

    def receipts(self) -> Iterator[Receipt]:
        """Feed actors and collect receipts until no tile is left."""
        while self._unfinished:
            reference = self._next_answer()
            handle = self._calls.pop(reference)
            handle.in_flight -= 1
            try:
                receipts: list[Receipt] = ray.get(reference)
            except RayError as error:
                self._lost(handle, error)
                continue
            handle.started, self._failed_starts = True, 0
            for receipt in receipts:
                handle.owed.pop(receipt.tile, None)
                self._unfinished.discard(receipt.tile)
                yield receipt
            self._feed(handle)

    def _next_answer(self) -> Any:
        """Wait for a call to end; actors for which the cluster has no room stay pending, and do not matter."""
        patience = None if any(handle.started for handle in self._handles) else START_SECONDS
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=patience)
        if not ready:
            raise WorkerError(
                f"no worker started within {START_SECONDS} s: asked for {self._shares}, "
                f"the cluster has {ray.cluster_resources()}; lower cpus_per_worker or gpus_per_worker, or add nodes"
            )
        return ready[0]

    def stop(self) -> None:
        """End all actors."""
        for handle in self._handles:
            ray.kill(handle.actor)
        self._handles.clear()

    def _feed(self, handle: _Handle) -> None:
        """Give an actor its next tiles; when there are none, have it finish what it is writing."""
        while self._queue and handle.in_flight < IN_FLIGHT:
            self._call(handle, self._queue.popleft())
        if handle.in_flight == 0 and handle.owed:
            self._call(handle, None)

    def _call(self, handle: _Handle, tile: Tile | None) -> None:
        """Call an actor: a tile to compute, or None to flush."""
        if tile is None:
            reference = handle.actor.flush.remote()
        else:
            self._attempts[tile.id] += 1
            handle.owed[tile.id] = tile
            reference = handle.actor.compute.remote(tile, self._attempts[tile.id])
        handle.in_flight += 1
        self._calls[reference] = handle

    def _lost(self, handle: _Handle, error: RayError) -> None:
        """Replace an actor that died or failed, and put its unfinished tiles back."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, NotFiniteError) or (isinstance(cause, HessianError) and cause.exit_code == BAD_INPUT):
            raise cause
        for reference in [r for r, other in self._calls.items() if other is handle]:
            del self._calls[reference]
        self._handles.remove(handle)
        ray.kill(handle.actor)
        if not handle.started:
            self._count_failed_start(cause)
        for owed in handle.owed.values():
            if self._attempts[owed.id] >= MOST_ATTEMPTS:
                raise TileError(
                    f"tile {owed.id} failed {MOST_ATTEMPTS} times, the last time with {_short(cause)}; "
                    "finished tiles are kept, run the same job again to go on"
                )
            self._queue.appendleft(owed)
        if self._queue:
            self.start_actor()
            for idle in [h for h in self._handles if h.started]:
                self._feed(idle)

    def _count_failed_start(self, cause: BaseException) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise WorkerError(f"{MOST_FAILED_STARTS} workers in a row did not start: {_short(cause)}")


@contextmanager
def _ray(settings: Settings, workers: int) -> Iterator[None]:
    """Join the Ray that is running, or start one on this machine and end it afterwards."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if settings.address is not None:
        options["address"] = settings.address
    elif "RAY_ADDRESS" not in os.environ:
        options |= {"num_cpus": workers * settings.cpus_per_worker, "include_dashboard": False}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(f"cannot start or join Ray at {settings.address or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _pickle(work: Work) -> bytes:
    """Serialise the problem, with the source of modules that are not installed: no worker could import them."""
    modules = [module for module in list(sys.modules.values()) if _is_user_code(module)]
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        blob: bytes = ray.cloudpickle.dumps(work.problem)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise WorkerError(
            f"the problem cannot be sent to Ray workers ({error}): define model and loss so that they can be pickled, "
            "or use executor=serial"
        ) from error
    finally:
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)
    return blob


def _is_user_code(module: ModuleType) -> bool:
    """Say whether a module comes from a file that lies neither in an installation nor in this package."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or module.__name__ == "__main__":  # __main__ is pickled by value anyway
        return False
    installed = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    return not any(Path(file).is_relative_to(folder) for folder in (*installed, Path(__file__).parent))


def _short(cause: BaseException) -> str:
    """Say an error in one line."""
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = lines[-1] if isinstance(cause, RayActorError) and lines else " ".join(lines)
    return f"{type(cause).__name__}: {text[:500]}"
