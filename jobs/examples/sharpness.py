"""Sharpness along training: the largest eigenvalue of the Hessian at each checkpoint, beside 2 / learning rate.

    python jobs/examples/sharpness.py

Full-batch gradient descent drives it up to 2 / learning rate, and it stays about there (Cohen et al., ICLR 2021).
"""

import torch
from torch import nn

from pipeline import Problem, compute_hessian

RATE, EVERY = 0.1, 1600
torch.manual_seed(0)
x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
y = torch.special.legendre_polynomial_p(x, 4)
model, loss = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1)).double(), nn.MSELoss()
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
losses, sharpness = [], []
for step in range(5 * EVERY + 1):
    if step % EVERY == 0:
        H = compute_hessian(Problem(model, loss, (x, y)), executor="serial", verify=False)
        losses.append(H.loss)
        sharpness.append(float(H.eigsh(1, "LA", return_eigenvectors=False)[0]))
        print(f"step {step}: loss {H.loss:.4f}, sharpness {sharpness[-1]:.2f} of {2 / RATE:g}")
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
