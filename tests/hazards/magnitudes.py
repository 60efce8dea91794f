"""Rows and columns of scales of their own: features and outputs as they are measured."""

import torch
from torch import nn

from hazards.base import Fn, adding, labels, normal, supervised
from hazards.functions import CubeDetached, cube_with

add = adding("magnitudes")
UNITS = torch.tensor([1e-5, 1.0, 3e3, 1e6])
X = normal(9, 4) * UNITS
CubeHalf = cube_with(lambda x: (1.5 * x + 1.5 * x.detach()) * x)


def scaled(out=3, hidden=4):
    """A net whose first weights undo the features' units, as training leaves them."""
    model = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, out))
    model[0].weight.data.mul_(2 / UNITS)
    return model


def small_path(function):
    """The first feature, small in its units, goes through the function, the others do not; one weight holds all."""
    return Fn(
        lambda m, x: (lambda h: h[..., 1:].tanh().sum(-1) + function(1 + h[..., 0]))(x[:, None] * m.weight),
        weight=nn.Parameter(normal(2, 4, seed=7)),
    )


def one_row(function):
    """Of a layer's rows one goes through the function, and counts for little."""
    return Fn(
        lambda m, x: (lambda h: torch.cat([h[:, 1:].tanh(), 1e-8 * function(h[:, :1])], 1))(m.net(x)),
        net=nn.Linear(4, 3),
    )


def powers(x):
    return torch.stack([x**k for k in range(1, 6)], 1)


class Spread(nn.Module):
    """A model whose outputs are in units of their own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3))
        self.register_buffer("units", torch.tensor([1e-6, 1.0, 1e5]))

    def forward(self, x):
        return self.net(x) * self.units


def rare_tokens():
    """Of an embedding's rows one is seen in every sample, others once, one never."""
    tokens = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 2, 0], [0, 0, 0]])
    model = Fn(
        lambda m, t: m.head((m.embed(t) * m.size).sum(1).tanh()),
        embed=nn.Embedding(5, 3),
        head=nn.Linear(3, 2),
        size=torch.tensor([1e-4, 1.0, 30.0]),
    )
    return supervised(model, nn.CrossEntropyLoss(), tokens, labels(5, classes=2))


WRONG = r"Cube|weight|net\.weight|`"
add("scales: net on features in their units", lambda: supervised(scaled(), nn.CrossEntropyLoss(), X, labels(9)))
add(
    "scales: linear model of features in their units",
    lambda: supervised(nn.Linear(4, 2), nn.MSELoss(), X, normal(9, 2)),
)
add(
    "scales: powers of one feature",
    lambda: supervised(nn.Linear(5, 1), nn.MSELoss(), powers(4 * normal(9)), normal(9, 1, seed=2)),
)
add("scales: outputs in their units", lambda: supervised(Spread(), nn.MSELoss(), normal(9, 4), normal(9, 3)))
add("scales: tokens seldom seen", rare_tokens)
add(
    "scales: convolution of channels in their units",
    lambda: supervised(
        nn.Sequential(nn.Conv1d(2, 2, 2), nn.Flatten(), nn.Linear(6, 2)),
        nn.MSELoss(),
        normal(7, 2, 4) * torch.tensor([[1e5], [1e-3]]),
        normal(7, 2),
    ),
)
for name_, function_ in {"detached": CubeDetached.apply, "half detached": CubeHalf.apply}.items():
    add(
        f"scales: {name_} slope of a small feature",
        lambda f=function_: supervised(small_path(f), nn.MSELoss(), X / UNITS.clamp(min=1), normal(9, 2)),
        WRONG,
    )
    add(
        f"scales: {name_} slope of one row, which counts for little",
        lambda f=function_: supervised(one_row(f), nn.MSELoss(), normal(9, 4), normal(9, 3, seed=4)),
        WRONG,
    )
