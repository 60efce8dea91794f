"""Optimal brain surgeon beside magnitude pruning: which weights go, and the loss after.

    python jobs/examples/pruning.py

Taking out weight i and moving the others to the new minimum costs w_i^2 / (2 [H^-1]_ii) (Hassibi and Stork, 1992);
many at once, S: the others move by -[H^-1]_:S ([H^-1]_SS)^-1 w_S.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data[:, ::2] / 16), torch.tensor(digits.target)
model, loss = nn.Sequential(nn.Linear(32, 10), nn.Tanh(), nn.Linear(10, 10)).double(), nn.CrossEntropyLoss()
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=150)
optimizer.step(lambda: (optimizer.zero_grad(), value := loss(model(x), y), value.backward())[1])


def after(weights):
    """The loss at other parameters."""
    nn.utils.vector_to_parameters(torch.from_numpy(weights), model.parameters())
    return float(loss(model(x), y).detach())


w = nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()
H = compute_hessian(Problem(model, loss, (x, y)), executor="serial", verify=False)
damping = 1e-3 + max(0, -H.eigsh(1, "SA", return_eigenvectors=False)[0])
inverse, losses = H.solve(np.eye(len(w)), damping), []
for share in (0.1, 0.2, 0.3):
    gone = np.argsort(w**2 / inverse.diagonal())[: int(share * len(w))]
    surgeon = w - inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], w[gone])
    small = np.argsort(np.abs(w))[: len(gone)]
    losses.append((after(surgeon), after(np.where(np.isin(np.arange(len(w)), small), 0, w))))
    print(f"{len(gone)} of {len(w)} gone, loss {H.loss:.4f} before; after (surgeon, magnitude):", losses[-1])
