"""Laplace evidence, which chooses a net's width, and the predictive variance of the chosen one, by the exact Hessian.

    python jobs/examples/evidence.py

At the minimum of S L = -log p(y, theta): log p(y) = -S L - log |S H| / 2 + the constants of Gaussians (MacKay, 1992).
"""

import numpy as np
import torch
from torch import nn

from pipeline import Problem, compute_hessian

NOISE, PRIOR, N = 0.2, 0.3, 80  # standard deviation of y about f(x); precision of each weight; samples
S = N / (2 * NOISE**2)  # times a mean of squares: -log p(y | theta)
torch.manual_seed(0)
x = torch.cat([torch.rand(N // 2, 1) * 2 - 3, torch.rand(N // 2, 1) * 2 + 1]).double()  # nothing between -1 and 1
y, loss = torch.sin(2 * x) + NOISE * torch.randn(N, 1).double(), nn.MSELoss()
grid = torch.linspace(-4, 4, 33, dtype=torch.float64)[:, None]


def total(model):
    """The loss with the prior, L."""
    return loss(model(x), y) + PRIOR / S / 2 * sum((p**2).sum() for p in model.parameters())


evidences, variances = {}, {}
for width in (1, 4, 16):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), 1, 4000, None, 1e-11, 1e-16, line_search_fn="strong_wolfe")
    optimizer.step(lambda m=model, o=optimizer: (o.zero_grad(), value := total(m), value.backward())[1])
    H = compute_hessian(Problem(model, loss, (x, y), l2=PRIOR / S), executor="serial", dtype="float64")
    constants = len(H) / 2 * np.log(PRIOR / S) - N / 2 * np.log(2 * np.pi * NOISE**2)
    evidences[width] = float(constants - S * H.loss - H.logdet() / 2)
    slopes = [torch.autograd.grad(model(at)[0], list(model.parameters())) for at in grid]
    J = np.stack([nn.utils.parameters_to_vector(of).numpy() for of in slopes])
    variances[width] = np.einsum("np,pn->n", J, H.solve(J.T)) / S
best = max(evidences, key=evidences.get)
print("log evidence by width", evidences, "deviations at -4, -2, 0, 2, 4", np.sqrt(variances[best][::8]).round(3))
