"""The one stream of events of a run: what a driver sees is counted here, logged, and handed on to whoever listens."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import counted
from pipeline.storage.receipts import Receipt

LAST_ERRORS = 5
TILE_DONE = "tile done"

Listener = Callable[[str, dict[str, Any]], None]
_log = logging.getLogger(__name__)


@dataclass
class Tally:
    """Counts of one call of a run.

    Attributes:
        began: with its tiles, in seconds of this machine's monotonic clock.
        tiles: in all.
        before: of them done when it began.
        done: of them done by it.
        bytes: put by it.
        tile_seconds: of computing and writing them, over all workers.
        workers: that are up.
        queued: tiles that no worker has.
        lost: tiles given to a worker that did not finish them, by what became of it.
        set_aside: tiles that failed too often, with the last error of each.
        errors: the last few of any kind.
        listeners: called with the name of each event and its fields.
    """

    began: float = field(default_factory=time.monotonic)
    tiles: int = 0
    before: int = 0
    done: int = 0
    bytes: int = 0
    tile_seconds: float = 0.0
    workers: int = 0
    queued: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    set_aside: dict[str, str] = field(default_factory=dict)
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_ERRORS))
    listeners: list[Listener] = field(default_factory=list)

    def begin(self, tiles: int, before: int) -> None:
        """Begin to compute what is left of so many tiles."""
        self.began, self.tiles, self.before = time.monotonic(), tiles, before

    def finished(self, receipts: Iterable[Receipt]) -> None:
        """Count tiles that are stored."""
        for receipt in receipts:
            seconds = receipt.compute_seconds + receipt.write_seconds
            self.done += 1
            self.bytes += receipt.bytes
            self.tile_seconds += seconds
            said = {"attempt": receipt.attempt, "host": receipt.host, "pid": receipt.pid}
            text = f"tile {receipt.tile} is done"
            self._tell(TILE_DONE, logging.INFO, text, tile=receipt.tile, seconds=seconds, bytes=receipt.bytes, **said)

    def staffed(self, workers: int, queued: int) -> None:
        """Note how many workers are up, and how many tiles wait."""
        if (workers, queued) != (self.workers, self.queued):
            self.workers, self.queued = workers, queued
            self._tell(
                "staff", logging.DEBUG, f"{workers} workers, {queued} tiles wait", workers=workers, queued=queued
            )

    def worker_lost(self, loss: str, node: str | None, tiles: list[str], error: str) -> None:
        """Count what a worker leaves unfinished."""
        self.lost[loss] += len(tiles)
        self.errors.append(error)
        text = f"a worker is lost ({loss}), back into the queue {counted(len(tiles), 'tile')}: {error}"
        self._tell("worker lost", logging.WARNING, text, loss=loss, node=node, tiles=tiles, error=error)

    def tile_set_aside(self, tile: str, error: str) -> None:
        """Note a tile that is not tried again."""
        self.set_aside[tile] = error
        self._tell("tile set aside", logging.ERROR, f"tile {tile} is set aside: {error}", tile=tile, error=error)

    def to_json(self) -> dict[str, Any]:
        """Return all but the listeners as a plain mapping; called by another thread than the driver's."""
        counts = {key: value for key, value in vars(self).items() if key not in {"began", "listeners"}}
        lists = {"lost": dict(self.lost), "set_aside": dict(self.set_aside), "errors": list(self.errors)}
        return counts | lists | {"seconds": time.monotonic() - self.began}

    def _tell(self, event: str, level: int, text: str, **fields: Any) -> None:
        _log.log(level, text, extra={"event": event, **fields})
        for listener in self.listeners:
            listener(event, fields)
