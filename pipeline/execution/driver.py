"""The driver's loop: which worker gets which tile, and what becomes of the tiles of a worker that is lost.

It owns the queue, the attempts and the budgets, and knows no Ray; a pool owns the workers and says what they answer.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Protocol

from pipeline.errors import HessianError, NotFiniteError, TileError, WorkerError, counted
from pipeline.execution.events import Tally
from pipeline.planning.tiling import Tile
from pipeline.storage.receipts import Receipt
from pipeline.storage.retries import PATIENCE_SECONDS

IN_FLIGHT = 2  # calls per worker: one running, one waiting, so that it never waits for the driver
TAIL = 4  # tiles left for each worker, from where on they have one call each: it goes to whoever is done first
MOST_FAILED_STARTS = 3  # of workers, in a row; then none is started for a while, or the run given up
MANY_FAILED = 1 / 4  # of all workers, in a row, before any is up: not one bad node among good ones
PAUSE_SECONDS = 60  # before the next starts, after that many failed
MOST_SET_ASIDE = 20  # tiles; more than that is not the tiles' fault
START_SECONDS = 1200  # without any worker: a cluster may have to add a machine, which installs torch first
TICK_SECONDS = 0.5
LOOK_SECONDS = 2.0  # between looks at the nodes and the deadlines
HUNG_FACTOR = 10  # times the median tile
HUNG_SECONDS = 60 + PATIENCE_SECONDS  # above that: the tile before may be waiting for its store
MEDIAN_OF = 101  # last tiles


class Loss(StrEnum):
    """What became of a worker."""

    DIED = "died"
    ERROR = "error"
    HUNG = "hung"
    MEMORY = "memory"
    NODE = "node"
    PREEMPTED = "preempted"


# Losses after which the tile being computed is set aside. A process that dies is seldom the tile's fault, a node even
# less, unless the tile takes so much at once that the system ends Ray itself; one that was announced to go never is.
MOST_LOSSES = {Loss.ERROR: 3, Loss.HUNG: 3, Loss.MEMORY: 5, Loss.DIED: 8, Loss.NODE: 20}
NOT_ITS_OWN = {Loss.NODE, Loss.PREEMPTED}  # losses that say nothing of a worker that had not started


@dataclass(frozen=True)
class Answer:
    """What a worker's oldest call came to.

    Attributes:
        worker: its number.
        receipts: of tiles that are stored since its last answer.
        node: the worker's, with its first answer.
        loss: what became of the worker; None when all is well.
        error: of a loss.
    """

    worker: int
    receipts: Sequence[Receipt] = ()
    node: str | None = None
    loss: Loss | None = None
    error: BaseException | None = None


class Pool(Protocol):
    """Where the workers are, and the clock they live by."""

    def now(self) -> float:
        """Return the seconds since some moment."""

    def start(self) -> int:
        """Begin to start a worker, whose first answer says that it is up; gives its number."""

    def call(self, worker: int, tile: Tile | None, attempt: int) -> None:
        """Have a worker compute a tile, or finish what it is writing."""

    def answers(self, seconds: float) -> list[Answer]:
        """Wait for calls to end, each worker's in the order they were made."""

    def end(self, worker: int) -> None:
        """End a worker; it gives no answer any more."""

    def look(self) -> tuple[set[str], set[str]]:
        """Name the nodes that are being drained, and those that are alive."""


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it."""

    number: int
    since: float  # when its oldest call became the oldest
    started: bool = False
    node: str | None = None
    leaving: bool = False
    calls: deque[Tile | None] = field(default_factory=deque)
    owed: dict[str, Tile] = field(default_factory=dict)  # given to it, without a receipt yet

    def may_be_beside(self, other: "_Member") -> bool:
        """Whether another that is up is on this one's node, which is not known before it is up itself."""
        return other.started and self.node in {None, other.node}


