"""Single precision written into a loss or an objective, which are written a second time without."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import adding, call, labels, normal

add = adding("float32 written in")
X, Y, SIGNS = normal(7, 4), labels(7), labels(7, 3, classes=2)
WEIGHTS = torch.tensor([0.25, 1.0, 3.0])
METRIC = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 4.0]])


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def written(loss, clean, y, **options):
    """A loss with float32 in it, and without."""
    return net(), lambda m, b: clean(call(m, b[0]), b[1]), (X, y), {"loss": loss, "data": (X, y), **options}


class Mahalanobis(nn.Module):
    """A loss module that keeps its metric as an attribute."""

    def __init__(self):
        super().__init__()
        self.metric = METRIC

    def forward(self, o, t):
        gap = o - t
        return torch.einsum("ni,ij,nj->n", gap, self.metric, gap).mean()


def cooling(call, batch):
    """Two passes, whose outputs are mixed by weights made inside."""
    x, y = batch
    mixed = torch.stack([call(x), call(-x)], -1) @ torch.tensor([0.75, 0.25])
    return F.cross_entropy(mixed, y, reduction="sum"), torch.tensor(float(len(x)))


def cooling_clean(m, batch):
    x, y = batch
    return F.cross_entropy(0.75 * m(x) + 0.25 * m(-x), y)


def smoothed(o, y):
    """Label smoothing by hand."""
    target = torch.full((len(y), 3), 0.125)
    target[torch.arange(len(y)), y] = 0.75
    return F.kl_div(o.log_softmax(-1), target, reduction="batchmean")


def smoothed_clean(o, y):
    target = 0.125 + 0.625 * F.one_hot(y, 3).to(o)
    return F.kl_div(o.log_softmax(-1), target, reduction="batchmean")


LOSSES = {
    "class weights in a lambda": (
        lambda o, y: (F.cross_entropy(o, y, weight=WEIGHTS, reduction="sum"), WEIGHTS[y].sum()),
        lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS.to(o)),
        Y,
    ),
    "weight of the positive": (
        lambda o, y: F.binary_cross_entropy_with_logits(o, y.float(), pos_weight=WEIGHTS),
        lambda o, y: F.binary_cross_entropy_with_logits(o, y.to(o), pos_weight=WEIGHTS.to(o)),
        SIGNS,
    ),
    "one-hot targets": (
        lambda o, y: F.binary_cross_entropy(o.sigmoid(), F.one_hot(y, 3).float()),
        lambda o, y: F.binary_cross_entropy(o.sigmoid(), F.one_hot(y, 3).to(o)),
        Y,
    ),
    "logits in single": (lambda o, y: F.cross_entropy(o.float(), y), F.cross_entropy, Y),
    "both in single": (
        lambda o, y: F.huber_loss(o.float(), y.float()),
        lambda o, y: F.huber_loss(o, y.to(o)),
        SIGNS,
    ),
    "dice of a mask in single": (
        lambda o, y: (1 - 2 * (o.sigmoid() * y.float()).sum(1) / (o.sigmoid() + 1).sum(1)).mean(),
        lambda o, y: (1 - 2 * (o.sigmoid() * y.to(o)).sum(1) / (o.sigmoid() + 1).sum(1)).mean(),
        SIGNS,
    ),
    "metric in a closure": (
        lambda o, y: ((o @ METRIC - y) ** 2).mean(),
        lambda o, y: ((o @ METRIC.to(o) - y) ** 2).mean(),
        SIGNS,
    ),
    "metric of a loss module": (
        Mahalanobis(),
        lambda o, y: torch.einsum("ni,ij,nj->n", o - y, METRIC.to(o), o - y).mean(),
        SIGNS,
    ),
    "targets made inside": (smoothed, smoothed_clean, Y),
    "log-probabilities by dtype=": (
        lambda o, y: F.nll_loss(F.log_softmax(o, -1, dtype=torch.float32), y),
        F.cross_entropy,
        Y,
    ),
}
for name_, (loss_, clean_, y_) in LOSSES.items():
    add(f"float32 in the loss: {name_}", lambda loss=loss_, clean=clean_, y=y_: written(loss, clean, y))
add(
    "float32 in the objective",
    lambda: (net(), cooling_clean, (X, Y), {"objective": cooling, "data": (X, Y)}),
)
