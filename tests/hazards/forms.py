"""Forms of a batch: more parts than two, flags, lists, mappings, missing values, tensors of unequal length."""

import collections
import types

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, labels, normal

add = adding("forms of data")
X, Y, W = normal(7, 4), labels(7), torch.linspace(0.25, 2, 7)
MISSING = torch.where(torch.arange(14).reshape(7, 2) % 3 == 1, torch.nan, normal(7, 2, seed=3))
GAPS = torch.where(torch.arange(28).reshape(7, 4) % 5 == 1, torch.nan, X)
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2, 5], [1, 2, 3, 4, 5, 6, 0, 3, 6, 1]])


def net(d=4, out=3):
    return nn.Sequential(nn.Linear(d, 3), nn.Tanh(), nn.Linear(3, out))


def formed(model, loss, data, whole, batch, **options):
    """`data` as the user has it; `whole` takes the plain tensors of `batch`."""
    return model, whole, batch, {"loss": loss, "data": data, **options}


def weighted(o, y, w):
    return (w * F.cross_entropy(o, y, reduction="none")).sum(), w.sum()


def whole_weighted(m, b):
    total, weight = weighted(m(b[0]), *b[1:])
    return total / weight


def four_parts(o, y, w, center):
    return (w * (o - center[:, :3]).square().sum(-1) + F.cross_entropy(o, y, reduction="none")).mean()


def present(o, y):
    """Mean over the labels that are there."""
    there = ~y.isnan()
    return (o - y)[there].square().sum(), there.sum()


def imputed():
    """A model that fills what is missing by what it has learnt."""
    return Fn(lambda m, x: m.net(torch.where(x.isnan(), m.fill, x)), net=net(), fill=nn.Parameter(normal(4)))


def steered(m, x, scale=1.0, mode="relu", power=1, residual=False, mask=None):
    """A model whose keywords are no tensors."""
    h = getattr(torch, mode)(m.a(x)) ** power * scale
    h = h + x if residual else h
    return m.b(h if mask is None else h * mask)


def by_name(m, x, y=None):
    return m.net(x)


def summed(m, parts):
    """A model of one input, a list."""
    assert isinstance(parts, list | tuple)
    return m.net(torch.cat(list(parts), -1))


FLAGS = {"x": X, "scale": 0.5, "mode": "tanh", "power": 2, "residual": True, "mask": None}
steerable = lambda: Fn(steered, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
keyword = lambda: Fn(by_name, net=net())
plain = lambda m, b: F.cross_entropy(m(b[0]), b[1])
from_batch = lambda o, b: F.cross_entropy(o, b["y"])


class Encoding(collections.UserDict):
    """A mapping of a tokenizer's own, with attributes."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


add("form: a third part, of weights", lambda: formed(net(), weighted, (X, Y, W), whole_weighted, (X, Y, W)))
add(
    "form: four parts",
    lambda: formed(net(), four_parts, (X, Y, W, X), lambda m, b: four_parts(m(b[0]), *b[1:]), (X, Y, W, X)),
)
add(
    "form: three parts, batches of them",
    lambda: formed(net(), weighted, [(X[:5], Y[:5], W[:5]), (X[5:], Y[5:], W[5:])], whole_weighted, (X, Y, W)),
)
MAPPINGS = {"a dict": dict, "an ordered one": collections.OrderedDict, "a tokenizer's": Encoding}
MAPPINGS["a proxy"] = types.MappingProxyType
for name_, kind_ in MAPPINGS.items():
    add(
        f"form: mapping, {name_}",
        lambda kind=kind_: formed(keyword(), from_batch, kind({"x": X, "y": Y}), plain, (X, Y)),
    )
add(
    "form: mapping with flags",
    lambda: formed(
        steerable(),
        lambda o, b: o.square().mean() * b["scale"] if b["residual"] else o.sum(),
        [FLAGS],
        lambda m, b: 0.5 * m(b[0], 0.5, "tanh", 2, True).square().mean(),
        (X,),
    ),
)
add(
    "form: keywords with flags, and a target",
    lambda: formed(
        steerable(),
        nn.CrossEntropyLoss(),
        (FLAGS, Y),
        lambda m, b: F.cross_entropy(m(b[0], 0.5, "tanh", 2, True), b[1]),
        (X, Y),
    ),
)
for kind_ in (list, tuple):
    add(
        f"form: a {kind_.__name__} of inputs",
        lambda kind=kind_: formed(
            Fn(summed if kind is list else lambda m, a, b: m.net(torch.cat([a, b], -1)), net=net()),
            nn.CrossEntropyLoss(),
            (kind([X[:, :3], X[:, 3:]]), Y),
            lambda m, b: F.cross_entropy(m.net(torch.cat(b[:2], -1)), b[2]),
            (X[:, :3], X[:, 3:], Y),
        ),
    )
add(
    "form: labels that are missing",
    lambda: formed(
        net(out=2), present, (X, MISSING), lambda m, b: (lambda s, n: s / n)(*present(m(b[0]), b[1])), (X, MISSING)
    ),
)
add("form: features that are missing", lambda: formed(imputed(), nn.CrossEntropyLoss(), (GAPS, Y), plain, (GAPS, Y)))
add(
    "form: features that are missing and used",
    lambda: formed(net(), F.cross_entropy, (GAPS, Y), plain, (GAPS, Y)),
    r"NaN|nan",
)
