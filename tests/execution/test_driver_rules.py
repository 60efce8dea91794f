"""What the driver makes of each error of a worker: tried again, set aside, or the end of the run."""

from dataclasses import replace

import finished
import pytest

from pipeline import errors
from pipeline.errors import BAD_INPUT, HessianError, NotFiniteError, ProblemError, TileError, UnreachableError
from pipeline.execution.driver import MOST_LOSSES, Answer, Driver, Loss
from pipeline.execution.events import Tally
from pipeline.planning.tiling import Tile

TILES = [Tile(range(k, k + 1), range(k, k + 1)) for k in range(4)]


class Scripted:
    """Workers that do at once what a script says for a tile at an attempt: an error, or else a receipt."""

    def __init__(self, script):
        self.script, self.started, self.clock = script, 0, 0.0
        self.waiting, self.attempts = [], []

    def now(self):
        self.clock += 0.01
        return self.clock

    def start(self):
        self.started += 1
        self.waiting.append(Answer(self.started, node="node"))
        return self.started

    def call(self, worker, tile, attempt):
        if tile is None:
            self.waiting.append(Answer(worker))
            return
        self.attempts.append((tile.id, attempt))
        error = self.script(tile, attempt)
        if error is not None:
            self.waiting.append(Answer(worker, loss=Loss.ERROR, error=error))
        else:
            self.waiting.append(Answer(worker, receipts=[replace(finished.RECEIPT, tile=tile.id)]))

    def answers(self, _):
        found, self.waiting = self.waiting, []
        return found

    def end(self, worker):
        self.waiting = [answer for answer in self.waiting if answer.worker != worker]

    def look(self):
        return set(), {"node"}


def run(script):
    pool, tally = Scripted(script), Tally()
    Driver(pool, TILES, 2, tally).run()
    return pool, tally


def test_all_is_well():
    pool, tally = run(lambda tile, attempt: None)
    assert tally.done == len(TILES)
    assert sorted(pool.attempts) == sorted((tile.id, 1) for tile in TILES)


@pytest.mark.parametrize("error", [TileError("the disk"), RuntimeError("the user's code"), NotFiniteError("once")])
def test_another_attempt_may_end_otherwise(error):
    pool, tally = run(lambda tile, attempt: error if (tile, attempt) == (TILES[1], 1) else None)
    assert tally.done == len(TILES)
    assert tally.lost[Loss.ERROR] >= 1
    assert (TILES[1].id, 2) in pool.attempts


@pytest.mark.parametrize("error", [ProblemError("no Hessian"), UnreachableError("minutes")])
def test_no_other_attempt_would_help(error):
    pool = Scripted(lambda tile, attempt: error if tile == TILES[1] else None)
    with pytest.raises(type(error)):
        Driver(pool, TILES, 2, Tally()).run()
    assert (TILES[1].id, 2) not in pool.attempts


@pytest.mark.parametrize(
    ("error", "kind"), [(TileError("the disk"), TileError), (NotFiniteError("each time"), NotFiniteError)]
)
def test_a_tile_that_fails_each_time_is_set_aside_and_the_others_are_done(error, kind):
    pool, tally = Scripted(lambda tile, attempt: error if tile == TILES[1] else None), Tally()
    with pytest.raises(kind, match=f"1 tile failed each time they were tried \\({TILES[1].id}\\)"):
        Driver(pool, TILES, 2, tally).run()
    assert tally.done == len(TILES) - 1
    assert list(tally.set_aside) == [TILES[1].id]
    assert max(attempt for tile, attempt in pool.attempts if tile == TILES[1].id) == MOST_LOSSES[Loss.ERROR]


def test_what_is_wrong_with_the_input_is_never_tried_again():
    """Nor is what was waited for, for minutes."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HessianError)]
    final = {kind for kind in kinds if not kind.retryable}
    assert final == {kind for kind in kinds if kind.exit_code == BAD_INPUT} | {UnreachableError}


def test_events_are_told_in_their_order():
    heard = []
    tally = Tally(listeners=[lambda event, fields: heard.append((event, fields.get("tile")))])
    Driver(Scripted(lambda tile, attempt: None), TILES, 1, tally).run()
    assert [tile for event, tile in heard if event == "tile done"] == [tile.id for tile in TILES]
    assert tally.to_json()["done"] == len(TILES)
