"""Parameters that reach the loss outside the call: penalties over the model, in a closure or a module."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from hazards.base import adding, call, normal

add = adding("parameters outside the call")
X, Y, ANCHORS = normal(7, 4), normal(7, 2, seed=3), normal(3, 4, seed=5)
# One feature as it is measured, one that is never there: against the first, what a penalty adds to a block is nothing.
RAW = torch.cat([X[:, :1], 2e4 * X[:, 1:2], 0 * X[:, 2:3], X[:, 3:]], 1)
PRIOR = (lambda a: a @ a.mT / 23)(normal(23, 23, seed=6))


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def raw_net():
    """A linear one that was trained on raw features: small weights beside the large one."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 2))
    model[0].weight.data[:, 1] *= 1e-4
    return model


def closed(model, close, x=X, y=Y, **options):
    """`close(model)` is the loss, a closure over the model."""

    def whole(m, b):
        return close(m)(call(m, b[0]), b[1])

    return model, whole, (x, y), {"loss": close(model), "data": (x, y), **options}


def penalised(penalty):
    """Mean-squared error and a penalty that is a function of the model."""
    return lambda m: lambda o, t: F.mse_loss(o, t) + penalty(m)


def consolidated(m):
    """Elastic weight consolidation about other weights."""
    return 0.05 * sum((k + 1) * ((p - 0.1 * k) ** 4).sum() for k, (_, p) in enumerate(m.named_parameters()))


def taken_before(m):
    """The weight is taken out of the model when the loss is made."""
    w = m[0].weight
    return lambda o, t: F.mse_loss(o, t) + 0.1 * (w @ w.mT - torch.eye(3).to(w)).square().sum()


def by_partial(m):
    def loss(o, t, *, weights):
        return F.mse_loss(o, t) + 1e-2 * torch.stack([w.pow(4).sum() for w in weights]).sum().sqrt()

    return partial(loss, weights=list(m.parameters()))


class Penalised(nn.Module):
    """A loss module that holds the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.share = model, 1e-2

    def forward(self, o, t):
        return F.mse_loss(o, t) + self.share * sum(p.pow(4).sum() for p in self.model.parameters())


CLOSURES = {
    "quartic decay of weights, by module": penalised(
        lambda m: 1e-3 * sum(p.weight.pow(4).sum() for p in m.modules() if isinstance(p, nn.Linear))
    ),
    "smooth group lasso": penalised(
        lambda m: 1e-2 * sum((p.square().sum(-1) + 1e-3).sqrt().sum() for p in m.parameters() if p.ndim > 1)
    ),
    "consolidation about other weights": penalised(consolidated),
    "Gaussian prior on the vector of all": penalised(
        lambda m: 1e-3 * (lambda v: v @ PRIOR.to(v) @ v)(parameters_to_vector(m.parameters()))
    ),
    "product of two layers' norms": penalised(lambda m: 1e-3 * m[0].weight.square().sum() * m[2].weight.square().sum()),
    "second call on anchors": penalised(lambda m: 0.1 * m(ANCHORS.to(m[0].weight)).square().mean()),
    "a layer called by the loss": penalised(lambda m: 0.1 * m[2](torch.ones(1, 3).to(m[2].weight)).exp().sum()),
    "weight taken out before": taken_before,
    "partial that holds the parameters": by_partial,
    "loss module that holds the model": Penalised,
}
for name_, close_ in CLOSURES.items():
    add(f"outside: {name_}", lambda close=close_: closed(net(), close))
    add(f"outside, raw features: {name_}", lambda close=close_: closed(raw_net(), close, RAW))
add(
    "outside, raw features: penalty on one entry of many",
    lambda: closed(
        nn.Linear(60, 1),
        penalised(lambda m: 0.05 * m.weight[0, 37] ** 2),
        torch.cat([3e4 * normal(9, 37), 0 * normal(9, 1), normal(9, 22, seed=4)], 1),
        normal(9, 1, seed=3),
    ),
)