class Driver:
    """Has a pool compute tiles, whatever happens to its workers.

    Args:
        pool: of workers.
        tiles: what to compute, dearest first.
        workers: how many to keep up.
        tally: told about all that happens.
        deadline: seconds after which a worker that does not answer is ended; None for one from the median tile.
        check: called every few seconds; raises what stops the run.
    """

    def __init__(
        self,
        pool: Pool,
        tiles: Sequence[Tile],
        workers: int,
        tally: Tally,
        deadline: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool, self._queue, self._workers = pool, deque(tiles), workers
        self._tally, self._deadline, self._check = tally, deadline, check
        self._members: dict[int, _Member] = {}
        self._attempts: Counter[str] = Counter()
        self._losses: Counter[tuple[str, Loss]] = Counter()
        self._failures: list[BaseException] = []  # one for each tile set aside
        self._seconds: deque[float] = deque(maxlen=MEDIAN_OF)
        self._failed_starts = self._up = 0
        self._staff_changed = True
        self._looked = self._staffed = self._paused_until = pool.now()

    def run(self) -> None:
        """Keep workers up and fed until no tile is left; the tally is told of each that is stored.

        Raises:
            TileError: tiles failed too often; all others are done.
            NotFiniteError: tiles have entries that are NaN or infinite, each time; all others are done.
            WorkerError: workers cannot be started.
            HessianError: what a worker raised that no other attempt would mend.
        """
        self._staff()
        while self._queue or any(member.owed for member in self._members.values()):
            for answer in self._pool.answers(TICK_SECONDS):
                self._take(answer)
            if self._pool.now() - self._looked >= LOOK_SECONDS:
                self._look()
            if self._staff_changed:  # looking at all workers after each answer takes longer than all else
                self._staff()
            self._require_workers()
            self._tally.staffed(self._up, len(self._queue))
        self._report_failures()

    def _take(self, answer: Answer) -> None:
        """Note an answer, and give its worker more to do."""
        member = self._members.get(answer.worker)
        if member is None:  # ended meanwhile
            return
        if answer.loss is not None:
            self._lose(member, answer.loss, answer.error or RuntimeError(answer.loss))
            return
        member.calls.popleft()
        member.since = self._pool.now()
        member.node = answer.node or member.node
        if not member.started:
            member.started, self._failed_starts = True, 0
            self._up += 1
        for receipt in answer.receipts:
            del member.owed[receipt.tile]
            self._seconds.append(receipt.compute_seconds + receipt.write_seconds)
        self._tally.finished(answer.receipts)
        self._feed(member)

    def _feed(self, member: _Member) -> None:
        """Hand a worker its next tiles; when there are none, have it finish what it is writing, then let it go."""
        while self._queue and not member.leaving and len(member.calls) < self._most_calls():
            tile = self._queue.popleft()
            self._attempts[tile.id] += 1
            member.owed[tile.id] = tile
            self._call(member, tile)
        if not member.calls and member.owed:
            self._call(member, None)
        elif not member.calls:
            self._release(member)

    def _most_calls(self) -> int:
        """Return the calls that a worker may have."""
        return IN_FLIGHT if len(self._queue) > TAIL * len(self._members) else 1

    def _call(self, member: _Member, tile: Tile | None) -> None:
        if not member.calls:
            member.since = self._pool.now()
        member.calls.append(tile)
        self._pool.call(member.number, tile, self._attempts[tile.id] if tile else 0)

    def _release(self, member: _Member) -> None:
        del self._members[member.number]
        self._up -= member.started
        self._staff_changed = True
        self._pool.end(member.number)

    def _staff(self) -> None:
        """Start the workers that are missing, no more than there are tiles waiting; let go of those not needed."""
        self._staff_changed = False
        staying = [member for member in self._members.values() if not member.leaving]
        pending = [member for member in staying if not member.started]
        for member in pending[len(self._queue) :]:
            self._release(member)
        if self._members and self._pool.now() < self._paused_until:
            return
        for _ in range(min(self._workers - len(staying), len(self._queue) - len(pending))):
            number = self._pool.start()
            self._members[number] = _Member(number, self._pool.now(), calls=deque([None]))

    def _require_workers(self) -> None:
        """Return up where no worker comes up."""
        if self._up or not self._members:
            self._staffed = self._pool.now()
        elif self._pool.now() - self._staffed > START_SECONDS:
            raise WorkerError(
                f"no worker started within {START_SECONDS} s: lower cpus_per_worker or gpus_per_worker, or add nodes; "
                "finished tiles are kept, run the same job again to go on"
            )

    def _look(self) -> None:
        """Find workers that will not answer: on nodes that are gone or going, or past their deadline."""
        self._check()
        self._staff_changed = True
        self._looked = now = self._pool.now()
        draining, alive = self._pool.look()
        limit = self._limit()
        for member in list(self._members.values()):
            if member.node is not None and member.node not in alive:
                self._lose(member, Loss.NODE, ConnectionError("its node is gone"))
            elif member.node in draining and not member.leaving:
                member.leaving = True
                if not member.calls:
                    self._feed(member)
            elif member.started and member.calls and limit is not None and now - member.since > limit:
                self._lose(member, Loss.HUNG, TimeoutError(f"no answer for {limit:.0f} s"))

    def _limit(self) -> float | None:
        """Return the seconds that a call may take; None where nothing is known yet."""
        if self._deadline is not None or not self._seconds:
            return self._deadline
        return HUNG_FACTOR * median(self._seconds) + HUNG_SECONDS

    def _lose(self, member: _Member, loss: Loss, error: BaseException) -> None:
        """Put the unfinished tiles of a worker back, and hold the loss against the one it was computing."""
        if _is_final(error):
            raise error
        self._release(member)
        text = f"{type(error).__name__}: {error}"
        self._tally.worker_lost(loss, member.node, list(member.owed), text)
        crowded = loss is Loss.MEMORY and any(map(member.may_be_beside, self._members.values()))
        if crowded:
            self._workers = max(self._workers - 1, 1)  # those that are left have more of it
        elif not member.started and loss not in NOT_ITS_OWN:
            self._count_failed_start(text)
        blamed = _blamed(member, error)
        if blamed is not None and loss in MOST_LOSSES and not crowded:
            self._losses[blamed.id, loss] += 1
            if self._losses[blamed.id, loss] >= MOST_LOSSES[loss]:
                del member.owed[blamed.id]
                self._set_aside(blamed, error, text)
        # The one at which it was lost comes first, so that what is wrong with it strikes as few others as can be.
        left = sorted(member.owed.values(), key=lambda tile: tile != blamed)
        self._queue.extendleft(reversed(left))

    def _set_aside(self, tile: Tile, error: BaseException, text: str) -> None:
        self._tally.tile_set_aside(tile.id, text)
        self._failures.append(error)
        if len(self._failures) > MOST_SET_ASIDE:
            self._report_failures()

    def _count_failed_start(self, text: str) -> None:
        """Pause starts where too many fail; give up where none is up, and none or too few may still come up."""
        self._failed_starts += 1
        if self._failed_starts < MOST_FAILED_STARTS:
            return
        if not self._up and (not self._members or self._failed_starts >= MANY_FAILED * self._workers):
            raise WorkerError(f"{self._failed_starts} workers in a row did not start: {text}")
        self._paused_until = self._pool.now() + PAUSE_SECONDS

    def _report_failures(self) -> None:
        """Name the tiles that were set aside."""
        if not self._failures:
            return
        failed = self._tally.set_aside
        tile, text = next(iter(failed.items()))
        kind = NotFiniteError if all(isinstance(error, NotFiniteError) for error in self._failures) else TileError
        raise kind(
            f"{counted(len(failed), 'tile')} failed each time they were tried ({', '.join(list(failed)[:10])}), {tile} "
            f"with {text}; the others are kept, run the same job again to go on"
        )


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would fail as well, wherever it is made."""
    return isinstance(error, HessianError) and not error.retryable


def _blamed(member: _Member, error: BaseException) -> Tile | None:
    """Return the tile that a worker was at when it was lost: the error says, its oldest call, or what it writes."""
    named = member.owed.get(getattr(error, "tile", ""))
    return named or next((tile for tile in (*member.calls, *member.owed.values()) if tile is not None), None)
