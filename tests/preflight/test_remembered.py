"""What was measured once is not measured again; what would measure otherwise is."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from pipeline import Problem
from pipeline.cli import cli
from pipeline.planning.memory import WorkerMemory
from pipeline.preflight import planner, remembered
from pipeline.preflight.planner import make_plan
from pipeline.spec import Settings


class Net(nn.Sequential):
    """With code of its own."""

    def forward(self, x):
        return super().forward(x) + 1.0


class Other(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 2.0


Other.__name__, Other.__qualname__ = Net.__name__, Net.__qualname__


def problem(net=Net, width=6, seed=0, samples=9, loss=None, dtype=torch.float32):
    torch.manual_seed(seed)
    model = net(nn.Conv1d(2, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * width, 3))
    return Problem(model, loss or nn.CrossEntropyLoss(), (torch.randn(samples, 2, 5), torch.arange(samples) % 3))


def planned(given, **settings):
    return make_plan(given, Settings(executor="serial", **settings))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(remembered.ENVIRONMENT, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measuring(monkeypatch):
    """Count what is measured."""
    calls = []

    def noted(name, measure):
        return lambda *arguments: calls.append(name) or measure(*arguments)

    for name in ("take_faster", "choose_sizes", "time_calls", "_finishing", "proof_seconds"):
        monkeypatch.setattr(planner, name, noted(name, getattr(planner, name)))
    return calls


def test_other_weights_of_the_same_network(place, measuring):
    first = planned(problem(seed=0))
    assert set(measuring) == {"take_faster", "choose_sizes", "time_calls", "_finishing", "proof_seconds"}
    measuring.clear()
    second = planned(problem(seed=1))
    assert not measuring
    assert (second.manifest.sizes, second.manifest.engines) == (first.manifest.sizes, first.manifest.engines)
    assert (second.costs, second.timings, second.finishing) == (first.costs, first.timings, first.finishing)
    assert second.manifest.preflight.seconds != first.manifest.preflight.seconds  # what is right is found anew
    assert "cache --clear" in second.place
    assert "cache --clear" not in first.place


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"width": 7}, {}),
        ({"samples": 12}, {}),
        ({"net": Other}, {}),
        ({"loss": nn.MultiMarginLoss(p=2)}, {}),
        ({"loss": lambda out, target: (out.sum(1) - target).square().mean()}, {}),
        ({}, {"dtype": "float64"}),
        ({}, {"chunk": 16}),
        ({}, {"blocks": "diagonal"}),
    ],
)
def test_what_measures_otherwise(place, measuring, given, settings):
    planned(problem())
    measuring.clear()
    planned(problem(**given), **settings)
    assert "choose_sizes" in measuring
    assert len(remembered.kept()) == 2


def test_data_of_any_form(place, measuring):
    """A packed sequence is a tuple that cannot be made of anything else."""
    torch.manual_seed(0)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 2) for n in (4, 3, 2)])
    net = nn.Linear(2, 3)
    for _ in range(2):
        planned(
            Problem(net, objective=lambda call, batch: call(batch.data).square().mean(), data=[packed], separable=False)
        )
    assert measuring.count("choose_sizes") == 1


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"engines": {}}'])
def test_what_cannot_be_read_is_measured_anew(place, measuring, content):
    planned(problem())
    remembered.kept()[0].write_bytes(content)
    measuring.clear()
    planned(problem())
    assert "choose_sizes" in measuring
    assert len(remembered.kept()[0].read_bytes()) > len(content)


def test_an_engine_that_is_not_right_is_not_taken(place, measuring):
    planned(problem())
    path = remembered.kept()[0]
    path.write_text(path.read_text().replace('"3.weight":"factored"', '"3.weight":"rows"'))
    measuring.clear()
    assert planned(problem()).manifest.engines["3.weight"] == "factored"
    assert "choose_sizes" in measuring


def test_what_has_no_room_now_is_measured_anew(place, measuring, monkeypatch):
    planned(problem())
    measuring.clear()
    monkeypatch.setattr(WorkerMemory, "fits", lambda *_: False)
    planned(problem())
    assert "choose_sizes" in measuring


@pytest.mark.parametrize("named", ["", "a file"])
def test_nowhere_to_keep_it(tmp_path, monkeypatch, measuring, named):
    (tmp_path / "a file").touch()
    monkeypatch.setenv(remembered.ENVIRONMENT, str(tmp_path / named) if named else "")
    for _ in range(2):
        planned(problem())
    assert measuring.count("choose_sizes") == 2
    assert remembered.kept() == []


def test_the_command(place):
    planned(problem())
    said = CliRunner().invoke(cli, ["cache"]).output
    assert said.startswith("1 network, ")
    assert str(place) in said
    assert CliRunner().invoke(cli, ["cache", "--clear"]).output == "1 network forgotten\n"
    assert not remembered.kept()
