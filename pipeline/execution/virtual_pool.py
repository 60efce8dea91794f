"""Workers that only say how long they would take, by a clock that jumps ahead."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pipeline.execution.driver import Answer, Loss
from pipeline.planning.tiling import Tile
from pipeline.storage.receipts import Receipt
from pipeline.storage.zarr_store import StoredObject

HOUR_SECONDS = 3600.0
SLOWEST, FASTEST = 2.0, 0.5  # worker, over the mean

Event = Callable[[], "Answer | None"]


@dataclass(frozen=True)
class TileSeconds:
    """What a tile takes of a worker, and leaves: the seconds of computing and of writing it, its bytes."""

    compute: float
    write: float
    bytes: int


@dataclass(frozen=True)
class Circumstances:
    """What workers meet with.

    Attributes:
        start_seconds: of a worker, on a node that is up.
        overlaps: whether it writes while it computes; otherwise both need the same CPU.
        spread: standard deviation of workers' speeds, over their mean.
        deaths: of a worker, in an hour.
        preemptions: of a node, in an hour.
        notice_seconds: that a node is drained before it goes.
        node_seconds: until another is there in its place.
        workers_per_node: go with it.
        seed: of all that is random.
    """

    start_seconds: float = 0.0
    overlaps: bool = True
    spread: float = 0.0
    deaths: float = 0.0
    preemptions: float = 0.0
    notice_seconds: float = 30.0
    node_seconds: float = 120.0
    workers_per_node: int = 8
    seed: int = 0


@dataclass(eq=False)
class _Node:
    """A machine, and the workers on it."""

    name: str
    ready: float
    workers: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Worker:
    """A worker, as `pipeline.execution.worker.Worker` is: the receipt of a tile comes with the next call."""

    node: _Node
    slowness: float
    calls: deque[tuple[Tile | None, int]] = field(default_factory=deque)
    pending: Receipt | None = None
    written: float = 0.0  # when it is done with what it writes
    busy: float = 0.0


class VirtualPool:
    """Workers, as `pipeline.execution.driver.Pool`.

    Args:
        costs: by tile.
        around: what workers meet with.
    """

    def __init__(self, costs: Mapping[Tile, TileSeconds], around: Circumstances) -> None:
        self._costs, self._around = costs, around
        self._random = random.Random(around.seed)  # noqa: S311 - no secret
        self._clock, self._order = 0.0, itertools.count()
        self._events: list[tuple[float, int, Event]] = []
        self._workers: dict[int, _Worker] = {}
        self._nodes: dict[str, _Node] = {}
        self._draining: set[str] = set()
        self._gone = 0  # nodes that are not replaced yet
        self._busy: list[float] = []  # seconds, of workers that found nothing more to do
        self.started = self.answered = 0
        self.first_idle = float("inf")

    def now(self) -> float:
        """Return the virtual seconds since the beginning."""
        return self._clock

    def start(self) -> int:
        """Begin to start a worker."""
        number, node = self.started, self._place()
        self.started += 1
        slowness = min(max(self._random.gauss(1.0, self._around.spread), FASTEST), SLOWEST)
        self._workers[number] = _Worker(node, slowness)
        node.workers.add(number)
        up = max(self._clock, node.ready) + slowness * self._around.start_seconds
        self._at(up, number, lambda: Answer(number, node=node.name))
        if self._around.deaths:
            self._at(up + self._wait(self._around.deaths), number, lambda: self._lose(number, Loss.DIED))
        return number

    def call(self, worker: int, tile: Tile | None, attempt: int) -> None:
        """Have a worker compute a tile, or finish what it is writing."""
        self._workers[worker].calls.append((tile, attempt))
        if len(self._workers[worker].calls) == 1:
            self._begin(worker)

    def answers(self, seconds: float) -> list[Answer]:
        """Jump to the next answers, or ahead by so many seconds."""
        until, found = self._clock + seconds, list[Answer]()
        while self._events and self._events[0][0] <= (self._clock if found else until):
            self._clock, _, event = heapq.heappop(self._events)
            if answer := event():
                found.append(answer)
        self._clock = self._clock if found else until
        self.answered += len(found)
        return found

    def end(self, worker: int) -> None:
        """Let a worker go."""
        left = self._workers.pop(worker, None)
        if left is None:  # it was lost
            return
        left.node.workers.discard(worker)
        if left.busy and left.node.name not in self._draining:
            self._busy.append(left.busy)
            self.first_idle = min(self.first_idle, self._clock)

    def look(self) -> tuple[set[str], set[str]]:
        """Name the nodes that are being drained, and those that are alive."""
        return self._draining, set(self._nodes)

    def balance(self) -> float:
        """Return the mean over the most seconds that workers were busy, of those that were there to the end."""
        return sum(self._busy) / len(self._busy) / max(self._busy) if self._busy else 1.0

    def _at(self, moment: float, worker: int | None, event: Event) -> None:
        """Have something happen, if the worker it happens to is still there."""
        still = event if worker is None else lambda: event() if worker in self._workers else None
        heapq.heappush(self._events, (moment, next(self._order), still))

    def _wait(self, an_hour: float) -> float:
        """Draw the seconds until something happens that happens so often."""
        return self._random.expovariate(an_hour / HOUR_SECONDS)

    def _place(self) -> _Node:
        """Return a node with room; one in the place of a node that is gone takes its time to come."""
        for node in self._nodes.values():
            if len(node.workers) < self._around.workers_per_node and node.name not in self._draining:
                return node
        node = _Node(f"node-{next(self._order)}", self._clock + (self._around.node_seconds if self._gone else 0.0))
        self._gone = max(self._gone - 1, 0)
        self._nodes[node.name] = node
        if self._around.preemptions:
            going = node.ready + self._wait(self._around.preemptions)
            self._at(going, None, lambda: self._draining.add(node.name))
            self._at(going + self._around.notice_seconds, None, lambda: self._take_away(node))
        return node

    def _take_away(self, node: _Node) -> None:
        """End a node; the driver finds out when it looks."""
        del self._nodes[node.name]
        self._draining.discard(node.name)
        self._gone += 1
        for worker in node.workers:
            del self._workers[worker]

    def _lose(self, number: int, loss: Loss) -> Answer:
        self._workers.pop(number).node.workers.discard(number)
        return Answer(number, loss=loss, error=RuntimeError("a simulated failure"))

    def _begin(self, number: int) -> None:
        """Begin a worker's oldest call."""
        worker = self._workers[number]
        tile, attempt = worker.calls[0]
        if tile is None:
            ends, receipt = max(self._clock, worker.written), None
        else:
            cost = self._costs[tile]
            compute, write = worker.slowness * cost.compute, worker.slowness * cost.write
            if not self._around.overlaps:
                compute, write = compute + write, 0.0
            ends = max(self._clock + compute, worker.written)
            worker.written = ends + write
            worker.busy += max(compute, write)
            receipt = _receipt(tile, cost, attempt, worker.written)
        self._at(ends, number, lambda: self._end_call(number, receipt))

    def _end_call(self, number: int, receipt: Receipt | None) -> Answer:
        worker = self._workers[number]
        worker.calls.popleft()
        before, worker.pending = worker.pending, receipt
        if worker.calls:
            self._begin(number)
        return Answer(number, [before] if before else [])


def _receipt(tile: Tile, cost: TileSeconds, attempt: int, finished: float) -> Receipt:
    """Make the receipt of a tile that nobody computed."""
    return Receipt(
        tile=tile.id,
        run="simulated",
        chunks=(StoredObject(tile.id, cost.bytes, 0),),
        max_abs=0.0,
        norm=0.0,
        asymmetry=0.0,
        compute_seconds=cost.compute,
        write_seconds=cost.write,
        peak_memory_bytes=0,
        attempt=attempt,
        host="",
        pid=0,
        device="",
        finished=finished,
    )
