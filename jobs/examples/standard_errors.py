"""Standard errors of a logistic regression: the roots of the diagonal of the inverse Hessian of its log-likelihood.

python -m pip install statsmodels && python jobs/examples/standard_errors.py
"""

import numpy as np
import statsmodels.api as sm
import torch
from torch import nn

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
x = torch.randn(500, 4, dtype=torch.float64)
y = (torch.rand(500) < torch.sigmoid(x @ torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64) - 0.3)).double()
model, loss = nn.Linear(4, 1).double(), nn.BCEWithLogitsLoss()

optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)


def closure():
    """The mean negative log-likelihood, and its gradient."""
    optimizer.zero_grad()
    value = loss(model(x)[:, 0], y)
    value.backward()
    return value


optimizer.step(closure)
H = compute_hessian(Problem(model, lambda output, target: loss(output[:, 0], target), (x, y)), executor="serial")
variances = H.inverse_diagonal() / len(x)  # L is a mean, the log-likelihood a sum

known = sm.Logit(y.numpy(), sm.add_constant(x.numpy(), prepend=False)).fit(disp=False, tol=1e-12)
errors, theirs = np.sqrt(variances), known.bse
print(errors, "statsmodels:", theirs, sep="\n")
