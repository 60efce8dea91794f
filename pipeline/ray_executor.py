"""Tiles on Ray: one actor per GPU or share of CPUs, `ray.wait` for answers, no tile through the object store.

The driver owns queue, attempts and actors; an actor owns nothing, and is never restarted by Ray.
"""

import itertools
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util import metrics

from pipeline.driver import Answer, Driver, Loss
from pipeline.errors import WorkerError
from pipeline.executors import Work
from pipeline.manifest import Manifest
from pipeline.output import Output
from pipeline.receipts import Receipt
from pipeline.spec import Settings
from pipeline.tally import Tally
from pipeline.tiling import Tile
from pipeline.worker import Worker

WIND_DOWN_SECONDS = 1.5  # at the end of a run that was cut off, for what is being written; Ray kills jobs after three


class _Actor:
    """A worker in a process of its own."""

    def __init__(
        self, problem: bytes, manifest: Manifest, output: Output, device: str, puts: int, threads: int
    ) -> None:
        self._make = lambda: Worker(ray.cloudpickle.loads(problem), manifest, output, device, puts)
        self._threads = threads
        self._worker: Worker | None = None

    def start(self) -> str:
        """Make the worker, on the thread that is going to compute; gives the node."""
        torch.set_num_threads(self._threads)
        self._worker = self._make()
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def compute(self, tile: Tile | None, attempt: int) -> list[Receipt]:
        """Compute a tile, or none: then finish what is being written."""
        assert self._worker is not None  # noqa: S101
        return self._worker.flush() if tile is None else self._worker.compute(tile, attempt)

    @ray.method(concurrency_group="wind_down")
    def wind_down(self, seconds: float) -> None:
        """Wait for what is being written, while `compute` may still be at work."""
        if self._worker is not None:
            self._worker.wait_for_writer(seconds)


def execute(
    work: Work,
    tiles: Sequence[Tile],
    settings: Settings,
    workers: int,
    tally: Tally,
    check: Callable[[], None],
) -> Iterator[Receipt]:
    """Compute tiles on Ray workers.

    Args:
        work: the run.
        tiles: what to compute, dearest first.
        settings: shares of CPUs and GPUs, cluster address, deadline.
        workers: how many actors.
        tally: told about all that happens.
        check: called every few seconds; raises what stops the run.

    Yields:
        A receipt for each tile, once it is written, in the order they finish.

    Raises:
        WorkerError: actors cannot be started.
        TileError: tiles failed too often.
        HessianError: what a worker raised that no second attempt would mend.
    """
    with _ray(settings, workers):
        pool = _Pool(work, settings)
        tally.listeners.append(_Metrics())
        try:
            yield from Driver(pool, tiles, workers, tally, settings.tile_deadline, check).receipts()
        finally:
            pool.stop()


