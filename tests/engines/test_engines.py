"""Every engine equals plain autograd rows on every problem of the zoo, in any cut."""

import numpy as np
import pytest
import torch
import zoo
from oracle import block_error

from pipeline import Problem, compute_hessian
from pipeline.engines.meter import metered
from pipeline.engines.registry import ENGINES
from pipeline.engines.stages import NotFactoredError
from pipeline.problem.contexts import exact_kernels

GENERAL = ["jacrev", "rows"]  # for any parameter
FACTORED = [
    zoo.mlp,
    zoo.relu_mse,
    zoo.weighted_ignored,
    zoo.bce,
    zoo.user_sum,
    zoo.ridge,
    zoo.chosen_parameters,
    zoo.positions,
    zoo.unrolled,
    zoo.words,
    zoo.shared_module,
]


@pytest.mark.parametrize("engine", ["jacrev", pytest.param("rows", marks=pytest.mark.full("all once more"))])
def test_engine_equals_oracle(case, engine):
    H = compute_hessian(case.problem, dtype=torch.float64, engine=engine, executor="serial", chunk=8, verify=False)
    assert block_error(H.to_numpy(), case.truth(), H.parameters) < 1e-10


@pytest.mark.parametrize("make", FACTORED, ids=lambda make: make.__name__)
def test_networks_of_linear_maps_are_factored(make):
    H = compute_hessian(
        make().problem, dtype=torch.float64, engine="factored", executor="serial", chunk=8, verify=False
    )
    assert block_error(H.to_numpy(), make().truth(), H.parameters) < 1e-10


def test_factored_is_right_or_refuses(case):
    """Each parameter's rows against all columns, in any order of execution and uneven micro-batches."""
    placed, truth = case.problem.place(torch.float64), case.truth()
    P, mean = placed.layout.size, case.problem.reduction == "mean"
    for p in placed.layout:
        out = torch.zeros(p.size, P, dtype=torch.float64)
        weight = 0.0
        try:
            with exact_kernels(case.problem.model):
                for batch in placed.batches(3):
                    ENGINES["factored"](placed, 7).add(batch, p.span, range(P), out)
                    weight += float(placed.loss_sum({}, batch)[1])
        except NotFactoredError:
            continue
        found = out.numpy() / (weight if mean else 1) + case.problem.l2 * np.eye(P)[p.span.start : p.span.stop]
        np.testing.assert_allclose(found, truth[p.span.start : p.span.stop], rtol=0, atol=1e-13 * np.abs(truth).max())


def hidden_product(x, W):
    """x W' where no mode looks."""
    with torch._C.DisableTorchFunction():
        return x @ W.T


class Consumed(torch.nn.Module):
    """A weight with a second consumer."""

    def __init__(self, product):
        super().__init__()
        self.first, self.second, self.product = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3), product

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) + self.product(x, self.first.weight)[:, :3]


@pytest.mark.parametrize(
    ("product", "fault"),
    [(lambda x, W: x @ W.T, "by other operations than dense layers"), (hidden_product, "off by")],
)
def test_other_consumers_are_noticed(product, fault):
    """By the factored engine where it sees them, else by preflight."""
    case = zoo.supervised(zoo.seeded(lambda: Consumed(product)), torch.nn.CrossEntropyLoss(), *zoo.data())
    H = compute_hessian(case.problem, dtype="float64", executor="serial")
    assert H.manifest.engines["first.weight"] == "jacrev"
    assert fault in H.manifest.preflight.parameters["first.weight"].tried["factored"]
    assert block_error(H.to_numpy(), case.truth(), H.parameters) < 1e-10


@pytest.mark.parametrize(("engine", "make"), [*((e, zoo.layer_norm) for e in GENERAL), ("factored", zoo.mlp)])
@pytest.mark.parametrize(
    ("rows", "cols"), [(range(3, 30), range(59)), (range(20, 22), range(21, 43)), (range(59), range(58, 59))]
)
def test_any_rectangle(engine, make, rows, cols):
    case = make()
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


@pytest.mark.parametrize("engine", [*GENERAL, "factored"])
def test_what_is_held_constant_costs_nothing_per_row(engine):
    """Wide layers before the selected ones: a row costs what it would if their outputs were the data."""
    before = torch.nn.Sequential(torch.nn.Linear(5, 200), torch.nn.Tanh(), torch.nn.Linear(200, 5))
    after = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    (x, y), loss = zoo.data(), torch.nn.CrossEntropyLoss()

    def flops(problem, rows):
        placed = problem.place(torch.float64)
        out = torch.zeros(rows, placed.layout.size, dtype=placed.dtype)
        batch, add = next(placed.batches(None)), ENGINES[engine](placed, rows).add
        call = lambda: add(batch, range(rows), range(placed.layout.size), out)
        return metered(call, placed.device, placed.dtype, placed.problem.sample_count, counted=True).flops

    def per_row(problem):
        return (flops(problem, 10) - flops(problem, 5)) / 5

    whole = Problem(torch.nn.Sequential(before, after), loss, (x, y), params="1.*")
    assert per_row(whole) == per_row(Problem(after, loss, (before(x).detach(), y))) > 0
