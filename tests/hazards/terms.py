"""Losses of several terms, each over data of its own; objectives that give a scalar, or call other methods."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import adding, labels, normal

add = adding("several terms")
X, Y, TARGETS = normal(7, 4), labels(7), normal(7, 2, seed=3)
UNLABELLED, ANCHORS = normal(11, 4, seed=4), normal(3, 4, seed=5)
INSIDE, BOUNDARY, VALUES = (
    torch.linspace(-0.9, 0.8, 9)[:, None],
    torch.tensor([[-1.0], [1.0]]),
    torch.tensor([[0.5], [1.0]]),
)


def net(d=4, out=3):
    return nn.Sequential(nn.Linear(d, 3), nn.Tanh(), nn.Linear(3, out))


def termed(model, terms, **options):
    """`terms` are (coefficient, function(call, batch), data), as the problem takes them."""

    def whole(m, batches):
        return sum(c * value(f(m, b)) for (c, f, _), b in zip(terms, batches, strict=True))

    return model, whole, tuple(data for *_, data in terms), {"terms": terms, **options}


def value(found):
    """A mean, or a sum over its weight."""
    return found[0] / found[1] if isinstance(found, tuple) else found


def fitted(c, b):
    return F.cross_entropy(c(b[0]), b[1])


def summed(c, b):
    return F.cross_entropy(c(b[0]), b[1], reduction="sum", ignore_index=1), b[1].ne(1).sum()


def entropy(c, x):
    """Of what is predicted where nothing is known; its data is a tensor alone."""
    return torch.special.entr(c(x).softmax(-1)).sum(-1).mean()


def consistent(c, b):
    return F.mse_loss(c(b[0]), c(b[1]))


def equation(c, x):
    """The mean square of u'' - u inside."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = c(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend - u).square().mean()


def near(c, b):
    return F.mse_loss(c(b[0]), b[1])


class Coder(nn.Module):
    """An autoencoder with methods of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.classes = nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(2, 3)

    def encode(self, x):
        return torch.tanh(self.a(x))

    def decode(self, code):
        return self.b(code)

    def forward(self, x):
        return self.classes(self.encode(x))


def by_methods(m):
    """An objective that calls the model, and two of its methods."""
    return lambda c, b: F.cross_entropy(c(b[0]), b[1]) + F.mse_loss(m.decode(m.encode(b[0])), b[0])


def closing(model, close, batch, **options):
    """`close(model)` is the objective, a closure over the model."""
    return model, lambda m, b: value(close(m)(m, b)), batch, {"objective": close(model), "data": batch, **options}


def decayed_terms():
    model = net()
    decay = lambda m: 0.1 * sum(p.pow(4).sum() for p in m.parameters())
    model, _, batch, arguments = termed(
        model, [(1.0, fitted, (X, Y)), (0.5, lambda c, x: entropy(c, x) + decay(model), UNLABELLED)]
    )
    return model, lambda m, b: fitted(m, b[0]) + 0.5 * (entropy(m, b[1]) + decay(m)), batch, arguments


TERMS = {
    "labelled and not": lambda: termed(net(), [(1.0, fitted, (X, Y)), (0.25, entropy, UNLABELLED)]),
    "inside and boundary": lambda: termed(net(1, 1), [(1.0, equation, INSIDE), (10.0, near, (BOUNDARY, VALUES))]),
    "sums over weights": lambda: termed(net(), [(2.0, summed, (X, Y)), (0.5, fitted, (ANCHORS, labels(3)))]),
    "one term alone": lambda: termed(net(), [(3.0, fitted, (X, Y))]),
    "three terms": lambda: termed(
        net(), [(1.0, fitted, (X, Y)), (0.3, entropy, UNLABELLED), (0.1, consistent, (ANCHORS, ANCHORS + 0.1))]
    ),
    "one that is subtracted": lambda: termed(net(), [(1.0, fitted, (X, Y)), (-0.5, entropy, UNLABELLED)]),
    "scales far apart": lambda: termed(net(), [(1e-6, fitted, (X, Y)), (1e4, entropy, UNLABELLED)]),
    "with decay of all weights": decayed_terms,
}
for name_, make_ in TERMS.items():
    add(f"terms: {name_}", make_)


def ridge_terms():
    model, whole, batch, arguments = termed(net(), [(1.0, fitted, (X, Y)), (0.25, entropy, UNLABELLED)])
    total = lambda m, b: whole(m, b) + 0.15 * sum((p**2).sum() for p in m.parameters())
    return model, total, batch, {**arguments, "l2": 0.3}


add("terms: and an L2 term", ridge_terms)
add("objective: a scalar", lambda: closing(net(), lambda m: fitted, (X, Y)))
add(
    "objective: a scalar that is a sum",
    lambda: closing(net(), lambda m: lambda c, b: len(b[1]) * fitted(c, b), (X, Y), reduction="sum"),
)
add("objective: methods of the model", lambda: closing(Coder(), by_methods, (X, Y)))
add(
    "objective: a closure over the model",
    lambda: closing(
        net(),
        lambda m: (
            lambda c, b: (
                F.cross_entropy(c(b[0]), b[1], reduction="sum") + len(b[1]) * m[2].weight.pow(4).sum(),
                len(b[1]),
            )
        ),
        (X, Y),
    ),
)
add("objective: calls the model itself", lambda: closing(net(), lambda m: lambda c, b: fitted(m, b), (X, Y)))
