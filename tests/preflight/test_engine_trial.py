"""Engines tried on rows: the first that is right is taken, and one that is wrong anywhere is not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from torch import nn

from pipeline import Problem, ProblemError
from pipeline.engines.cost import PROBE_SAMPLES
from pipeline.engines.jacrev import Jacrev
from pipeline.engines.registry import ENGINES, applications
from pipeline.preflight.engine_trial import ENGINE_TOLERANCE, Trial
from pipeline.preflight.trial_point import TrialPoint, representative
from pipeline.problem.scales import Yardstick

NAMES = ["factored", "jacrev", "rows"]


def trial(candidates=NAMES, make=zoo.mlp, dtype=torch.float64):
    few = representative(make().problem)
    point = TrialPoint(few, few.batches, 0, dtype, "cpu")
    size = few.layout.size
    known = applications(few.place(dtype), PROBE_SAMPLES)
    measure = Yardstick(np.ones(size), np.zeros(size), np.ones(size))
    return Trial(point, known, measure, candidates, by_differences=False), few


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fastest_of_those_that_are_right(dtype):
    tried, few = trial(dtype=dtype)
    for p in few.layout:
        right, notes = tried.choose(p, 0.0)
        assert right == ["factored"]  # at one position nothing is faster
        assert notes.keys() == {"factored"}
        assert notes["factored"].count("off by") == 1
    assert tried.asymmetry() < 1e-12


class Wrong:
    """An engine that is off in one entry of one row."""

    def __init__(self, placed, row_group, by=1.0):
        self.right, self.by = Jacrev(placed, row_group), by

    def add(self, batch, rows, cols, out):
        self.right.add(batch, rows, cols, out)
        out[len(rows) // 2, -1] += self.by


def test_one_wrong_entry_is_enough(monkeypatch):
    monkeypatch.setitem(ENGINES, "factored", lambda placed, rows: Wrong(placed, rows, 1e-4))
    tried, few = trial()
    right, notes = tried.choose(few.layout["0.weight"], 0.0)
    assert right == ["jacrev"]
    assert float(notes["factored"].split()[2]) > ENGINE_TOLERANCE[torch.float64]


def test_an_engine_that_raises_is_passed_over(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("of the engine")

    monkeypatch.setitem(ENGINES, "factored", broken)
    right, notes = trial()[0].choose(zoo.mlp().problem.layout["0.weight"], 0.0)
    assert right == ["jacrev"]
    assert notes["factored"] == "raised ZeroDivisionError: of the engine"


def test_none_is_right(monkeypatch):
    monkeypatch.setitem(ENGINES, "jacrev", Wrong)
    tried, few = trial(["jacrev"])
    with pytest.raises(ProblemError, match=r"no engine computes the rows of `0\.weight`: jacrev off by"):
        tried.choose(few.layout["0.weight"], 0.0)


def convolutions():
    """One with more positions than half of its inputs, and one with few."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 3)
    return SimpleNamespace(
        problem=Problem(nn.Sequential(*layers), nn.CrossEntropyLoss(), (torch.randn(5, 1, 8, 8), torch.arange(5) % 3))
    )


def test_at_several_positions_there_is_a_rival():
    tried, few = trial(make=convolutions)
    positions = {name: at.positions for name, at in applications(few.place(torch.float64), PROBE_SAMPLES).items()}
    assert set(positions.values()) == {1, 4, 36}
    chosen = {p.name: tried.choose(p, 0.0) for p in few.layout}
    for name, (right, notes) in chosen.items():
        if positions.get(name) == 1:
            assert right == ["factored"]
        elif right != ["factored", "jacrev"]:  # directions to be pulled back would not be far fewer than the rows
            assert right == ["jacrev"]
            assert notes["factored"].startswith("not tried" if name in positions else "raised NotFactoredError")
    assert ["factored", "jacrev"] in [right for right, _ in chosen.values()]
