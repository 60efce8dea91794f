"""A virtual cluster under the real driver: what must hold whatever happens, and what a plan predicts by it."""

import os
import sys
import time
from dataclasses import replace

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import SpecError, TileError, WorkerError
from pipeline.cli import cli
from pipeline.execution import driver
from pipeline.execution.driver import PAUSE_SECONDS, Driver, Loss
from pipeline.execution.events import Tally
from pipeline.execution.simulator import simulate
from pipeline.execution.virtual_pool import Circumstances, TileSeconds, VirtualPool
from pipeline.planning.costs import work
from pipeline.planning.machine_profiles import PROFILES, TileCost, at_hand, find_profile
from pipeline.planning.tiling import Tile, default_chunk
from pipeline.preflight.call_timing import rivals

TROUBLE = Circumstances(
    start_seconds=20.0, spread=0.1, deaths=3.0, preemptions=6.0, workers_per_node=4, node_seconds=90.0, seed=1
)


def costs(count, compute=10.0, write=3.0):
    """Tiles of equal cost but for a few."""
    return {
        Tile(range(k, k + 1), range(k, k + 1)): TileSeconds(compute * (2 if k < count // 10 else 1), write, 1000)
        for k in range(count)
    }


class Kept(Tally):
    """Keeps the receipts that it is told of."""

    def __init__(self):
        super().__init__()
        self.receipts = []

    def finished(self, receipts):
        self.receipts += receipts
        super().finished(receipts)


def computed(pool, tiles, workers):
    """Run the driver, and give the receipts of all that it was told of."""
    tally = Kept()
    Driver(pool, tiles, workers, tally).run()
    assert tally.done == len(tally.receipts)
    return tally.receipts


@settings(max_examples=25, deadline=None)
@given(
    tiles=st.integers(1, 200),
    workers=st.integers(1, 40),
    overlaps=st.booleans(),
    deaths=st.sampled_from([0.0, 10.0, 40.0]),
    preemptions=st.sampled_from([0.0, 20.0]),
    seed=st.integers(0, 5),
)
def test_every_tile_once_and_no_sooner_than_can_be(tiles, workers, overlaps, deaths, preemptions, seed):
    around = replace(TROUBLE, overlaps=overlaps, deaths=deaths, preemptions=preemptions, seed=seed, spread=0.0)
    known = costs(tiles)
    pool = VirtualPool(known, around)
    receipts = computed(pool, list(known), workers)
    assert sorted(r.tile for r in receipts) == sorted(tile.id for tile in known)
    assert all(r.finished <= pool.now() for r in receipts)
    dearest = next(iter(known.values()))
    all_seconds = sum(max(c.compute, c.write) if overlaps else c.compute + c.write for c in known.values())
    assert pool.now() >= around.start_seconds + dearest.compute + dearest.write - 1e-6
    assert pool.now() >= around.start_seconds + all_seconds / workers - 1e-6


def test_the_same_for_a_seed_alone():
    def outcome(seed):
        found = simulate(costs(2000), 64, replace(TROUBLE, seed=seed))
        return replace(found, driver_seconds=0.0)

    first = outcome(1)
    assert first == outcome(1) != outcome(2)
    assert first.tiles == 2000
    assert first.bytes == 2_000_000
    assert first.lost
    assert first.started > 64


def test_without_failures_all_is_known():
    """Eight equal tiles on four workers that start in 5 s: two each, the last one's writing not hidden."""
    known = {tile: TileSeconds(10.0, 4.0, 10) for tile in costs(8)}
    found = simulate(known, 4, Circumstances(start_seconds=5.0))
    assert found.makespan_seconds == pytest.approx(5 + 10 + 10 + 4)
    assert found.bound_seconds == pytest.approx(20)
    assert (found.tail_seconds, found.balance, found.lost) == (0.0, 1.0, {})
    shared = simulate(known, 4, Circumstances(start_seconds=5.0, overlaps=False))
    assert shared.makespan_seconds == pytest.approx(5 + 2 * 14)
    store_bound = simulate({tile: TileSeconds(1.0, 6.0, 10) for tile in known}, 4, Circumstances())
    assert store_bound.bound_seconds == pytest.approx(12)
    assert store_bound.makespan_seconds == pytest.approx(1 + 6 + 6)


def test_a_notice_saves_what_is_being_computed():
    around = Circumstances(preemptions=30.0, workers_per_node=2, node_seconds=60.0, seed=3)
    told = simulate(costs(600), 8, replace(around, notice_seconds=60.0))
    untold = simulate(costs(600), 8, replace(around, notice_seconds=0.0))
    assert not told.lost
    assert told.started > 8
    assert untold.lost["node"] > 0


def test_a_tile_that_always_kills_is_set_aside():
    """The budgets are the real driver's."""
    known = costs(20)
    with pytest.raises(TileError, match="failed each time"):
        simulate(known | {next(iter(known)): TileSeconds(1e6, 0.0, 0)}, 4, replace(TROUBLE, deaths=100.0))


class BadNodes(VirtualPool):
    """On the first nodes no worker comes up: each fails after a second, long before others are up."""

    def __init__(self, known, around, bad):
        super().__init__(known, around)
        self._bad, self.failed = bad, 0

    def start(self):
        number = super().start()
        node = self._workers[number].node.name
        if node in list(self._nodes)[: self._bad]:
            self.failed += 1
            self._at(self.now() + 1.0, number, lambda: self._lose(number, Loss.DIED))
        return number


def test_a_node_on_which_no_worker_starts():
    """The others go on without it, and try it again now and then, not all the time."""
    known, around = costs(600), Circumstances(start_seconds=20.0, workers_per_node=8)
    pool = BadNodes(known, around, bad=1)
    receipts = computed(pool, list(known), 64)
    assert len(receipts) == len(known)
    assert pool.now() > 2 * PAUSE_SECONDS
    assert 16 <= pool.failed <= 8 * (2 + pool.now() / PAUSE_SECONDS)


@pytest.mark.parametrize(("workers", "failures"), [(1, 3), (2, 3), (64, 16)])
def test_no_worker_starts_anywhere(workers, failures):
    pool = BadNodes(costs(600), Circumstances(start_seconds=20.0, workers_per_node=8), bad=1000)
    with pytest.raises(WorkerError, match=f"^{failures} workers in a row did not start"):
        Driver(pool, list(costs(600)), workers, Tally()).run()


def lines_of_the_driver(call):
    """What a call returns, and how many lines of the driver's module it ran."""
    count = 0

    def traced(frame, event, arg):
        nonlocal count
        count += event == "line"
        return traced

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: traced if frame.f_code.co_filename == driver.__file__ else None)
    try:
        found = call()
        return found, count
    finally:
        sys.settrace(before)


def test_many_workers_cost_the_driver_little():
    """What the driver does for a tile does not grow with the workers: once it looked at all of them, each time."""

    def lines_for_each_answer(workers):
        found, lines = lines_of_the_driver(
            lambda: simulate(costs(3000), workers, Circumstances(start_seconds=10.0)).answers
        )
        return lines / found

    few, many = lines_for_each_answer(8), lines_for_each_answer(512)
    assert 1 < many < 1.5 * few


def test_profiles():
    for name, profile in PROFILES.items():
        assert find_profile(name) is profile
        assert not profile.calibrated
        assert "NOT calibrated" in profile.describe()
    with pytest.raises(SpecError, match=r"no profile `h10`.*h100"):
        find_profile("h10")
    cost = TileCost(3.0, 2.0, 33.5e12, 0.0, 500_000_000, 256_000_000, "zstd")
    h100 = find_profile("h100")
    split = replace(cost, flops=0.0, tensor_flops=3 * cost.flops)
    assert h100.seconds(split, "float32")[0] == pytest.approx(3 * 67 / 494)
    phases = {"computing": 1.0, "copying to the host": 0.005, "encoding": 0.5 / 0.44, "putting": 2.0}
    assert h100.phases(cost, "float32") == pytest.approx(phases)
    assert h100.seconds(cost, "float32") == pytest.approx((1.0, 2.005 + 0.5 / 0.44))
    assert find_profile("l4").seconds(cost, "float64") > find_profile("l4").seconds(cost, "float32")
    here = at_hand(overlaps=False, measured=(2.0, 0.5))
    assert here.seconds(cost, "float32") == (6.0, 1.0)
    assert here.calibrated
    assert "NOT" not in here.describe()


def test_what_tiles_wait_for():
    """On a GPU computing is hidden behind writing, or the other way round; a CPU does both."""
    h100, dear = find_profile("h100"), TileCost(1.0, 4.0, 335e12, 0.0, 500_000_000, 500_000_000, "lz4")
    cheap = replace(dear, flops=67e12)
    assert h100.bottleneck([dear], "float32")[1] == "computing"
    total, slowest = h100.bottleneck([cheap] * 3, "float32")
    assert (total["computing"], total["putting"], slowest) == (6.0, 6.0, "putting")
    slow_codec = replace(h100, store_bytes=2e9)
    assert slow_codec.bottleneck([replace(cheap, flops=0.0, codec="zstd")], "float32")[1] == "encoding"
    assert replace(slow_codec, bus_bytes=1e8).bottleneck([cheap], "float32")[1] == "copying to the host"
    here = at_hand(overlaps=False)
    assert here.bottleneck([dear, dear], "float32") == ({"computing": 2.0, "writing": 8.0}, "writing")
    assert here.bottleneck([replace(dear, compute_seconds=5.0)], "float32")[1] == "computing"


def test_what_engines_do():
    nothing = range(0)
    assert work("jacrev", range(3, 7), range(100), nothing) == 4
    assert work("jacrev", range(3, 7), range(3), nothing) == 0
    assert work("factored", range(10), range(20, 40), nothing) == 200
    assert work("factored", range(10), range(20, 40), range(30)) == 150  # half of the columns at half
    assert work("factored", range(10), range(10), nothing) == 50
    assert work("factored", range(10), range(10), range(10)) == pytest.approx(25)


def test_chunks_for_many_workers():
    assert default_chunk(10**6) == default_chunk(10**6, bands=400) == 2048
    assert default_chunk(10**6, bands=1000) == 512
    assert default_chunk(10**6, bands=10**5) == 512
    assert default_chunk(3000, bands=10**5) == default_chunk(3000)


def test_rivals_work_as_long_as_something_is_timed(tmp_path):
    def note():
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.01)

    with rivals(2, note):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
    for path in tmp_path.iterdir():
        assert int(path.name) != os.getpid()
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


