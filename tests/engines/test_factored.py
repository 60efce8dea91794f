"""Where the factored engine's conditions end, and what is done there."""

import numpy as np
import pytest
import torch
import zoo
from oracle import block_error
from torch import nn

from pipeline import BlockError, Problem, SpecError, compute_hessian
from pipeline.engines import factored, pullback
from pipeline.engines.registry import ENGINES

SETTINGS = {"executor": "serial", "dtype": "float64"}


def rows_of(problem):
    """The truth, by the last rung."""
    return compute_hessian(problem, engine="rows", verify=False, **SETTINGS).to_numpy()


class Pooled(nn.Module):
    """A dense layer at as many positions as a batch has."""

    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(16, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inside(x)).mean(1))


class Sorting(nn.Module):
    """Samples are put in order by their first input; a loss that does not mind."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x):
        z = torch.tanh(self.first(x))
        order = x[:, 0].argsort()
        return self.second(z[order])[order.argsort()]


def test_batches_unlike_those_that_preflight_saw():
    """Two positions, then nine: too many to be worth it, which changes the engine and not the matrix."""
    torch.manual_seed(0)
    batches = [(torch.randn(n, positions, 16), torch.randn(n, 2)) for n, positions in ((6, 2), (5, 9), (6, 2))]
    problem = Problem(zoo.seeded(Pooled), nn.MSELoss(), batches)
    H = compute_hessian(problem, engine="factored", **SETTINGS)
    np.testing.assert_allclose(H.to_numpy(), rows_of(problem), rtol=0, atol=1e-14)


def test_samples_in_another_order():
    """Products pair sample n of one layer with sample n of the other: preflight shows it is not the same sample."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randn(40, 1)
    x = x[x[:, 0].argsort()]  # in order already, but for two
    x[[10, 30]] = x[[30, 10]]
    problem = Problem(zoo.seeded(Sorting), nn.MSELoss(), (x, y))
    H = compute_hessian(problem, **SETTINGS)
    assert H.manifest.engines["first.weight"] == "jacrev"
    np.testing.assert_allclose(H.to_numpy(), rows_of(problem), rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [zoo.mlp, zoo.layer_norm])
def test_for_tensor_cores(make):
    """In float32, as right as without; what does not factorise goes by other engines."""
    case, settings = make(), {"executor": "serial", "dtype": "float32"}
    H = compute_hessian(case.problem, engine="factored_tf32x3", **settings)
    usual = compute_hessian(case.problem, **settings)
    by = H.manifest.engines
    assert {name for name, engine in by.items() if engine == "factored_tf32x3"} == {
        name for name, engine in usual.manifest.engines.items() if engine == "factored"
    }
    assert "factored_tf32x3" in by.values()
    errors = [block_error(each.to_numpy(), case.truth(), H.parameters) for each in (H, usual)]
    assert errors[0] < 3 * errors[1]
    assert not np.array_equal(H.to_numpy(), usual.to_numpy())


def test_tensor_cores_have_no_float64():
    with pytest.raises(SpecError, match="factored_tf32x3, which computes in float32"):
        compute_hessian(zoo.mlp().problem, engine="factored_tf32x3", **SETTINGS)


class SequenceFirst(nn.Module):
    """A second layer that is given positions first and samples second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(9, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("samples", [4, 5])
def test_as_many_samples_as_positions(samples):
    """Whatever a micro-batch's size, the dimension that counts samples is not taken for another."""
    torch.manual_seed(0)
    x, y = torch.randn(samples, 5, 9), torch.randn(samples, 5, 2)
    problem = Problem(zoo.seeded(SequenceFirst), nn.MSELoss(), (x, y))
    placed, rows = problem.place(torch.float64), problem.layout["first.weight"].span
    found = torch.zeros(2, len(rows), problem.layout.size, dtype=torch.float64)
    for name, out in zip(("factored", "jacrev"), found, strict=True):
        ENGINES[name](placed, 8).add(next(placed.batches(None)), rows, range(problem.layout.size), out)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_parameters_without_entries(shape):
    model = zoo.tanh_net()
    model.register_parameter("empty", nn.Parameter(torch.zeros(shape)))
    problem = Problem(model, nn.CrossEntropyLoss(), zoo.data())
    np.testing.assert_allclose(compute_hessian(problem, **SETTINGS).to_numpy(), rows_of(problem), rtol=0, atol=1e-14)


def test_a_block_alone():
    case = zoo.mlp()
    name = next(iter(case.problem.layout)).name
    H = compute_hessian(case.problem, blocks=[(name, name)], chunk=8, **SETTINGS)
    span = case.problem.layout[name].span
    known = case.truth()[span.start : span.stop, span.start : span.stop]
    np.testing.assert_allclose(H[name, name].reshape(known.shape), known, rtol=0, atol=1e-14)


def test_no_block():
    with pytest.raises(BlockError, match="holds no entry"):
        compute_hessian(zoo.mlp().problem, blocks=[], **SETTINGS)


def test_preflight_multiplies_whole_units(monkeypatch):
    """Most of a matrix comes of products over whole units of a layer: preflight looks at these."""
    whole = factored.add_symmetric
    monkeypatch.setattr(factored, "add_symmetric", lambda *arguments: [whole(*arguments) for _ in range(2)])
    torch.manual_seed(0)
    problem = Problem(nn.Linear(40, 6), nn.CrossEntropyLoss(), (torch.randn(9, 40), torch.randint(0, 6, (9,))))
    assert compute_hessian(problem, verify=False, **SETTINGS).manifest.engines["weight"] == "jacrev"


def test_a_contest_is_decided_by_the_times_it_shows():
    """At several positions both engines are right, and both are timed; a bias goes with its weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    problem = Problem(net, nn.CrossEntropyLoss(), (torch.randn(8, 3, 6, 6), torch.randint(0, 3, (8,))))
    manifest = compute_hessian(problem, verify=False, **SETTINGS).manifest
    found = manifest.preflight.parameters["0.weight"]
    times = {engine: float(did.split("; ")[1].split(" ms")[0]) for engine, did in found.tried.items()}
    assert set(times) == {"factored", "jacrev"}
    assert times[found.engine] == min(times.values())
    assert manifest.engines["0.bias"] == found.engine


@pytest.mark.parametrize("engine", ["factored", "jacrev"])
def test_an_operation_that_cannot_be_batched_is_pulled_back_one_by_one(monkeypatch, engine):
    """Some batching rules of torch fail at some sizes only: of indices, where one sample is left."""
    case = zoo.mlp()

    def failing(_):
        def fail(*_):
            raise RuntimeError("the expanded size of the tensor (1) must match the existing size (3)")

        return fail

    monkeypatch.setattr(pullback, "vmap", failing)
    H = compute_hessian(case.problem, engine=engine, verify=False, **SETTINGS)
    np.testing.assert_allclose(H.to_numpy(), case.truth(), rtol=0, atol=1e-14)
