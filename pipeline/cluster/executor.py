"""Runs on Ray: planned on nodes that workers may be on, then computed by actors that the driver owns."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_get

from pipeline.cluster.actors import Metrics, Pool, in_short, options_of, pickled, set_up, unpickled
from pipeline.cluster.reference import There
from pipeline.errors import SpecError, WorkerError
from pipeline.execution.driver import LOOK_SECONDS, MOST_FAILED_STARTS, START_SECONDS, Driver
from pipeline.execution.events import Tally
from pipeline.execution.executors import Work
from pipeline.planning.job_plan import JobPlan, common_plan
from pipeline.planning.placement import Node, Share, Staff, names_cluster, no_room, one_of_each_kind, staff_of
from pipeline.planning.tiling import Tile
from pipeline.preflight.devices import (
    require_device,
    worker_count,
)
from pipeline.preflight.planner import make_plan
from pipeline.problem.problem import Problem
from pipeline.results.reference import Here, Reference, reference_device
from pipeline.spec import Settings, device_of


class _Planner:
    """Plans in a process of its own, where a worker would be."""

    def __init__(self, problem: bytes) -> None:
        self._problem = unpickled(problem)

    def plan(self, settings: Settings, name: str | None, staff: Staff) -> JobPlan:
        """Plan; see `make_plan`."""
        set_up(settings)
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

    def plan(
        self,
        problem: Problem,
        name: str | None,
        check: Callable[[], None] = lambda: None,
        before: JobPlan | None = None,
    ) -> JobPlan:
        """Plan a run on one node of each kind that its workers may be on.

        Args:
            problem: with its parameters selected.
            name: of the problem, for the manifest.
            check: called every few seconds; raises what stops the run.
            before: a plan made in this process.

        Returns:
            The plan made with the least memory.

        Raises:
            SpecError: no node can have a worker, or none has a device for it.
            WorkerError: Ray, or a process on a node, cannot be started.
            HessianError: whatever `make_plan` raises.
        """
        on_cpu = device_of(self._settings) == "cpu"
        if on_cpu and _starts_here() and _is_plain(self._settings):
            pickled(problem)  # one that cannot be sent is refused before anything is computed
            return make_plan(
                problem, self._settings, name, before=before
            )  # on this machine, before Ray is started on it
        for _ in range(MOST_FAILED_STARTS):
            try:
                return self._plan_there(problem, name, check, on_cpu=on_cpu)
            except RayError as error:  # of a process or a node that is lost; others raise what they say
                lost = error
        raise WorkerError(f"{MOST_FAILED_STARTS} workers in a row did not start: {in_short(lost)}") from lost

    def _plan_there(self, problem: Problem, name: str | None, check: Callable[[], None], *, on_cpu: bool) -> JobPlan:
        """Plan on one node of each kind, as long as none of them is lost."""
        nodes = self._nodes()
        staff, kinds = staff_of(nodes, self._settings), one_of_each_kind(nodes, self._settings)
        room = Share.of(self._settings).room
        staffs = [Staff(staff.workers, min(staff.workers, room(node))) for node in kinds]
        sent = self._send(problem)
        if on_cpu and [node.id for node in kinds] == [ray.get_runtime_context().get_node_id()]:
            return make_plan(problem, self._settings, name, staffs[0])
        why = f"nodes are busy: {'; '.join(map(str, kinds))}" if kinds else no_room(nodes, self._settings)
        planner: Any = ray.remote(_Planner)
        places: list[Node | None] = [*kinds] or [None]  # where a node comes for it
        actors = [planner.options(**options_of(self._settings, node)).remote(sent) for node in places]
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

    def execute(self, work: Work, tiles: Sequence[Tile], tally: Tally, check: Callable[[], None]) -> None:
        """Compute tiles on Ray workers.

        Args:
            work: the run.
            tiles: what to compute, dearest first.
            tally: told about all that happens.
            check: called every few seconds; raises what stops the run.

        Raises:
            SpecError: no node can have a worker, or the output is another place on one.
            WorkerError: actors cannot be started.
            TileError: tiles failed too often.
            HessianError: what a worker raised that no second attempt would mend.
        """
        workers = staff_of(self._nodes(), self._settings).workers
        pool = Pool(self._send(work.problem), work, self._settings)
        tally.listeners.append(Metrics())
        try:
            Driver(pool, tiles, workers, tally, self._settings.tile_deadline, check).run()
        finally:
            pool.stop()

    def reference(self, problem: Problem, samples: int, tell: Callable[[str], None]) -> Reference | None:
        """Have the proof's products computed on a worker's GPU; see `There`.

        Args:
            problem: with the run's weights.
            samples: at a time.
            tell: is told of a worker that is lost.

        Returns:
            It, until the context ends; None where workers have no GPU, or this machine has one.
        """
        if not _has_a_better_place(self._settings):
            return None
        there = There(self._send(problem), samples, self._settings, Here(problem, samples, reference_device()), tell)
        self._joined.callback(there.end)
        return there

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
        if (self._fixed or _is_fixed()) and not one_of_each_kind(nodes, self._settings):
            raise SpecError(f"{no_room(nodes, self._settings)}: ask for what there is, or add nodes")
        return nodes

    def _send(self, problem: Problem) -> Any:
        """Put a problem into the object store, once, from where each node fetches it once."""
        if self._sent is None or self._sent[0] is not problem:
            self._sent = problem, ray.put(pickled(problem))
        return self._sent[1]


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
    """Return what a planner returned, or raise what it raised, as if it had been here."""
    try:
        plan: JobPlan = ray.get(call)
    except RayTaskError as error:
        raise error.cause from None
    return plan


def _starts_here() -> bool:
    """Whether this process has no Ray yet; one that it has is joined as it is, and never ended."""
    return not ray.is_initialized()


def _has_a_better_place(settings: Settings) -> bool:
    """Whether workers have a GPU for the proof's products, and this machine has none."""
    return device_of(settings) == "cuda" and reference_device() == "cpu"


def _is_plain(settings: Settings) -> bool:
    """Whether workers may be anywhere on this machine."""
    return not (names_cluster(settings) or settings.gpus_per_worker or settings.resources or settings.label_selector)


def _is_fixed() -> bool:
    """Whether a cluster is known to get no more nodes by itself."""
    # Ray's monitor makes up a type for each node, of its ID or address, where it has no configuration to add nodes by.
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    types = status.get("autoscaler_report", {}).get("node_type_mapping") or {}
    return bool(types) and all(kind == f"node_{name}" for name, kind in types.items())


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    """Join the Ray that settings name, or start one on this machine; leave it afterwards, or end it."""
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if settings.address is not None:
        options["address"] = settings.address.plain
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
