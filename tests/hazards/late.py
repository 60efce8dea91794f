"""Models that give something which reads their parameters later, in the loss."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, normal, supervised
from hazards.wrapped import X, Y

add = adding("wrapped modules")


class Late:
    """What a model gives: it reads the parameters when it is asked."""

    def __init__(self, module, x):
        self.module, self.x = module, x

    def log_prob(self, y):
        return self.module.b(torch.tanh(self.module.a(self.x))).log_softmax(-1).gather(1, y[:, None])[:, 0]


class LazyFlow(nn.Module):
    """A distribution whose transform is made when it is used."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Linear(4, 2), nn.Parameter(0.3 * normal(2))

    def forward(self, x):
        pull = lambda z: (z - self.shift(x)) * self.scale.exp()
        return lambda z: torch.distributions.Normal(0.0, 1.0).log_prob(pull(z)).sum(-1) + self.scale.sum()


class Mixture(nn.Module):
    """Gives itself and its input: its loss is another method."""

    def __init__(self):
        super().__init__()
        self.logits, self.centers = nn.Linear(4, 2), nn.Parameter(normal(2, 2, seed=4))

    def forward(self, x):
        return self, x

    def log_prob(self, x, z):
        gaps = (z[:, None] - self.centers).square().sum(-1)
        return (self.logits(x).log_softmax(-1) - gaps).logsumexp(-1)


def layer_by_layer(m, x):
    """Gives a generator of its layers' outputs."""
    for layer in m.layers:
        x = torch.tanh(layer(x))
        yield x


def late():
    loss = lambda o, y: -o.log_prob(y).mean()
    return supervised(Fn(lambda m, x: Late(m, x), a=nn.Linear(4, 3), b=nn.Linear(3, 3)), loss, X, Y)


add("wrapped: parameters read late", late)
add(
    "wrapped: flow whose transform is made late",
    lambda: supervised(LazyFlow(), lambda o, z: -o(z).mean(), X, normal(7, 2)),
)
add(
    "wrapped: mixture that gives itself",
    lambda: supervised(Mixture(), lambda o, z: -o[0].log_prob(o[1], z).mean(), X, normal(7, 2)),
)
add(
    "wrapped: generator of the layers' outputs",
    lambda: supervised(
        Fn(layer_by_layer, layers=nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 3)])),
        lambda o, y: sum(F.cross_entropy(h, y) for h in o),
        X,
        Y,
    ),
)
