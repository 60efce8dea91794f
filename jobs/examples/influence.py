"""What leaving a sample out does to the parameters, by the Hessian, beside training without it.

    python jobs/examples/influence.py

At the minimum of a mean L, theta without sample i is theta + H^-1 g_i / N to first order, g_i the sample's gradient.
"""

import numpy as np
import torch
from torch import nn

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
x, y = torch.randn(60, 3, dtype=torch.float64), torch.randint(0, 3, (60,))
model, loss = nn.Linear(3, 3).double(), lambda output, target: nn.functional.cross_entropy(output, target)


def train(kept):
    """The minimum of the ridge-regularised loss over some samples, as a flat vector."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        value = loss(model(x[kept]), y[kept]) + 0.005 * sum((p**2).sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()


theta = train(slice(None))
H = compute_hessian(Problem(model, loss, (x, y), l2=0.01), executor="serial")
each = [torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), model.parameters()) for i in range(20)]
gradients = np.stack([torch.cat([g.flatten() for g in of]).numpy() for of in each], axis=1)
predicted = H.solve(gradients + 0.01 * theta[:, None]) / (len(x) - 1)
retrained = np.stack([train(np.delete(np.arange(len(x)), i)) for i in range(20)], axis=1) - theta[:, None]
print("predicted and retrained changes correlate by", np.corrcoef(predicted.ravel(), retrained.ravel())[0, 1])
