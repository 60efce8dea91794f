"""A third party's word: the Hessians of statsmodels' logistic and multinomial regressions, on data people know.

Theirs are of the log-likelihood, in closed form: ours, of the negative one, have the other sign.
"""

import numpy as np
import pytest
import torch
from oracle import block_error
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from statsmodels.discrete.discrete_model import Logit, MNLogit
from torch import nn

from pipeline import Problem, compute_hessian


class BaseCategory(nn.Module):
    """A linear layer for all classes but the first, whose logit is zero."""

    def __init__(self, columns, others):
        super().__init__()
        self.linear = nn.Linear(columns, others)

    def forward(self, x):
        return nn.functional.pad(self.linear(x), (1, 0))


# Few columns each, in which the classes overlap: separable classes have no maximum of the likelihood.
DATA = {
    "breast cancer": (load_breast_cancer, [0, 1, 4, 8, 9]),
    "iris": (load_iris, [1]),
    "wine": (load_wine, [1, 2, 3, 4]),
}


def draw(name):
    """Standardised columns and classes."""
    load, columns = DATA[name]
    X, y = load(return_X_y=True)
    X = X[:, columns]
    return (X - X.mean(0)) / X.std(0), y


def check(theirs, params, linear, model, loss, X, target):
    """Compare at `params`, of which there is a column for each class but the base, its constant first."""
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(params[1:].T))
        linear.bias.copy_(torch.from_numpy(params[0]))
    problem = Problem(model, loss, (torch.from_numpy(X), target))
    found = compute_hessian(problem, executor="serial", dtype="float64", verify=False).to_numpy()
    place = np.arange(params.size).reshape(params.shape[1], -1)  # class by class; ours: all weights, then all biases
    order = np.concatenate([place[:, 1:].ravel(), place[:, 0]])
    truth = -theirs.hessian(params.ravel(order="F"))[np.ix_(order, order)]
    assert np.abs(found - truth).max() < 1e-9 * np.abs(truth).max()
    assert block_error(found, truth, problem.layout) < 1e-9


def parameters(theirs, shape, at):
    """The fitted ones, or random ones."""
    if at == "random":
        return np.random.default_rng(0).standard_normal(shape)
    fit = theirs.fit(disp=False)
    assert fit.mle_retvals["converged"]
    return np.asarray(fit.params).reshape(shape)


@pytest.mark.parametrize("at", ["fitted", "random"])
def test_logit(at):
    X, y = draw("breast cancer")
    theirs = Logit(y, np.column_stack([np.ones(len(X)), X]))
    params = parameters(theirs, (X.shape[1] + 1, 1), at)
    model = nn.Linear(X.shape[1], 1).double()
    check(theirs, params, model, model, nn.BCEWithLogitsLoss(reduction="sum"), X, torch.from_numpy(y[:, None] * 1.0))


@pytest.mark.parametrize("at", ["fitted", "random"])
@pytest.mark.parametrize("name", ["iris", "wine"])
def test_multinomial_logit(name, at):
    X, y = draw(name)
    theirs = MNLogit(y, np.column_stack([np.ones(len(X)), X]))
    params = parameters(theirs, (X.shape[1] + 1, 2), at)
    model = BaseCategory(X.shape[1], 2).double()
    check(theirs, params, model.linear, model, nn.CrossEntropyLoss(reduction="sum"), X, torch.from_numpy(y))
