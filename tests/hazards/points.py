"""Points at which derivatives are hard to judge: heads of zeros, kinks, ties, scales far apart."""

import copy

import torch
from torch import nn

from hazards.base import Fn, add, between, classifier, labels, normal, supervised
from hazards.functions import CubeDetached, CubeWrong
from hazards.layers import tanh
from hazards.losses import ce_net
from hazards.tricks import UP


def zero_head(body):
    model, *rest = between(body)
    model.head[1].weight.data.zero_()
    model.head[1].bias.data.zero_()
    return model, *rest


def zero_bias(body, x):
    """A sample of zeros and biases of zero: the pre-activations lie at the kink."""
    model, *rest = between(body, x=x)
    model.body[0].bias.data.zero_()
    return model, *rest


WITH_ZEROS = torch.cat([normal(6, 5), torch.zeros(1, 5)])
add("zero head over a layer norm", lambda: zero_head(nn.Sequential(nn.LayerNorm(4), tanh())))
add("zero head over a wrong backward", lambda: zero_head(Fn(lambda _, x: CubeWrong.apply(x))), UP + "|Cube")
add("zero head over a wrong double backward", lambda: zero_head(Fn(lambda _, x: CubeDetached.apply(x))), UP + "|Cube")
for kinked in (nn.ReLU(), nn.LeakyReLU(0.1), nn.Softshrink(0.0), nn.ELU(0.5), nn.Hardtanh(0.0, 1.0)):
    add(
        f"{kinked!r} at its kink",
        lambda kinked=kinked: zero_bias(copy.deepcopy(kinked), WITH_ZEROS),
        r"body\.[01]|kink|differentiable",
    )
for kinked in (nn.ELU(), nn.CELU(0.5), nn.GELU(), nn.Softplus()):
    add(
        f"{kinked!r} at zero",
        lambda kinked=kinked: zero_bias(copy.deepcopy(kinked), WITH_ZEROS),
        r"body\.[01]|kink|differentiable",
    )
add(
    "max pool of ties that stay",
    lambda: classifier(
        nn.Sequential(nn.Conv1d(1, 3, 1), nn.MaxPool1d(2), tanh()), normal(5, 1, 3).repeat_interleave(2, 2)
    ),
)
add(
    "max pool of ties that break",
    lambda: classifier(
        nn.Sequential(
            nn.Conv1d(1, 2, 1, bias=False),
            Fn(lambda m, x: x + m.shift, shift=nn.Parameter(torch.zeros(6))),
            nn.MaxPool1d(2),
            tanh(),
        ),
        torch.ones(5, 1, 6) * normal(5, 1, 1),
    ),
    r"body\.1\.shift|body\.2|kink|differentiable",
)
add(
    "absolute error of a linear model",
    lambda: supervised(nn.Linear(5, 3), nn.L1Loss(), torch.cat([normal(6, 5), torch.zeros(1, 5)]), normal(7, 3)),
)
add("dead relu", lambda: between(Fn(lambda _, x: (x - 50).relu() + x.tanh())))
add("saturated softmax", lambda: between(Fn(lambda _, x: (200 * x).softmax(-1) + x.tanh())))
add(
    "huge and tiny scales",
    lambda: between(
        Fn(
            lambda m, x: m.big * 1e-6 * x.tanh() + 1e-5 * m.small,
            big=nn.Parameter(1e6 + normal(4)),
            small=nn.Parameter(normal(4)),
        )
    ),
)
add("catastrophic cancellation", lambda: between(Fn(lambda _, x: (x + 1e9) - 1e9 + x.tanh())), UP)
add("linear model and linear loss", lambda: supervised(nn.Linear(5, 1), lambda o, y: o.mean(), normal(7, 5), labels(7)))
add(
    "loss that does not depend on the data",
    lambda: supervised(ce_net(), lambda o, y: (0 * o).sum(), normal(7, 5), labels(7)),
)
