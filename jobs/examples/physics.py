"""A physics-informed network: the Hessian of a sum of terms, each over points of its own.

    python jobs/examples/physics.py

The oscillator u'' + u = 0 on [0, 2], u(0) = 1, u'(0) = 0.
"""

import torch
from torch import nn
from torch.func import grad, vmap

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
interior, start = torch.rand(50, 1).double() * 2, torch.zeros(1, 1).double()


def residual(call, points):
    """Mean of (u'' + u)^2 over points."""
    curvature = vmap(grad(grad(lambda t: call(t[None])[0])))(points[:, 0])
    return ((curvature + call(points)[:, 0]) ** 2).mean()


def boundary(call, points):
    """How far u and u' are from what they are to be at the start."""
    slope = vmap(grad(lambda t: call(t[None])[0]))(points[:, 0])
    return ((call(points)[:, 0] - 1) ** 2 + slope**2).mean()


# L = 1.0 mean over the interior + 10.0 mean over the start.
problem = Problem(model, terms=[(1.0, residual, interior), (10.0, boundary, start)])
H = compute_hessian(problem, executor="serial")
print(H, "engines", set(H.manifest.engines.values()))
