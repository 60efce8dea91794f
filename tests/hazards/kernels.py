"""Kernels that keep their slope as a number, as GPyTorch's do: the gradient is right, double backward is not."""

import math

import torch
from torch import nn

from hazards.base import Fn, adding, labels, normal, supervised

add = adding("wrong double backward")
N = 9
X, TARGETS = normal(N, 2), normal(N, 1, seed=3)


class Covariance(torch.autograd.Function):
    """exp(-d / 2) of squared distances, whose derivative is kept from the forward pass as a number."""

    @staticmethod
    def forward(ctx, gaps):
        cov = (-gaps / 2).exp()
        ctx.save_for_backward(-cov / 2)
        return cov

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Matern(torch.autograd.Function):
    """(1 + r) exp(-r), with the derivative by the scale kept; scales are the second argument."""

    @staticmethod
    def forward(ctx, gaps, scale):
        r = gaps / scale
        ctx.save_for_backward(-r * (-r).exp() / scale, r**2 * (-r).exp() / scale)
        return (1 + r) * (-r).exp()

    @staticmethod
    def backward(ctx, g):
        by_gap, by_scale = ctx.saved_tensors
        return g * by_gap, (g * by_scale).sum()


def squared(x, scale):
    z = x / scale
    return (z[:, None] - z[None]).square().sum(-1)


class Process(nn.Module):
    """Gives a covariance over its inputs."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel, self.scale = kernel, nn.Parameter(torch.tensor([0.8, 1.3]))
        self.noise, self.mean = nn.Parameter(torch.tensor(-1.5)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        return self.mean, self.kernel(x, self.scale) + self.noise.exp() * torch.eye(len(x)).to(x)


def marginal(o, y):
    """The negative log marginal likelihood over n."""
    mean, cov = o
    root = torch.linalg.cholesky(cov)
    alpha = torch.cholesky_solve(y - mean, root)
    return (0.5 * ((y - mean) * alpha).sum() + root.diagonal().log().sum() + len(y) / 2 * math.log(2 * math.pi)) / len(
        y
    )


def features(m, x):
    """A radial-basis network."""
    return m.head(Covariance.apply((x[:, None] - m.centers).square().sum(-1)))


def process(kernel):
    return lambda: supervised(Process(kernel), marginal, X, TARGETS, separable=False)


rbf = process(lambda x, s: Covariance.apply(squared(x, s)))
matern = process(lambda x, s: Matern.apply((squared(x, torch.ones(2).to(x)) + 1e-4).sqrt(), s[0]) * s[1])
add("differences: process with a kernel that keeps its slope", rbf)
add("differences: process with a kernel of two arguments", matern)
add(
    "differences: radial-basis network",
    lambda: supervised(
        Fn(features, centers=nn.Parameter(normal(3, 2, seed=6)), head=nn.Linear(3, 3)),
        nn.CrossEntropyLoss(),
        X,
        labels(N),
    ),
)
