"""Every engine equals plain autograd rows on every problem of the zoo, in any cut."""

import numpy as np
import pytest
import torch
import zoo
from oracle import block_error

from pipeline import Problem, compute_hessian
from pipeline.engines import ENGINES
from pipeline.probe import Meter
from pipeline.problem import exact_kernels


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_equals_oracle(case, engine):
    H = compute_hessian(case.problem, dtype=torch.float64, engine=engine, executor="serial", chunk=8, verify=False)
    assert block_error(H.to_numpy(), case.truth(), H.parameters) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("rows", "cols"), [(range(3, 30), range(60)), (range(20, 22), range(21, 43)), (range(59), range(58, 59))]
)
def test_any_rectangle(engine, rows, cols):
    case = zoo.layer_norm()
    placed = case.problem.place(torch.float64)
    out = torch.ones(len(rows), len(cols), dtype=torch.float64)
    with exact_kernels(placed.problem.model):
        for batch in placed.batches(3):
            ENGINES[engine](placed, 5).add(batch, rows, cols, out)
    expected = 1 + 7 * case.truth()[rows.start : rows.stop, cols.start : cols.stop]  # a mean over seven samples
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)


def test_float32_is_close():
    case = zoo.attention()
    H, truth = compute_hessian(case.problem, executor="serial").to_numpy(), case.truth()
    assert H.dtype == np.float32
    assert np.abs(H - truth).max() < 1e-5 * np.abs(truth).max()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_held_constant_costs_nothing_per_row(engine):
    """Wide layers before the selected ones: a row costs what it would if their outputs were the data."""
    before = torch.nn.Sequential(torch.nn.Linear(5, 200), torch.nn.Tanh(), torch.nn.Linear(200, 5))
    after = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    (x, y), loss = zoo.data(), torch.nn.CrossEntropyLoss()

    def flops(problem, rows):
        placed = problem.place(torch.float64)
        out = torch.zeros(rows, placed.layout.size, dtype=placed.dtype)
        with Meter() as meter:
            ENGINES[engine](placed, rows).add(next(placed.batches(None)), range(rows), range(placed.layout.size), out)
        return meter.flops

    def per_row(problem):
        return (flops(problem, 5) - flops(problem, 1)) / 4

    whole = Problem(torch.nn.Sequential(before, after), loss, (x, y), params="1.*")
    assert per_row(whole) == per_row(Problem(after, loss, (before(x).detach(), y))) > 0
