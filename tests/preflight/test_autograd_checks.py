"""Derivatives of functions that are known, right and wrong, against differences."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import Problem, ProblemError, compute_hessian
from pipeline.preflight import autograd_checks
from pipeline.preflight.autograd_checks import second_error, slope_error, slope_errors
from pipeline.preflight.diagnosis import wrong_module

X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


class Cubed(torch.autograd.Function):
    """x^3; its derivatives are others' to say."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3


class Doubled(Cubed):
    """With a wrong first derivative."""

    @staticmethod
    def backward(ctx, slope):
        return 6 * ctx.saved_tensors[0] ** 2 * slope


class Frozen(Cubed):
    """With a right first derivative and a second one of zero."""

    @staticmethod
    def backward(ctx, slope):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * slope


class Cube(nn.Module):
    def __init__(self, cube):
        super().__init__()
        self.cube = cube

    def forward(self, x):
        return self.cube(x)


def placed(cube):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), Cube(cube), nn.Linear(2, 1))
    return Problem(model, lambda out, _: out.sum(), (X, X), reduction="sum").place(torch.float64)


def directions(at):
    random = np.random.default_rng(0)
    found = {}
    for p in at.layout:
        found[p.name] = np.zeros(at.layout.size)
        found[p.name][p.place] = random.standard_normal(p.size)
    return found


def test_right_derivatives():
    at = placed(lambda x: x**3)
    errors = slope_errors(at, directions(at))
    assert errors.keys() == set(at.layout.names)
    assert max(errors.values()) < 1e-7
    for vector in directions(at).values():
        found = second_error(at, vector, np.ones(at.layout.size))
        assert found.is_right
        assert found.error < 1e-6


@pytest.mark.parametrize(("activation", "steps"), [(nn.Tanh(), 1), (nn.LeakyReLU(0.3), 2)])
def test_a_step_that_confirms_is_the_last(monkeypatch, activation, steps):
    """Of LeakyReLU the first may lie beyond a kink; it would take three that agree, four evaluations each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), activation, nn.Linear(8, 1))
    at = Problem(model, nn.MSELoss(), (X, X[:, :1])).place(torch.float64)
    asked, evaluate = [], autograd_checks._loss_and_gradient
    monkeypatch.setattr(autograd_checks, "_loss_and_gradient", lambda placed: asked.append(1) or evaluate(placed))
    vector = sum(directions(at).values())
    assert second_error(at, vector / np.linalg.norm(vector), np.ones(at.layout.size)).is_right
    assert len(asked) <= 1 + 4 * steps


def test_a_wrong_gradient_is_traced_to_parameter_and_module():
    at = placed(Doubled.apply)
    with pytest.raises(ProblemError, match=r"with respect to `0\.weight`.*goes wrong in `1` \(Cube\)"):
        slope_error(at, at.layout["0.weight"], directions(at)["0.weight"])
    assert slope_error(at, at.layout["2.weight"], directions(at)["2.weight"]) < 1e-7  # behind it all is right
    with pytest.raises(ProblemError, match="autograd does not differentiate this loss"):
        slope_errors(at, directions(at))


def test_a_wrong_second_derivative_is_seen_where_the_gradient_is_right():
    at = placed(Frozen.apply)
    assert max(slope_errors(at, directions(at)).values()) < 1e-7
    found = second_error(at, directions(at)["0.weight"], np.ones(at.layout.size))
    assert not found.is_right
    assert found.error > 0.1
    assert found.row.startswith("0.")
    assert wrong_module(at, order=1) == ", and it goes wrong outside the model's modules"
    assert wrong_module(at, order=2) == ", and it goes wrong in `1` (Cube)"


class Slope(torch.autograd.Function):
    """3 x^2 slope, which cannot be differentiated."""

    @staticmethod
    def forward(ctx, x, slope):
        return 3 * x**2 * slope

    @staticmethod
    def backward(ctx, slope):
        raise NotImplementedError("not twice")


class Once(Cubed):
    """With a first derivative alone."""

    @staticmethod
    def backward(ctx, slope):
        return Slope.apply(ctx.saved_tensors[0], slope)


def test_double_backward_that_is_missing():
    at = placed(Once.apply)
    found = second_error(at, directions(at)["0.weight"], np.ones(at.layout.size))
    assert (found.error, found.is_right) == (1.0, False)
    assert "raised NotImplementedError: not twice" in found.reason


def test_steps_that_agree_nowhere_prove_nothing():
    at = placed(lambda x: x**3 + 0.01 * torch.sin(1e9 * x).detach())
    assert slope_error(at, at.layout["0.weight"], directions(at)["0.weight"]) is None
    assert "0.weight" not in slope_errors(at, directions(at))


def test_a_loss_that_is_zero_to_the_last_bit():
    """Its gradient is 1e-50 and more, which no difference of the loss shows."""
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.mul_(400)
    apart = model(X.double()).diff(dim=1).flatten()
    x = X.double()[apart.abs() > 60]
    problem = Problem(model, nn.CrossEntropyLoss(), (x, model(x).argmax(1)))
    with pytest.raises(ProblemError, match=r"0 to the last bit .* its gradient \de-\d+: .*an earlier step"):
        compute_hessian(problem, executor="serial")
