"""Losses that are not separable and say so: graphs, sets, pairs, time series, kernels; no part of the batch will do."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, labels, normal, objective, supervised

add = adding("inseparable")
N = 12
X, Y, TARGETS = normal(N, 4), labels(N), normal(N, 2, seed=3)
GRAPH = torch.softmax(normal(N, N, seed=4), -1)
TIMES, EVENTS = normal(N, seed=5).exp(), labels(N, classes=2, seed=6)
classify, fit = nn.CrossEntropyLoss(), nn.MSELoss()


def net(out=3):
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, out))


def together(model, loss, x, y, **options):
    return supervised(model, loss, x, y, separable=False, **options)


def propagated(m, x):
    """A graph network: its graph is of these nodes and no others."""
    return m.b(m.graph @ torch.tanh(m.graph @ m.a(x)))


def in_sets(m, x):
    """Sets of three rows each, pooled and given back to their members."""
    members = torch.tanh(m.a(x)).view(4, 3, 3)
    return m.b(torch.cat([members, members.mean(1, keepdim=True).expand(4, 3, 3)], -1).view(12, 6))


def as_series(m, x):
    """The rows are the steps of one series."""
    return m.head(m.rnn(x[:, None])[0][:, 0])


def each_other(m, x):
    """Attention over the samples."""
    return m.head((m.q(x) @ m.k(x).mT).softmax(-1) @ x)


class Process(nn.Module):
    """A Gaussian process that takes nothing but the points it was trained on."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("x", x)
        self.scales, self.noise = nn.Parameter(0.3 * normal(4)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        if x.shape != self.x.shape:
            raise RuntimeError("you must train on the training inputs")
        z = x * self.scales.exp()
        gaps = (z[:, None] - z[None]).square().sum(-1)
        return (-0.5 * gaps).exp() + self.noise.exp() * torch.eye(len(x)).to(x)


def left_one_out(cov, y):
    """Leave-one-out errors of the process's mean."""
    inverse = torch.linalg.inv(cov)
    return ((inverse @ y) / inverse.diagonal()[:, None]).square().mean()


def partial_likelihood(o, batch):
    """Cox: each event against those that are still at risk."""
    times, events = batch
    at_risk = times[None] >= times[:, None]
    pooled = o[:, 0].expand(len(o), -1).masked_fill(~at_risk, -1e9).logsumexp(-1)
    return ((pooled - o[:, 0]) * events).sum() / events.sum()


def discrepancy(o, y):
    """Maximum mean discrepancy between outputs and targets."""
    k = lambda a, b: (-(a[:, None] - b[None]).square().sum(-1)).exp().mean()
    return k(o, o) - 2 * k(o, y) + k(y, y)


def transport(o, y):
    """Entropic optimal transport by Sinkhorn's iteration."""
    cost = (o[:, None] - y[None]).square().sum(-1)
    u, v = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])
    for _ in range(5):
        u = -torch.logsumexp(v[None] - cost, 1)
        v = -torch.logsumexp(u[:, None] - cost, 0)
    return ((u[:, None] + v[None] - cost).exp() * cost).sum() / len(o)


def decorrelated(c, batch):
    """Barlow twins: correlations of two views over the batch are to be the identity."""
    first, second = ((z - z.mean(0)) / z.std(0) for z in map(c, batch))
    gap = first.mT @ second / len(first) - torch.eye(first.shape[1]).to(first)
    return gap.square().sum() * len(first), len(first)


def hardest(o, y):
    """Triplets of the farthest of one's own and the nearest of the others."""
    gaps = (o[:, None] - o[None]).square().sum(-1) + 1e-3
    same = y[:, None] == y[None]
    return F.softplus(gaps.masked_fill(~same, -1e3).amax(1) - gaps.masked_fill(same, 1e3).amin(1)).mean()


def correlation(o, y):
    """One less Pearson's correlation."""
    a, b = o - o.mean(0), y - y.mean(0)
    return 1 - ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean()


MODELS = {
    "graph network on its graph": lambda: Fn(propagated, a=nn.Linear(4, 3), b=nn.Linear(3, 3), graph=GRAPH),
    "sets of three by a fixed view": lambda: Fn(in_sets, a=nn.Linear(4, 3), b=nn.Linear(6, 3)),
    "rows as a series": lambda: Fn(as_series, rnn=nn.GRU(4, 2), head=nn.Linear(2, 3)),
    "attention over samples": lambda: Fn(each_other, q=nn.Linear(4, 2), k=nn.Linear(4, 2), head=nn.Linear(4, 3)),
    "running sum over samples": lambda: Fn(lambda m, x: m.net(x).cumsum(0).tanh(), net=nn.Linear(4, 3)),
    "noise for each row of the data": lambda: Fn(
        lambda m, x: m.net(x + m.noise), net=net(), noise=nn.Parameter(0.1 * normal(N, 4, seed=8))
    ),
}
for name_, model_ in MODELS.items():
    add(f"together: {name_}", lambda model=model_: together(model(), classify, X, Y))
LOSSES = {
    "Cox's partial likelihood": (lambda: net(1), partial_likelihood, (TIMES, EVENTS)),
    "mean discrepancy": (lambda: net(2), discrepancy, TARGETS),
    "optimal transport": (lambda: net(2), transport, TARGETS),
    "hardest triplets": (lambda: net(2), hardest, Y),
    "correlation": (lambda: net(2), correlation, TARGETS),
    "Gaussian process, one left out": (lambda: Process(X), left_one_out, TARGETS),
}
for name_, (model_, loss_, y_) in LOSSES.items():
    add(f"together: {name_}", lambda model=model_, loss=loss_, y=y_: together(model(), loss, X, y))
add(
    "together: views that are decorrelated",
    lambda: objective(net(), decorrelated, (X, normal(N, 4, seed=9)), separable=False),
)
