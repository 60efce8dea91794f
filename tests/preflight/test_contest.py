"""A contest of engines: the faster is taken, what is alike is timed once, and a bias goes with its weight."""

import torch
import zoo
from torch import nn

from pipeline import Problem
from pipeline.engines.cost import PROBE_SAMPLES
from pipeline.engines.registry import applications
from pipeline.planning.verdict import ParameterVerdict, PreflightVerdict
from pipeline.preflight import contest
from pipeline.preflight.contest import take_faster


def contested(problem, rivals):
    tried = {"factored": "off by 0", "jacrev": "off by 0"}
    parameters = {
        p.name: ParameterVerdict("factored", "jacrev" if p.name in rivals else None, 0.0, 0.0, dict(tried))
        for p in problem.layout
    }
    return PreflightVerdict(4, [], parameters, 0.0, 0.0)


def held(monkeypatch, seconds, rivals=("0.weight", "0.bias"), problem=None):
    """Have the contest be won by times that are given, on a convolution."""
    problem = problem or zoo.conv().problem
    placed, timed = problem.place(torch.float64), []

    def measured(placed, name, engine, known):
        timed.append((name, engine))
        return seconds[engine]

    monkeypatch.setattr(contest, "_seconds", measured)
    known = applications(placed, PROBE_SAMPLES)
    return take_faster(placed, contested(problem, rivals), known), timed


def test_the_faster_is_taken_and_the_other_is_its_rival(monkeypatch):
    found, _ = held(monkeypatch, {"factored": 2e-3, "jacrev": 1e-3})
    weight = found.parameters["0.weight"]
    assert (weight.engine, weight.rival) == ("jacrev", "factored")
    assert all(note.startswith("off by 0; ") and note.endswith(" ms a row") for note in weight.tried.values())
    found, _ = held(monkeypatch, {"factored": 1e-3, "jacrev": 2e-3})
    assert (found.parameters["0.weight"].engine, found.parameters["0.weight"].rival) == ("factored", "jacrev")


def test_a_bias_goes_with_its_weight(monkeypatch):
    found, timed = held(monkeypatch, {"factored": 2e-3, "jacrev": 1e-3})
    assert found.parameters["0.bias"].engine == "jacrev"
    assert timed == [("0.weight", "factored"), ("0.weight", "jacrev")]


def test_what_has_no_rival_is_not_timed(monkeypatch):
    found, timed = held(monkeypatch, {"factored": 2e-3, "jacrev": 1e-3}, rivals=())
    assert not timed
    assert set(found.engines.values()) == {"factored"}


def test_what_is_alike_is_timed_once_but_for_the_last(monkeypatch):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())]
    data = torch.randn(5, 2, 6), torch.randn(5, 2, 6)
    names = ["0.weight", "2.weight", "4.weight", "6.weight"]
    problem = Problem(nn.Sequential(*layers), nn.MSELoss(), data)
    _, timed = held(monkeypatch, {"factored": 2e-3, "jacrev": 1e-3}, names, problem)
    assert [name for name, _ in timed] == ["0.weight", "0.weight", "6.weight", "6.weight"]


def test_a_measurement():
    problem = zoo.conv().problem
    placed = problem.place(torch.float64)
    found = take_faster(placed, contested(problem, ["0.weight"]), applications(placed, PROBE_SAMPLES))
    assert {found.parameters["0.weight"].engine, found.parameters["0.weight"].rival} == {"factored", "jacrev"}
