"""Sloppiness: the eigenvalues of a small net's Hessian, spread over decades; few directions matter to the loss.

    python jobs/examples/sloppiness.py

A fit of data by y = f(x; theta) has stiff and sloppy directions, evenly in the logarithm (Transtrum et al., 2015).
"""

import numpy as np
import torch
from torch import nn

from pipeline import Problem, compute_hessian
from pipeline.analysis.spectrum_summary import decades

torch.manual_seed(0)
x = torch.linspace(-2, 2, 80, dtype=torch.float64)[:, None]
y = torch.sin(2 * x) + 0.3 * torch.cos(5 * x)
model, loss = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)).double(), nn.MSELoss()
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2000, line_search_fn="strong_wolfe")
optimizer.step(lambda: (optimizer.zero_grad(), value := loss(model(x), y), value.backward())[1])

H = compute_hessian(Problem(model, loss, (x, y)), executor="serial", dtype="float64")
w, U = H.eigh()
edges = decades(w)
for low, high, count in zip(edges[:-1], edges[1:], np.histogram(w, edges)[0], strict=True):
    print(f"{low:9.0e} to {high:8.0e}  {'#' * count}")

weights = nn.utils.parameters_to_vector(model.parameters()).detach()
rises = []
for k in (-1, len(w) // 2):  # the stiffest direction, and one in the middle
    nn.utils.vector_to_parameters(weights + 0.05 * torch.from_numpy(U[:, k].copy()), model.parameters())
    rises.append(float(loss(model(x), y).detach()) - H.loss)
print(f"loss {H.loss:.2e}; a step of 0.05 costs {rises[0]:.2e} along the stiffest, {rises[1]:.2e} along a middling one")
