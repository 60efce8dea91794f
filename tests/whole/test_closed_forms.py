"""Hessians that are known on paper."""

import numpy as np
import pytest
import torch
import zoo
from torch import nn

from pipeline import Problem, compute_hessian


def hessian(problem, **options):
    return compute_hessian(problem, dtype="float64", executor="serial", **options)


def linear(d, out):
    return zoo.seeded(lambda: nn.Linear(d, out, bias=False))


def test_linear_regression():
    """(2 / N C) I kron X'X."""
    x, _ = zoo.data(n=9)
    X = x.double().numpy()
    H = hessian(Problem(linear(5, 2), nn.MSELoss(), (x, torch.zeros(9, 2))))
    np.testing.assert_allclose(H.to_numpy(), 2 / (9 * 2) * np.kron(np.eye(2), X.T @ X), atol=1e-13)


def test_softmax_regression():
    """(1 / N) sum (diag p - p p') kron x x'."""
    x, y = zoo.data(n=9)
    model = linear(5, 3)
    P = torch.softmax(x.double() @ model.weight.double().T, 1).detach().numpy()
    X = x.double().numpy()
    truth = sum(np.kron(np.diag(p) - np.outer(p, p), np.outer(z, z)) for p, z in zip(P, X, strict=True)) / 9
    H = hessian(Problem(model, nn.CrossEntropyLoss(), (x, y)))
    np.testing.assert_allclose(H.to_numpy(), truth, atol=1e-13)


def test_softmax_regression_spectrum_at_zero():
    """lambda(X'X / N) / C, each C - 1 times, and zeros."""
    x, y = zoo.data(n=9)
    model = linear(5, 3)
    nn.init.zeros_(model.weight)
    found = np.linalg.eigvalsh(hessian(Problem(model, nn.CrossEntropyLoss(), (x, y))).to_numpy())
    X = x.double().numpy()
    expected = np.sort(np.concatenate([np.zeros(5), *[np.linalg.eigvalsh(X.T @ X / 9) / 3] * 2]))
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_logistic_regression():
    """X' diag(p (1 - p)) X / N."""
    x, y = zoo.data(n=9, classes=2)
    model = linear(5, 1)
    X = x.double().numpy()
    p = 1 / (1 + np.exp(-X @ model.weight.detach().double().numpy()[0]))
    H = hessian(Problem(model, nn.BCEWithLogitsLoss(), (x, y.float()[:, None])))
    np.testing.assert_allclose(H.to_numpy(), X.T @ np.diag(p * (1 - p)) @ X / 9, atol=1e-13)


def test_two_layer_network():
    """Bishop (1992): a tanh layer and a linear output, squared error; the three kinds of blocks."""
    x, _ = zoo.data(n=6, d=3)
    model = zoo.seeded(lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)))
    t = torch.randn(6, 1, generator=torch.Generator().manual_seed(3))
    X, T = x.double().numpy(), t.double().numpy()[:, 0]
    W, v = (p.detach().double().numpy() for p in model.parameters())
    v = v[0]
    A = X @ W.T
    Z, D1 = np.tanh(A), 1 - np.tanh(A) ** 2
    D2 = -2 * Z * D1
    r = Z @ v - T
    H = hessian(Problem(model, lambda out, y: ((out - y) ** 2).sum() / 2, (x, t), reduction="sum"))
    np.testing.assert_allclose(H["2.weight", "2.weight"][0, :, 0, :], Z.T @ Z, atol=1e-13)
    mixed = np.einsum("nj,ni,nk,j->jik", D1, X, Z, v)
    mixed[np.arange(4), :, np.arange(4)] += np.einsum("n,nj,ni->ji", r, D1, X)
    np.testing.assert_allclose(H["0.weight", "2.weight"][:, :, 0, :], mixed, atol=1e-13)
    first = np.einsum("nj,ni,nk,nl,j,k->jikl", D1, X, D1, X, v, v)
    first[np.arange(4), :, np.arange(4), :] += np.einsum("n,nj,j,ni,nl->jil", r, D2, v, X, X)
    np.testing.assert_allclose(H["0.weight", "0.weight"], first, atol=1e-13)


def test_deep_linear_net_at_zero():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    for p in model.parameters():
        nn.init.zeros_(p)
    x, _ = zoo.data(d=3)
    H = hessian(Problem(model, nn.MSELoss(), (x, torch.ones(7, 3))), engine="rows")
    assert not H.to_numpy().any()


@pytest.mark.parametrize("case", [zoo.mlp, zoo.layer_norm, zoo.attention])
def test_sum_over_classes_of_the_head_is_zero(case):
    """Softmax is unmoved when all logits move together."""
    H = hessian(case().problem)
    head = next(p.name for p in reversed(H.parameters.parameters) if len(p.shape) == 2)
    p = H.parameters[head]
    rows = H[p.span.start : p.span.stop, :].reshape(*p.shape, -1)
    assert np.abs(rows.sum(0)).max() < 1e-14


def test_relu_diagonal_blocks_are_gauss_newton():
    """Piecewise linear, convex loss: each layer's diagonal block is positive semi-definite."""
    H = hessian(zoo.relu_mse().problem)
    for p in H.parameters:
        assert np.linalg.eigvalsh(H[p.name, p.name].reshape(p.size, p.size)).min() > -1e-13


def test_partial_transpose_symmetry():
    """A linear layer applied once per sample: H[(i,j),(p,k)] = H[(p,j),(i,k)]."""
    H = hessian(zoo.mlp().problem)
    block = H["2.weight", "2.weight"]
    np.testing.assert_allclose(block, block.transpose(2, 1, 0, 3), atol=1e-14)
