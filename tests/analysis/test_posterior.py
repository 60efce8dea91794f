"""A posterior from a stored matrix beside laplace-torch's own, of the same exact Hessian."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipeline import (
    BlockError,
    FingerprintError,
    IndefiniteError,
    MemoryRefusedError,
    Problem,
    compute_hessian,
)

laplace = pytest.importorskip("laplace")
N = 40
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # theirs multiplies with an identity in float32
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch itself, under curvlinops


def trained(likelihood, l2=0.0, dtype=torch.float64):
    """A net at the minimum of its loss and prior, its data, and the problem."""
    torch.manual_seed(0)
    x = torch.randn(N, 3, dtype=dtype)
    y = torch.randint(0, 3, (N,)) if likelihood == "classification" else torch.randn(N, 2, dtype=dtype)
    loss = nn.CrossEntropyLoss() if likelihood == "classification" else nn.MSELoss()
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, y.shape[-1] if y.ndim > 1 else 3)).to(dtype)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        value = loss(model(x), y) + 0.02 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    for p in model.parameters():
        p.grad = None
    return model, (x, y), Problem(model, loss, (x, y), l2=l2)


def theirs(model, likelihood, data, **options):
    from laplace.curvature import CurvlinopsHessian

    found = laplace.FullLaplace(model, likelihood, backend=CurvlinopsHessian, **options)
    found.fit(DataLoader(TensorDataset(*data), batch_size=N))
    return found


@pytest.mark.parametrize("l2", [0.0, 0.04])
@pytest.mark.parametrize(("likelihood", "options"), [("classification", {}), ("regression", {"sigma_noise": 0.7})])
def test_like_a_fit(likelihood, options, l2):
    model, data, problem = trained(likelihood, l2)
    options = {"prior_precision": 3.0, **options}
    expected = theirs(model, likelihood, data, **options)
    H = compute_hessian(problem, executor="serial", dtype="float64")
    found = H.to_laplace(model, likelihood, data[0][:1], **options)
    torch.testing.assert_close(found.posterior_precision, expected.posterior_precision, **CLOSE)
    torch.testing.assert_close(found.log_marginal_likelihood(), expected.log_marginal_likelihood(), **CLOSE)
    new = torch.randn(5, 3, dtype=torch.float64)
    asked = {"pred_type": "glm"} if likelihood == "regression" else {"pred_type": "glm", "link_approx": "probit"}
    torch.testing.assert_close(found(new, **asked), expected(new, **asked), **CLOSE)
    assert (found.n_data, found.n_outputs) == (expected.n_data, expected.n_outputs)


def test_of_some_parameters():
    model, data, problem = trained("classification")
    H = compute_hessian(problem, executor="serial", dtype="float64")
    for p in model[0].parameters():
        p.requires_grad_(False)
    found = H.select("2.*").to_laplace(model, "classification", data[0])
    torch.testing.assert_close(found.H, theirs(model, "classification", data).H, **CLOSE)


def test_in_the_models_type():
    model, data, problem = trained("classification", dtype=torch.float32)
    found = compute_hessian(problem, executor="serial").to_laplace(model, "classification", data[0])
    assert found.H.dtype == torch.float32
    torch.testing.assert_close(found.H, theirs(model, "classification", data).H, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit(monkeypatch):
    model, data, problem = trained("classification")
    H = compute_hessian(problem, executor="serial", dtype="float64")
    with pytest.raises(BlockError, match="expected 'classification' or 'regression'"):
        H.to_laplace(model, "ranking", data[0])
    with pytest.raises(BlockError, match=r"trainable parameters are not those of H \(\['0.bias'"):
        H.select("2.*").to_laplace(model, "classification", data[0])
    with pytest.raises(IndefiniteError, match=r"prior_precision=.* would do") as told:
        H.to_laplace(model, "classification", data[0], prior_precision=-50.0)
    assert np.isfinite(told.value.damping)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.analysis.view.available_bytes", lambda: 4 * 8 * 24**2 - 1)
        with pytest.raises(MemoryRefusedError, match="a full Laplace posterior of P = 24"):
            H.to_laplace(model, "classification", data[0])
    with torch.no_grad():
        model[0].bias.add_(1e-3)
    with pytest.raises(FingerprintError, match="other weights"):
        H.to_laplace(model, "classification", data[0])


def test_a_prior_that_would_do():
    """Far from a minimum the exact Hessian is indefinite."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(0, 3, (N,))
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    H = compute_hessian(Problem(model, nn.CrossEntropyLoss(), (x, y)), executor="serial", dtype="float64")
    with pytest.raises(IndefiniteError, match="would do") as told:
        H.to_laplace(model, "classification", x, prior_precision=1e-6)
    assert told.value.damping > 0
    assert np.isfinite(
        float(H.to_laplace(model, "classification", x, prior_precision=told.value.damping).log_det_ratio)
    )
