"""What a forward pass or a loss leaves behind in modules: caches, casts, assigned data, buffers, compiled functions."""

import copy
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, call, normal, supervised, twinned

add = adding("left behind")
X, Y = normal(9, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1])
SEQUENCES = normal(9, 5, 4)
ADJACENCY = (normal(9, 9, seed=2) > 0).float() + torch.eye(9)


def classified(model, x=X, **options):
    return supervised(model, nn.CrossEntropyLoss(), x, Y, **options)


def twice(forward, **parts):
    """A dense layer, a tanh, and what a function makes of it with another dense layer."""
    return classified(Fn(forward, a=nn.Linear(4, 3), head=nn.Linear(3, 3), **parts))


def masked(m, x):
    """Attention with a mask for each length, made at first."""
    n = x.shape[1]
    if n not in m.masks:
        m.masks[n] = torch.triu(torch.full((n, n), float("-inf")), 1)
    return m.head(((m.q(x) @ m.k(x).mT + m.masks[n]).softmax(-1) @ x).mean(1))


def with_masks(masks):
    model = Fn(masked, q=nn.Linear(4, 4), k=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.masks = masks
    return classified(model, SEQUENCES)


class Normalised(nn.Module):
    """A graph layer that keeps the normalised adjacency with its kind, as some libraries do."""

    def __init__(self):
        super().__init__()
        self.dense, self.cached = nn.Linear(4, 3), None

    def forward(self, x, adjacency):
        if self.cached is None:
            d = adjacency.sum(1).rsqrt()
            self.cached = (d[:, None] * adjacency * d, "symmetric")
        return self.cached[0] @ self.dense(x)


class Inverse(nn.Module):
    """Of a constant, made when it is first asked for."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 3)

    @functools.cached_property
    def inverse(self):
        kind = self.dense.weight.dtype
        return torch.linalg.inv(torch.eye(3, dtype=kind) + torch.arange(9, dtype=kind).reshape(3, 3) / 70)

    def forward(self, x):
        return self.dense(x).tanh() @ self.inverse.to(x)


class MaxNorm(nn.Linear):
    """Its rows are made shorter where they are too long, which they are not."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 50.0)
        return super().forward(x)


def registered(m, x):
    hidden = m.a(x).tanh()
    if "seen" in m._buffers:
        m.seen = hidden.detach().mean(0)
    else:
        m.register_buffer("seen", hidden.detach().mean(0))
    return m.head(hidden)


def compiled(m, x):
    if m.act is None:
        m.act = torch.compile(lambda z: z * torch.tanh(z), backend="eager")
    return m.head(m.act(m.a(x)))


def lazily_compiled():
    model = Fn(compiled, a=nn.Linear(4, 3), head=nn.Linear(3, 3))
    model.act = None
    return classified(model)


def moved_criterion():
    weight = torch.tensor([1.0, 2.0, 0.5])
    criterion = nn.CrossEntropyLoss(weight=weight)

    def loss(o, t):
        return criterion.to(o.device)(o, t)

    def whole(m, b):
        return F.cross_entropy(call(m, b[0]), b[1], weight=weight.double())

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return model, whole, (X, Y), {"loss": loss, "data": (X, Y), "separable": False}


def perceptual():
    """A frozen network beside the model, which the loss moves to where the output is."""
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).requires_grad_(False)
    target = normal(9, 3, seed=4)

    def loss(o, t):
        other.to(o.device)
        return F.mse_loss(other(o), other(t))

    def whole(m, b):
        exact = [(p.double()) for p in other.parameters()]
        through = [torch.tanh(F.linear(z, *exact)) for z in (call(m, b[0]), b[1])]
        return F.mse_loss(*through)

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    return model, whole, (X, target), {"loss": loss, "data": (X, target)}


def sparse_features(layout):
    dense = X.relu()
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    whole = classified(model, dense)
    return (*whole[:3], whole[3] | {"data": (getattr(dense, f"to_sparse_{layout}")(), Y)})