JOB = """
import torch
from torch import nn
from pipeline import Problem

def net(samples=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(samples, 6), torch.randint(0, 3, (samples,))))
"""


@pytest.fixture
def hessian(tmp_path, monkeypatch, capsys):
    """The command, in this process; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "net.py").write_text(JOB)
    (tmp_path / "job.yaml").write_text("problem: net.py:net\nexecutor: serial\nverify: false\ndtype: float64\n")

    def command(*arguments):
        cli([*map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return command


def test_plans_for_a_named_device(hessian):
    out = hessian("plan", "job.yaml", "--workers", 64, "--profile", "h100")
    assert "h100, NOT calibrated: 50% of 67 TFLOP/s in float32" in out
    assert "predicted" not in out  # by this machine: one time is said, the forecast's
    assert all(head in out for head in ("of the bound", "balance", "MB/s", " 128 "))
    with pytest.raises(SpecError, match="no profile `h1000`"):
        hessian("plan", "job.yaml", "--profile", "h1000")


def test_plans_by_receipts(hessian):
    """Those of the same network calibrate, whatever the samples; of another they do not."""
    hessian("run", "job.yaml", "--output", "out")
    out = hessian("plan", "job.yaml", "--receipts", "out", "--set", "problem_args.samples=120")
    assert "calibrated by measured tiles" in out
    assert "NOT calibrated" not in out
    with pytest.raises(SpecError, match="is no run of the same parameters, type and engines"):
        hessian("plan", "job.yaml", "--receipts", "out", "--set", "dtype=float32")
    with pytest.raises(click.UsageError, match="leave out --profile"):
        hessian("plan", "job.yaml", "--receipts", "out", "--profile", "cpu")
