"""A damped Newton step, p = -(H + damping I)^-1 g, beside the best step along the gradient.

python jobs/examples/newton.py
"""

import torch
from torch import nn

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
x, y = torch.randn(200, 6, dtype=torch.float64), torch.randint(0, 3, (200,))
model, loss = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), nn.CrossEntropyLoss()


def after(step):
    """The loss at theta + step."""
    moved = {name: p + torch.from_numpy(step[name]) for name, p in model.named_parameters()}
    return float(loss(torch.func.functional_call(model, moved, (x,)), y).detach())


steps = []
for k in range(5):
    H = compute_hessian(Problem(model, loss, (x, y)), executor="serial", verify=False)
    lowest = H.eigsh(1, "SA", return_eigenvectors=False)[0]
    damping = max(0.0, -lowest) + 1e-2  # a step that goes down: H + damping I is positive definite
    g, step = H.gradient, H.unflatten(-H.solve(H.gradient, damping))
    newton = after(step)
    descent = min(after(H.unflatten(-(2.0**e) * g)) for e in range(-3, 8))
    steps.append((H.loss, newton, descent))
    print(f"{k}: loss {H.loss:.4f}, lowest eigenvalue {lowest:.1e}; Newton {newton:.4f}, descent {descent:.4f}")
    with torch.no_grad():
        for name, part in step.items():
            model.get_parameter(name).add_(torch.from_numpy(part))
