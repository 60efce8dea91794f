"""Dropout, and what models keep: state between calls, caches, buffers."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, add, between, normal
from hazards.layers import tanh
from hazards.tricks import RANDOM


class Counter(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + self.calls % 3)


class Average(nn.Module):
    """Keeps a moving average, which matters or not."""

    def __init__(self, matters):
        super().__init__()
        self.matters = matters
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return torch.tanh(x - self.mean) if self.matters else torch.tanh(x)


class Carried(nn.Module):
    """A recurrent net that goes on from the state of its last call."""

    def __init__(self):
        super().__init__()
        self.cell, self.state = nn.RNNCell(4, 4), None

    def forward(self, x):
        self.state = self.cell(x, None if self.state is None else self.state.detach())
        return self.state


class Cached(nn.Module):
    """Computes from its parameter once, and keeps that."""

    def __init__(self):
        super().__init__()
        self.weight, self.cache = nn.Parameter(normal(4, 4)), None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.linalg.matrix_exp(self.weight.detach())
        return torch.tanh(x @ self.cache)


class Switched(nn.Module):
    """Switches itself to eval mode when first called."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(x)
        self.drop.eval()
        return y


def sparse_mm(m, x):
    return torch.sparse.mm(m.graph, x.T).T.tanh()


def fixed_noise(m, x):
    return torch.tanh(x + m.noise)


eye4 = lambda: torch.eye(4).roll(1, 0).to_sparse()
for drop in (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout):
    dropped = rf"body\.1|{drop.__name__}"
    add(f"{drop.__name__} train", lambda drop=drop: between(drop(0.5), tanh()), dropped)
    add(f"{drop.__name__} eval", lambda drop=drop: between(drop(0.5).eval(), tanh()))
    add(f"{drop.__name__} train p=0", lambda drop=drop: between(drop(0.0), tanh()), dropped)
add("dropout always on", lambda: between(Fn(lambda _, x: F.dropout(x, 0.5))), RANDOM)
add("dropout p=1", lambda: between(nn.Dropout(1.0), nn.Linear(4, 4)), r"body\.1|Dropout")
STATEFUL = {
    "counter": (Counter, r"body\.1|Counter|not deterministic"),
    "moving average that does not matter": (partial(Average, matters=False), r"body\.1|Average"),
    "moving average that matters": (partial(Average, matters=True), r"body\.1|Average"),
    "state carried between calls": (Carried, r"body\.1|Carried|not deterministic"),
    "value cached from a parameter": (Cached, r"body\.1\.weight|Cached"),
    "dropout that switches itself off": (Switched, r"body\.1|Switched|Dropout|not deterministic"),
    "noise in a buffer": (lambda: Fn(fixed_noise, noise=normal(4)), ""),
    "sparse matrix in a buffer": (lambda: Fn(sparse_mm, graph=eye4()), ""),
    "complex buffer": (
        lambda: Fn(lambda m, x: (m.rotation * x).real.tanh(), rotation=torch.polar(torch.ones(4), normal(4))),
        "",
    ),
    "integer and boolean buffers": (
        lambda: Fn(
            lambda m, x: (x[:, m.order] * m.mask).tanh(),
            order=torch.tensor([2, 0, 3, 1]),
            mask=torch.tensor([True, False, True, True]),
        ),
        "",
    ),
    "buffer that is NaN and unused": (lambda: Fn(lambda m, x: x.tanh(), bad=torch.full((2,), float("nan"))), ""),
    "frozen random projection": (
        lambda: Fn(lambda m, x: torch.tanh(x @ m.map), map=nn.Parameter(normal(4, 4), requires_grad=False)),
        "",
    ),
    "complex parameter": (
        lambda: Fn(
            lambda m, x: (m.rotation * x).real.tanh(), rotation=nn.Parameter(torch.polar(torch.ones(4), normal(4)))
        ),
        r"rotation",
    ),
}
for name_, (part, culprit_) in STATEFUL.items():
    add(name_, lambda part=part: between(part()), culprit_)
