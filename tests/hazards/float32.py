"""Single precision written into a model, which is judged by a twin that takes the type of its weights."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, call, labels, normal, twinned

add = adding("float32 written in")
X, TOKENS, Y = normal(7, 4), labels(7, 4, classes=5), labels(7)
PIXELS = labels(7, 6, classes=256).to(torch.uint8)
SEQUENCES = normal(7, 3, 4)


def written(function, clean, x=X, y=Y, **parts):
    """`function` with float32 in it and `clean` without, of the same parts, under cross-entropy."""
    made = {name: part() for name, part in parts.items()}
    model = Fn(function, **made)
    twin = Fn(clean, **{name: part() for name, part in parts.items()})
    if "table" in made:  # an attribute that is no buffer; the twin has one
        del model._buffers["table"]
        model.table = made["table"]
    whole = lambda m, b: F.cross_entropy(call(m, b[0]), b[1])
    return twinned(model, twin, whole, (x, y), {"loss": nn.CrossEntropyLoss(), "data": (x, y)})


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def head(width=4):
    return lambda: nn.Linear(width, 3)


def gru(m, x, start):
    return m.head(m.cell(x.transpose(0, 1), start)[1][-1])


def lstm(m, x, state):
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
    return m.head(state[0])


def cayley(m, x, unit):
    """An orthogonal layer."""
    skew = m.weight - m.weight.mT
    return m.head(torch.tanh(x @ torch.linalg.solve(unit + skew, unit - skew)))


def shift():
    return np.eye(4, dtype=np.float32)[::-1].copy()


count = lambda t: torch.stack([torch.bincount(row, minlength=5) for row in t])
small = {"net": net, "head": head()}
MODELS = {  # with float32, without, what goes in, parts
    "GRU from zeros": (
        lambda m, x: gru(m, x, torch.zeros(1, len(x), 2)),
        lambda m, x: gru(m, x, None),
        SEQUENCES,
        {"cell": lambda: nn.GRU(4, 2), "head": head(2)},
    ),
    "LSTM cell from zeros and ones": (
        lambda m, x: lstm(m, x, (torch.zeros(len(x), 2), torch.ones(len(x), 2))),
        lambda m, x: lstm(m, x, (x.new_zeros(len(x), 2), x.new_ones(len(x), 2))),
        SEQUENCES,
        {"cell": lambda: nn.LSTMCell(4, 2), "head": head(2)},
    ),
    "one-hot tokens": (
        lambda m, t: m.head(F.one_hot(t, 5).float().mean(1)),
        lambda m, t: m.head(F.one_hot(t, 5).to(m.head.weight).mean(1)),
        TOKENS,
        {"head": head(5)},
    ),
    "counts of tokens": (
        lambda m, t: m.head(torch.log1p(count(t).float())),
        lambda m, t: m.head(torch.log1p(count(t).to(m.head.weight))),
        TOKENS,
        {"head": head(5)},
    ),
    "pixels of bytes": (
        lambda m, p: m.head((p.float() / 256 - 0.5) / torch.tensor(0.25)),
        lambda m, p: m.head((p.to(m.head.weight) / 256 - 0.5) / 0.25),
        PIXELS,
        {"head": head(6)},
    ),
    "pixels by type()": (
        lambda m, p: m.head(p.type(torch.FloatTensor).div(256).sub(0.5)),
        lambda m, p: m.head(p.to(m.head.weight).div(256).sub(0.5)),
        PIXELS,
        {"head": head(6)},
    ),
    "matrix as an attribute": (
        lambda m, x: m.head(torch.tanh(m.net(x) @ m.table)),
        lambda m, x: m.head(torch.tanh(m.net(x) @ m.table)),
        X,
        {**small, "table": lambda: normal(4, 4, seed=8)},
    ),
    "identity made inside": (
        lambda m, x: cayley(m, x, torch.eye(4)),
        lambda m, x: cayley(m, x, torch.eye(4).to(x)),
        X,
        {"weight": lambda: nn.Parameter(normal(4, 4)), "head": head()},
    ),
    "nodes of a quadrature": (
        lambda m, x: m.head(m.net(x).unsqueeze(-1).matmul(torch.linspace(0, 1, 5)[None]).tanh().mean(-1)),
        lambda m, x: m.head((m.net(x).unsqueeze(-1) * torch.linspace(0, 1, 5).to(x)).tanh().mean(-1)),
        X,
        small,
    ),
    "constant by NumPy": (
        lambda m, x: m.head(torch.tanh(m.net(x) @ torch.from_numpy(shift()))),
        lambda m, x: m.head(torch.tanh(m.net(x) @ torch.from_numpy(shift()).to(x))),
        X,
        small,
    ),
    "constant by torch.Tensor": (
        lambda m, x: m.head(m.net(x).mm(torch.Tensor([[0.5, 0, 0, 1], [1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 4]]))),
        lambda m, x: m.head(m.net(x) @ x.new_tensor([[0.5, 0, 0, 1], [1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 4]])),
        X,
        small,
    ),
    "constant of a list": (
        lambda m, x: m.head(F.linear(m.net(x), torch.tensor([[0.5, 0.0, 1.0, -2.0]] * 4).triu())),
        lambda m, x: m.head(F.linear(m.net(x), x.new_tensor([[0.5, 0.0, 1.0, -2.0]] * 4).triu())),
        X,
        small,
    ),
}


def add_all(models):
    for name, (function, clean, x, parts) in models.items():
        add(f"float32: {name}", functools.partial(written, function, clean, x, **parts))


add_all(MODELS)