def long_doubles():
    x = X.double().numpy()
    found = classified(nn.Linear(4, 3), X)
    return (*found[:3], found[3] | {"data": (x.astype(np.longdouble), Y)})


class ForLarger(nn.Module):
    """Something that is made for batches of more than four samples alone."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.mask = nn.Linear(4, 3), nn.Linear(3, 3), None

    def forward(self, x):
        hidden = self.a(x).tanh()
        if len(x) > 4 and self.mask is None:
            self.mask = torch.zeros_like(hidden[0])
        return self.head(hidden if self.mask is None else hidden + self.mask)


class FixedPoint(nn.Module):
    """Iterated to convergence, of a map that is no contraction at any weights but small ones."""

    def __init__(self):
        super().__init__()
        self.inner, self.a = nn.Linear(3, 3, bias=False), nn.Linear(4, 3)
        self.inner.weight.data.mul_(0.3)

    def forward(self, x):
        z = self.a(x)
        for _ in range(60):
            z = self.inner(z).tanh() + self.a(x)
        return z


def of_positive(o, t):
    """A loss of some samples, with their number."""
    mask = (t > 0).to(o)
    return (F.cross_entropy(o, t, reduction="none") * mask).sum(), mask.sum()


def of_some(model):
    def whole(m, b):
        total, weight = of_positive(call(m, b[0]), b[1])
        return total / weight

    return model, whole, (X, Y), {"loss": of_positive, "data": (X, Y)}


def with_teacher():
    """Kept in half precision, and cast to what it is given."""
    teacher = [nn.Linear(4, 3).requires_grad_(False).half()]

    def taught(m, x):
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        other = F.linear(x, teacher[0].weight.to(kind), teacher[0].bias.to(kind))
        return m.a(x).tanh() + other

    def casting(m, x):
        return m.a(x).tanh() + copy.deepcopy(teacher[0]).to(x.dtype)(x)

    return twinned(Fn(casting, a=nn.Linear(4, 3)), *classified(Fn(taught, a=nn.Linear(4, 3))))


def clamped_in_place():
    def loss(o, t):
        return F.mse_loss(o, t.clamp_(-1, 1))

    def whole(m, b):
        return F.mse_loss(call(m, b[0]), b[1].clamp(-1, 1))

    targets = normal(9, 3, seed=8)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh()), whole, (X, targets), {"loss": loss, "data": (X, targets.clone())}


add("a mask kept in a dict", lambda: with_masks({}))
add(
    "an adjacency kept in a tuple",
    lambda: (
        *supervised(Normalised(), nn.CrossEntropyLoss(), (X, ADJACENCY), Y)[:3],
        {"loss": nn.CrossEntropyLoss(), "data": ((X, ADJACENCY), Y), "separable": False},
    ),
)
add("a cached property", lambda: classified(Inverse()))
add("rows renormed by assigning data", lambda: classified(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), MaxNorm(3, 3))))
add(
    "a head cast in the forward pass",
    lambda: twinned(
        twice(lambda m, x: m.head.float()(m.a(x).tanh().float()))[0], *twice(lambda m, x: m.head(m.a(x).tanh()))
    ),
)
add("a head moved in the forward pass", lambda: twice(lambda m, x: m.head.to(x.device)(m.a(x).tanh())))
add("a head cast to its input", lambda: twice(lambda m, x: m.head.to(x.dtype)(m.a(x).tanh())))
add("a buffer registered in the forward pass", lambda: twice(registered))
add("a buffer assigned in the forward pass", lambda: twice(registered, seen=torch.zeros(3)))
add("a function compiled in the forward pass", lazily_compiled)
add("a criterion moved in the loss", moved_criterion)
add("a network moved in the loss", perceptual)
add("features in compressed rows", lambda: sparse_features("csr"))
add("features in compressed columns", lambda: sparse_features("csc"))
add("features of long doubles", long_doubles)
add("a mask made for larger batches", lambda: classified(ForLarger()))
add("a fixed point, and a weight of some samples", lambda: of_some(FixedPoint()))
add("a teacher in half precision", with_teacher)
add("targets clamped in place", clamped_in_place)
