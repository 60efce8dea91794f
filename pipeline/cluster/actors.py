"""Ray actors: one per GPU or share of CPUs, `ray.wait` for answers, no tile through the object store.

The driver owns queue, attempts and actors; an actor owns nothing, and is never restarted by Ray.
"""

import itertools
import platform
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util import metrics

from pipeline.errors import ProblemError, SpecError, WorkerError
from pipeline.execution.driver import Answer, Loss
from pipeline.execution.executors import Work
from pipeline.execution.worker import Worker
from pipeline.planning.manifest import Manifest
from pipeline.planning.placement import NODE, Node, workers_on_gpu
from pipeline.planning.tiling import Tile
from pipeline.planning.torch_environment import prepare_environment
from pipeline.preflight.devices import require_device
from pipeline.problem.problem import Problem
from pipeline.spec import Settings, device_of
from pipeline.storage.output import Output
from pipeline.storage.receipts import Receipt
from pipeline.storage.run_files import read_manifest

WIND_DOWN_SECONDS = 1.5  # at the end of a run that was cut off, for what is being written; Ray kills jobs after three


class Actor:
    """A worker in a process of its own."""

    def __init__(self, problem: bytes, manifest: Manifest, output: Output, settings: Settings) -> None:
        self._problem, self._manifest, self._output, self._settings = problem, manifest, output, settings
        self._worker: Worker | None = None

    def start(self) -> str:
        """Make the worker, on the thread that is going to compute; gives the node."""
        device = set_up(self._settings)
        _require_same_place(self._output, self._manifest)
        problem, self._problem = unpickled(self._problem), b""  # held once, not twice
        self._worker = Worker(problem, self._manifest, self._output, device, self._settings.concurrent_puts)
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


class Pool:
    """Actors, as `pipeline.execution.driver.Pool`.

    Args:
        problem: reference to what was sent.
        work: the run.
        settings: what workers take.
    """

    def __init__(self, problem: Any, work: Work, settings: Settings) -> None:
        actor = ray.remote(concurrency_groups={"wind_down": 1})(Actor)  # type: ignore[call-overload]
        self._class = actor.options(**options_of(settings), max_restarts=0, max_task_retries=0)
        self._arguments = problem, work.manifest, work.output, settings
        self._numbers = itertools.count()
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._calls: dict[Any, int] = {}  # in the order they were made
        self._draining: set[str] = set()

    def now(self) -> float:
        """Return the seconds since some moment."""
        return time.monotonic()

    def start(self) -> int:
        """Begin to start an actor; gives its number."""
        number = next(self._numbers)
        self._actors[number] = self._class.remote(*self._arguments)
        self._calls[self._actors[number].start.remote()] = number
        return number

    def call(self, worker: int, tile: Tile | None, attempt: int) -> None:
        """Have an actor compute a tile, or finish what it is writing."""
        self._calls[self._actors[worker].compute.remote(tile, attempt)] = worker

    def answers(self, seconds: float) -> list[Answer]:
        """Wait for calls to end, each actor's in the order they were made."""
        calls = list(self._calls)
        ready, _ = ray.wait(calls, num_returns=1, timeout=seconds)
        if ready:
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return [self._answer(reference, self._calls.pop(reference)) for reference in ready]

    def end(self, worker: int) -> None:
        """End an actor."""
        ray.kill(self._actors.pop(worker))
        for reference in [r for r, other in self._calls.items() if other == worker]:
            del self._calls[reference]

    def look(self) -> tuple[set[str], set[str]]:
        """Name the nodes that are being drained, and those that are alive."""
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
            return Answer(worker, loss=self._loss(worker, error), error=in_short(error))
        if isinstance(found, str):
            self._nodes[worker] = found
            return Answer(worker, node=found)
        return Answer(worker, found)

    def _loss(self, worker: int, error: RayError) -> Loss:
        """Return why an actor is gone."""
        # Ray knows of an actor that its memory monitor killed only by words.
        if isinstance(error, OutOfMemoryError) or "low on memory" in str(error):
            return Loss.MEMORY
        if self._nodes.get(worker) in self._draining or getattr(error, "preempted", False):
            return Loss.PREEMPTED
        # Of a process that died Ray knows at once; unavailable is one whose node does not answer either.
        away = isinstance(error, ActorUnavailableError) or "its node has died" in str(error)
        return Loss.NODE if away else Loss.DIED


class Metrics:
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


def set_up(settings: Settings) -> str:
    """Hand this process its threads and its share of a GPU.

    Args:
        settings: how to compute.

    Returns:
        The device of the engines.
    """
    prepare_environment()
    torch.set_num_threads(settings.cpus_per_worker)
    device = device_of(settings)
    require_device(device)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1 / workers_on_gpu(settings.gpus_per_worker))
    return device


def _require_same_place(output: Output, manifest: Manifest) -> None:
    """Refuse a folder that is another one on this node: its tiles would be missing where the run began."""
    found = read_manifest(output)
    if found is None or found.digest != manifest.digest:
        raise SpecError(
            f"output {output.url}: is not the same place on node {platform.node()}, where the run's manifest is not "
            "in it: take a bucket, or a folder that all nodes share"
        )


def options_of(settings: Settings, node: Node | None = None) -> dict[str, Any]:
    """Return what Ray is to place a worker by, anywhere or on a given node."""
    labels = {**(settings.label_selector or {}), **({NODE: node.id} if node else {})}
    return {
        "num_cpus": settings.cpus_per_worker,
        "num_gpus": settings.gpus_per_worker,
        "resources": settings.resources or {},
        "label_selector": labels,
    }


def pickled(problem: Problem) -> bytes:
    """Serialise the problem, with the source of modules that are not installed: no worker could import them."""
    # By name: a module may have been imported under two.
    modules = {module.__name__: module for module in list(sys.modules.values()) if _is_user_code(module)}
    for module in modules.values():
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        blob: bytes = ray.cloudpickle.dumps(problem)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ProblemError(
            f"the problem cannot be sent to Ray workers ({error}): define model and loss so that they can be pickled, "
            "or use executor=serial"
        ) from error
    finally:
        for module in modules.values():
            ray.cloudpickle.unregister_pickle_by_value(module)
    return blob


def unpickled(blob: bytes) -> Problem:
    """Return what `pickled` made in the driver: it comes by Ray's object store, never from a spec or an output."""
    problem: Problem = ray.cloudpickle.loads(blob)
    return problem


def _is_user_code(module: ModuleType) -> bool:
    """Whether a module comes from a file that lies neither in an installation nor in this package."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or module.__name__ == "__main__":  # __main__ is pickled by value anyway
        return False
    path, ours = Path(file), (Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1])
    # By the folders' names: an environment may lie on top of another one.
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return not installed and not any(path.is_relative_to(folder) for folder in ours)


def in_short(error: RayError) -> WorkerError:
    """Return in one line what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[-1] if isinstance(error, RayActorError) else " ".join(lines)) if lines else ""
    return WorkerError(f"{type(error).__name__}: {text[:500]}")
