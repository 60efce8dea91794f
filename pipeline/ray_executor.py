"""Tiles on Ray: one actor per GPU or share of CPUs, `ray.wait` for answers, no tile through the object store.

The driver owns queue, attempts and actors; an actor owns nothing, and is never restarted by Ray. Before, a run is
planned on nodes that its workers may be on.
"""

import itertools
import json
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
import torch
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.experimental.internal_kv import _internal_kv_get
from ray.util import metrics

from pipeline.devices import device_of, require_device, worker_count
from pipeline.driver import LOOK_SECONDS, MOST_FAILED_STARTS, START_SECONDS, Answer, Driver, Loss
from pipeline.errors import SpecError, WorkerError
from pipeline.executors import Work
from pipeline.jobplan import JobPlan, common_plan
from pipeline.manifest import Manifest
from pipeline.output import Output
from pipeline.placement import (
    NODE,
    Node,
    Share,
    Staff,
    names_cluster,
    no_room,
    one_of_each_kind,
    staff_of,
    workers_on_gpu,
)
from pipeline.planner import make_plan
from pipeline.problem import Problem
from pipeline.receipts import Receipt
from pipeline.spec import Settings
from pipeline.tally import Tally
from pipeline.tiling import Tile
from pipeline.worker import Worker

WIND_DOWN_SECONDS = 1.5  # at the end of a run that was cut off, for what is being written; Ray kills jobs after three


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, problem: bytes, manifest: Manifest, output: Output, settings: Settings) -> None:
        self._problem, self._manifest, self._output, self._settings = problem, manifest, output, settings
        self._worker: Worker | None = None

    def start(self) -> str:
        """Make the worker, on the thread that is going to compute; gives the node."""
        device = _set_up(self._settings)
        problem, self._problem = ray.cloudpickle.loads(self._problem), b""  # held once, not twice
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


class _Planner:
    """Plans in a process of its own, where a worker would be."""

    def __init__(self, problem: bytes) -> None:
        self._problem = ray.cloudpickle.loads(problem)

    def plan(self, settings: Settings, name: str | None, staff: Staff) -> JobPlan:
        """Plan; see `make_plan`."""
        _set_up(settings)
        return make_plan(self._problem, settings, name, staff)


