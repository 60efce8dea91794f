"""The two engines that differentiate the model as it stands, on functions whose Hessian is known."""

import pytest
import torch
from torch import nn

from pipeline import Problem, ProblemError
from pipeline.engines.differences import Differences
from pipeline.engines.rows import Rows

C = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]])


class Two(nn.Module):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = nn.Parameter(torch.tensor(x)), nn.Parameter(torch.tensor(y))


def placed(function, x=(0.4, -0.7), y=(1.1,), dtype=torch.float64):
    model = Two(list(x), list(y))
    problem = Problem(model, objective=lambda _, c: (function(model, c), 1.0), data=C)
    return problem.place(dtype)


def added(engine, at, rows, cols):
    (batch,) = at.batches(None)
    out = torch.ones(len(rows), len(cols), dtype=at.dtype)  # what is there is added to
    engine(at).add(batch, rows, cols, out)
    return out - 1


def quartic(model, c):
    return (c[:, 0] * model.x[0] ** 4 + c[:, 1] * model.x[0] * model.x[1] * model.y[0] ** 2).sum()


def hessian_of_quartic(x, y):
    a, b = float(C[:, 0].sum()), float(C[:, 1].sum())
    rows = [
        [12 * a * x[0] ** 2, b * y[0] ** 2, 2 * b * x[1] * y[0]],
        [b * y[0] ** 2, 0, 2 * b * x[0] * y[0]],
        [2 * b * x[1] * y[0], 2 * b * x[0] * y[0], 2 * b * x[0] * x[1]],
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("engine", "tolerance"), [(Rows, 1e-12), (Differences, 1e-6)])
@pytest.mark.parametrize(("rows", "cols"), [(range(3), range(3)), (range(1, 3), range(2)), (range(2, 3), range(2, 3))])
def test_parts_of_a_known_hessian(engine, tolerance, rows, cols):
    x, y = (float(torch.tensor(v)) for v in (0.4, -0.7)), (float(torch.tensor(1.1)),)
    truth = hessian_of_quartic(tuple(x), y)[rows.start : rows.stop, cols.start : cols.stop]
    torch.testing.assert_close(added(engine, placed(quartic), rows, cols), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("engine", [Rows, Differences])
def test_a_loss_without_curvature(engine):
    at = placed(lambda model, c: (c[:, 0] * model.x[1]).sum())
    assert not added(engine, at, range(3), range(3)).any()


def test_differences_are_taken_in_double_precision():
    at = placed(quartic, dtype=torch.float32)
    truth = hessian_of_quartic((0.4, -0.7), (1.1,))
    torch.testing.assert_close(added(Differences, at, range(3), range(3)).double(), truth, rtol=1e-5, atol=1e-5)


def test_differences_refuse_where_no_steps_agree():
    at = placed(lambda model, c: (model.x[0] * torch.sin(1e9 * model.x[1]).detach()).sum())
    with pytest.raises(ProblemError, match=r"no three steps agree at row 1 \(of `x`\)"):
        added(Differences, at, range(1, 2), range(3))


def test_parameters_are_put_back():
    at = placed(quartic)
    before = at.problem.model.x.detach().clone()
    added(Differences, at, range(3), range(3))
    assert torch.equal(at.problem.model.x, before)
