"""What the user's code raised, traced to its module and line, with a remedy where one is known."""

import pytest
import torch
from torch import nn

from pipeline import Problem, ProblemError, compute_hessian
from pipeline.problem.explain import explained, place


class Dividing(nn.Module):
    def forward(self, x):
        return x / (1 // len(x[:0]))


def raised(model, *args):
    try:
        model(*args)
    except Exception as error:
        return error
    raise AssertionError


def test_module_and_line():
    model = nn.Sequential(nn.Linear(2, 2), Dividing())
    found = explained(raised(model, torch.ones(1, 2)), model, "evaluated as it is")
    assert found.startswith("model or loss: evaluating them raised ZeroDivisionError: ")
    assert " in `1` (Dividing), test_explain.py line 13 (evaluated as it is)" in found


def test_an_error_of_torch_is_traced_to_the_module_in_which_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
    found = explained(raised(model, torch.ones(1, 2)), model, "evaluated")
    assert " in `1` (Linear)" in found
    assert "\n" not in found


def test_a_remedy_that_is_known():
    model = nn.Linear(2, 2)
    found = explained(raised(model, torch.ones(1, 2, dtype=torch.float64)), model, "evaluated in float64")
    assert "x.new_zeros(...)" in found


def test_a_tensor_that_is_kept_and_written():
    """Which torch.func refuses, and plain double backward takes."""
    kept, model = {}, nn.Linear(2, 2)

    def loss(output, target):
        if output.shape not in kept:
            kept[output.shape] = torch.empty_like(output.detach())
        kept[output.shape].copy_(output.detach())
        return (output - target).square().mean()

    given = model, loss, (torch.ones(3, 2), torch.ones(3, 2))
    loss(torch.ones(2), torch.ones(2))
    found = explained(raised(torch.func.grad(lambda x: loss(x, 0 * x)), torch.ones(2)), model, "differentiated")
    assert found.endswith("or take engine=rows")
    assert compute_hessian(Problem(*given), engine="rows").shape == (6, 6)
    with pytest.raises(ProblemError, match="take engine=auto"):
        compute_hessian(Problem(*given), engine="jacrev")


def test_a_function_that_takes_other_arguments():
    """Which is not what a function raises that could be called."""
    model, data = nn.Linear(2, 2), (torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ProblemError, match=r"missing 1 required .*: 'y' .*; the calls are objective\(call, batch\)"):
        compute_hessian(Problem(model, objective=lambda call, x, y: (call(x) - y).square().mean(), data=data))
    with pytest.raises(ProblemError, match=r"takes 1 positional .* loss\(output, target\)"):
        compute_hessian(Problem(model, lambda output: output.sum(), data))
    with pytest.raises(ProblemError, match=r"TypeError: .*argument") as caught:
        compute_hessian(Problem(model, lambda output, target: output.sum(nothing=target), data))
    assert "the calls are" not in str(caught.value)


def test_the_whole_model_has_no_path():
    assert place(" in", "", nn.ReLU()) == " in the model (ReLU)"
    assert place(" in", "a.b", nn.ReLU()) == " in `a.b` (ReLU)"