class Cluster:
    """A Ray cluster, joined when it is first needed, or started on this machine and ended with the context.

    Args:
        settings: what workers take, which cluster, and how to compute.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._joined = ExitStack()
        self._fixed = False  # whether no nodes can come
        self._sent: tuple[Problem, Any] | None = None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._joined.close()

    def plan(self, problem: Problem, name: str | None, check: Callable[[], None] = lambda: None) -> JobPlan:
        """Plan a run on one node of each kind that its workers may be on.

        Args:
            problem: with its parameters selected.
            name: of the problem, for the manifest.
            check: called every few seconds; raises what stops the run.

        Returns:
            The plan made with the least memory.

        Raises:
            SpecError: no node can have a worker, or none has a device for it.
            WorkerError: Ray, or a process on a node, cannot be started.
            HessianError: whatever `make_plan` raises.
        """
        on_cpu = device_of(self._settings) == "cpu"
        if on_cpu and _starts_here() and _is_plain(self._settings):
            return make_plan(problem, self._settings, name)  # on this machine, before Ray is started on it
        for _ in range(MOST_FAILED_STARTS):
            try:
                return self._plan_there(problem, name, check, on_cpu=on_cpu)
            except RayError as error:  # of a process or a node that is lost; others raise what they say
                lost = error
        raise WorkerError(f"{MOST_FAILED_STARTS} workers in a row did not start: {_short(lost)}") from lost

    def _plan_there(self, problem: Problem, name: str | None, check: Callable[[], None], *, on_cpu: bool) -> JobPlan:
        """Plan on one node of each kind, as long as none of them is lost."""
        nodes = self._nodes()
        staff, kinds = staff_of(nodes, self._settings), one_of_each_kind(nodes, self._settings)
        room = Share.of(self._settings).room
        staffs = [Staff(staff.workers, min(staff.workers, room(node))) for node in kinds]
        if on_cpu and [node.id for node in kinds] == [ray.get_runtime_context().get_node_id()]:
            return make_plan(problem, self._settings, name, staffs[0])
        why = f"nodes are busy: {'; '.join(map(str, kinds))}" if kinds else no_room(nodes, self._settings)
        planner: Any = ray.remote(_Planner)
        places: list[Node | None] = [*kinds] or [None]  # where a node comes for it
        sent = self._send(problem)
        actors = [planner.options(**_options(self._settings, node)).remote(sent) for node in places]
        try:
            if not _ended([actor.__ray_ready__.remote() for actor in actors], kinds, check, START_SECONDS):
                raise WorkerError(f"no place to plan within {START_SECONDS} s: {why}; run the same command again")
            staffs = staffs or [staff]
            calls = [a.plan.remote(self._settings, name, own) for a, own in zip(actors, staffs, strict=True)]
            _ended(calls, kinds, check)
            return common_plan([_outcome(call) for call in calls])
        finally:
            for actor in actors:
                ray.kill(actor)

    def execute(
        self, work: Work, tiles: Sequence[Tile], tally: Tally, check: Callable[[], None]
    ) -> Generator[Receipt, None, None]:
        """Compute tiles on Ray workers.

        Args:
            work: the run.
            tiles: what to compute, dearest first.
            tally: told about all that happens.
            check: called every few seconds; raises what stops the run.

        Yields:
            A receipt for each tile, once it is written, in the order they finish.

        Raises:
            SpecError: no node can have a worker.
            WorkerError: actors cannot be started.
            TileError: tiles failed too often.
            HessianError: what a worker raised that no second attempt would mend.
        """
        workers = staff_of(self._nodes(), self._settings).workers
        pool = _Pool(self._send(work.problem), work, self._settings)
        tally.listeners.append(_Metrics())
        try:
            yield from Driver(pool, tiles, workers, tally, self._settings.tile_deadline, check).receipts()
        finally:
            pool.stop()

    def _nodes(self) -> list[Node]:
        """Join the cluster, and give its nodes.

        Returns:
            Those that are alive.

        Raises:
            SpecError: none of them can have a worker, and no others will come.
        """
        if _starts_here():
            self._fixed = not names_cluster(self._settings)
            self._joined.enter_context(_ray(self._settings))
        nodes = [Node(n["NodeID"], n["Resources"], n["Labels"]) for n in ray.nodes() if n["Alive"]]
        if (self._fixed or _is_fixed(nodes)) and not one_of_each_kind(nodes, self._settings):
            raise SpecError(f"{no_room(nodes, self._settings)}: ask for what there is, or add nodes")
        return nodes

    def _send(self, problem: Problem) -> Any:
        """Put a problem into the object store, once, from where each node fetches it once."""
        if self._sent is None or self._sent[0] is not problem:
            self._sent = problem, ray.put(_pickle(problem))
        return self._sent[1]


def _set_up(settings: Settings) -> str:
    """Give this process its threads and its share of a GPU.

    Args:
        settings: how to compute.

    Returns:
        The device of the engines.
    """
    torch.set_num_threads(settings.cpus_per_worker)
    device = device_of(settings)
    require_device(device)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1 / workers_on_gpu(settings.gpus_per_worker))
    return device


def _options(settings: Settings, node: Node | None = None) -> dict[str, Any]:
    """Give what Ray is to place a worker by, anywhere or on a given node."""
    labels = {**(settings.label_selector or {}), **({NODE: node.id} if node else {})}
    return {
        "num_cpus": settings.cpus_per_worker,
        "num_gpus": settings.gpus_per_worker,
        "resources": settings.resources or {},
        "label_selector": labels,
    }


def _ended(
    calls: Sequence[Any], nodes: Sequence[Node], check: Callable[[], None], seconds: float = float("inf")
) -> bool:
    """Wait for calls to end.

    Args:
        calls: references.
        nodes: where they are made.
        check: called every few seconds.
        seconds: to wait at most.

    Returns:
        Whether all have.

    Raises:
        NodeDiedError: a node is gone; calls to one that cannot be reached would not end.
    """
    end, left = time.monotonic() + seconds, list(calls)
    while left and time.monotonic() < end:
        check()
        _, left = ray.wait(left, num_returns=len(left), timeout=LOOK_SECONDS)
        if left and not {node.id for node in nodes} <= {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            raise NodeDiedError("a node that a run was planned on is gone")
    return not left


def _outcome(call: Any) -> JobPlan:
    """Give what a planner returned, or raise what it raised, as if it had been here."""
    try:
        plan: JobPlan = ray.get(call)
    except RayTaskError as error:
        raise error.cause from None
    return plan


class _Pool:
    """Actors, as `pipeline.driver.Pool`.

    Args:
        problem: reference to what was sent.
        work: the run.
        settings: what workers take.
    """

    def __init__(self, problem: Any, work: Work, settings: Settings) -> None:
        actor = ray.remote(concurrency_groups={"wind_down": 1})(_Actor)  # type: ignore[call-overload]
        self._class = actor.options(**_options(settings), max_restarts=0, max_task_retries=0)
        self._arguments = problem, work.manifest, work.output, settings
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
        if self._nodes.get(worker) in self._draining or getattr(error, "preempted", False):
            return Loss.PREEMPTED
        # Of a process that died Ray knows at once; unavailable is one whose node does not answer either.
        away = isinstance(error, ActorUnavailableError) or "its node has died" in str(error)
        return Loss.NODE if away else Loss.DIED


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


def _starts_here() -> bool:
    """Say whether this process has no Ray yet; one that it has is joined as it is, and never ended."""
    return not ray.is_initialized()


def _is_plain(settings: Settings) -> bool:
    """Say whether workers may be anywhere on this machine."""
    return not (names_cluster(settings) or settings.gpus_per_worker or settings.resources or settings.label_selector)


def _is_fixed(nodes: Sequence[Node]) -> bool:
    """Say whether a cluster is known to get no more nodes by itself."""
    # Ray's monitor makes up a type of its own for each node where it has no configuration to add nodes by.
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    types = status.get("autoscaler_report", {}).get("node_type_mapping") or {}
    return bool(types) and all(types.get(node.id, f"node_{node.id}") == f"node_{node.id}" for node in nodes)


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    """Join the Ray that settings name, or start one on this machine; leave it afterwards, or end it."""
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if settings.address is not None:
        options["address"] = settings.address
    elif not names_cluster(settings):
        if device_of(settings) == "cuda":
            require_device("cuda")
        cpus = worker_count(settings) * settings.cpus_per_worker
        # "local": else Ray would join whatever other Ray was started on this machine.
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
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


def _pickle(problem: Problem) -> bytes:
    """Serialise the problem, with the source of modules that are not installed: no worker could import them."""
    # By name: a module may have been imported under two.
    modules = {module.__name__: module for module in list(sys.modules.values()) if _is_user_code(module)}
    for module in modules.values():
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        blob: bytes = ray.cloudpickle.dumps(problem)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise WorkerError(
            f"the problem cannot be sent to Ray workers ({error}): define model and loss so that they can be pickled, "
            "or use executor=serial"
        ) from error
    finally:
        for module in modules.values():
            ray.cloudpickle.unregister_pickle_by_value(module)
    return blob


def _is_user_code(module: ModuleType) -> bool:
    """Say whether a module comes from a file that lies neither in an installation nor in this package."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or module.__name__ == "__main__":  # __main__ is pickled by value anyway
        return False
    path, ours = Path(file), (Path(sysconfig.get_path("stdlib")), Path(__file__).parent)
    # By the folders' names: an environment may lie on top of another one.
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return not installed and not any(path.is_relative_to(folder) for folder in ours)


def _short(error: RayError) -> WorkerError:
    """Say in one line what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[-1] if isinstance(error, RayActorError) else " ".join(lines)) if lines else ""
    return WorkerError(f"{type(error).__name__}: {text[:500]}")