class _Pool:
    """Actors, as `pipeline.driver.Pool`."""

    def __init__(self, work: Work, settings: Settings) -> None:
        shares = {"num_cpus": settings.cpus_per_worker, "num_gpus": settings.gpus_per_worker}
        actor = ray.remote(concurrency_groups={"wind_down": 1})(_Actor)  # type: ignore[call-overload]
        self._class = actor.options(**shares, max_restarts=0, max_task_retries=0)
        threads = settings.cpus_per_worker
        self._arguments = (
            ray.put(_pickle(work)), work.manifest, work.output, work.device, work.concurrent_puts, threads,
        )  # fmt: skip
        self._numbers = itertools.count()
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._calls: dict[Any, int] = {}  # in the order they were made
        self._draining: set[str] = set()

    def now(self) -> float:
        return time.monotonic()

    def start(self) -> int:
        number = next(self._numbers)
        self._actors[number] = self._class.remote(*self._arguments)
        self._calls[self._actors[number].start.remote()] = number
        return number

    def call(self, worker: int, tile: Tile | None, attempt: int) -> None:
        self._calls[self._actors[worker].compute.remote(tile, attempt)] = worker

    def answers(self, seconds: float) -> list[Answer]:
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=1, timeout=seconds)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return [self._answer(reference, self._calls.pop(reference)) for reference in ready]

    def end(self, worker: int) -> None:
        ray.kill(self._actors.pop(worker))
        for reference in [r for r, other in self._calls.items() if other == worker]:
            del self._calls[reference]

    def look(self) -> tuple[set[str], set[str]]:
        self._draining = set(ray._private.state.state.get_draining_nodes())
        return self._draining, {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def stop(self) -> None:
        """End all actors; those that are writing get a moment to finish."""
        ending = [actor.wind_down.remote(WIND_DOWN_SECONDS) for actor in self._actors.values()]
        if ending:
            ray.wait(ending, num_returns=len(ending), timeout=WIND_DOWN_SECONDS)
        for worker in list(self._actors):
            self.end(worker)

    def _answer(self, reference: Any, worker: int) -> Answer:
        try:
            found: str | list[Receipt] = ray.get(reference)
        except RayTaskError as error:
            return Answer(worker, loss=Loss.ERROR, error=error.cause)
        except RayError as error:
            return Answer(worker, loss=self._loss(worker, error), error=_short(error))
        if isinstance(found, str):
            self._nodes[worker] = found
            return Answer(worker, node=found)
        return Answer(worker, found)

    def _loss(self, worker: int, error: RayError) -> Loss:
        """Say why an actor is gone."""
        # Ray knows of an actor that its memory monitor killed only by words.
        if isinstance(error, OutOfMemoryError) or "low on memory" in str(error):
            return Loss.MEMORY
        going = self._nodes.get(worker) in self._draining
        return Loss.PREEMPTED if going or getattr(error, "preempted", False) else Loss.DIED


class _Metrics:
    """What happens, as metrics of the Ray cluster."""

    def __init__(self) -> None:
        self._tiles = metrics.Counter("hessian_tiles", "Tiles stored.")
        self._bytes = metrics.Counter("hessian_bytes", "Bytes put.")
        self._seconds = metrics.Histogram(
            "hessian_tile_seconds", "Of computing and writing a tile.", boundaries=[0.1, 1, 10, 60, 300, 1800]
        )
        self._retries = metrics.Counter("hessian_retries", "Tiles that a lost worker leaves.", tag_keys=("loss",))
        self._set_aside = metrics.Counter("hessian_tiles_set_aside", "Tiles that failed too often.")
        self._workers = metrics.Gauge("hessian_workers", "Workers that are up.")
        self._queued = metrics.Gauge("hessian_queue_depth", "Tiles that no worker has.")

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Listen to a tally."""
        if event == "tile done":
            self._tiles.inc(1)
            self._bytes.inc(fields["bytes"])
            self._seconds.observe(fields["seconds"])
        elif event == "worker lost" and fields["tiles"]:
            self._retries.inc(len(fields["tiles"]), {"loss": fields["loss"]})
        elif event == "tile set aside":
            self._set_aside.inc(1)
        elif event == "staff":
            self._workers.set(fields["workers"])
            self._queued.set(fields["queued"])


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
        # "local": else Ray would join whatever other Ray was started on this machine.
        options |= {"address": "local", "num_cpus": workers * settings.cpus_per_worker, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(f"cannot start or join Ray at {settings.address or 'this machine'}: {error}") from error
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray put one in its place that aborts
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
    # By the folder's name: what a .pth file or the system's own Python adds lies in none of this environment's folders.
    if {"site-packages", "dist-packages"} & set(Path(file).parts):
        return False
    return not any(
        Path(file).is_relative_to(folder) for folder in (sysconfig.get_path("stdlib"), Path(__file__).parent)
    )


def _short(error: RayError) -> WorkerError:
    """Say in one line what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[-1] if isinstance(error, RayActorError) else " ".join(lines)) if lines else ""
    return WorkerError(f"{type(error).__name__}: {text[:500]}")
