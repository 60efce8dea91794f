"""Functions whose gradient is right and whose double backward is wrong or missing: what differences of it are for."""

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hazards.base import Fn, adding, labels, normal, supervised

add = adding("wrong double backward")
N = 9
X, Y = normal(N, 2), labels(N)


class Fused(torch.autograd.Function):
    """x sigmoid(x) in a kernel whose backward is another kernel."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


class Elsewhere(torch.autograd.Function):
    """log(1 + exp(x)) by NumPy, forward and back: a second derivative is never seen."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.logaddexp(0.0, x.detach().numpy())).to(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(1 / (1 + np.exp(-x.detach().numpy()))).to(x)


class Adjoint(torch.autograd.Function):
    """Euler steps of h' = tanh(W h), differentiated by the adjoint of the same steps, without a graph."""

    @staticmethod
    def forward(ctx, h, weight):
        states = [h]
        for _ in range(3):
            states.append(states[-1] + 0.3 * torch.tanh(states[-1] @ weight))
        ctx.save_for_backward(weight, *states)
        return states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, *states = ctx.saved_tensors
        by_weight = torch.zeros_like(weight)
        for h in reversed(states[:-1]):
            slope = 0.3 * g * (1 - torch.tanh(h @ weight) ** 2)
            by_weight = by_weight + h.mT @ slope
            g = g + slope @ weight.mT
        return g, by_weight


class Equilibrium(torch.autograd.Function):
    """z = tanh(z w + x), whose gradient is by the implicit function theorem, once."""

    @staticmethod
    def forward(ctx, x, w):
        z = torch.zeros_like(x)
        for _ in range(200):
            z = torch.tanh(z * w + x)
        ctx.save_for_backward(z, w)
        return z

    @staticmethod
    def backward(ctx, g):
        z, w = (t.detach() for t in ctx.saved_tensors)
        slope = 1 - z**2
        u = g * slope / (1 - slope * w)
        return u, (u * z).sum(0)


def between(function):
    return lambda: supervised(
        Fn(lambda m, x: m.b(function(m.a(x))), a=nn.Linear(2, 3), b=nn.Linear(3, 3)), nn.CrossEntropyLoss(), X, Y
    )


add("differences: fused activation, once differentiable", between(Fused.apply))
add("differences: activation by NumPy", between(Elsewhere.apply))
adjoint = lambda m, x: m.b(Adjoint.apply(m.a(x), m.weight))
add(
    "differences: Euler steps by their adjoint",
    lambda: supervised(
        Fn(adjoint, a=nn.Linear(2, 3), weight=nn.Parameter(normal(3, 3)), b=nn.Linear(3, 3)),
        nn.CrossEntropyLoss(),
        X,
        Y,
    ),
)
equilibrium = lambda m, x: m.b(Equilibrium.apply(m.a(x), m.w))
add(
    "differences: equilibrium by the implicit function theorem",
    lambda: supervised(
        Fn(equilibrium, a=nn.Linear(2, 3), w=nn.Parameter(0.3 * normal(3)), b=nn.Linear(3, 3)),
        nn.CrossEntropyLoss(),
        X,
        Y,
    ),
)
