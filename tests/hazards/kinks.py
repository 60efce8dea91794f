"""Kinks and some hundred samples, where one parameter or all take plain double backward row by row."""

import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hazards.base import Fn, adding, labels, normal, supervised
from hazards.functions import Cube
from hazards.outside import closed, penalised

add, N = adding("kinks"), 400
X, Y = normal(N, 4), normal(N, 2, seed=3)


class Checkpointed(nn.Module):
    """A hidden layer that is computed again in backward."""

    def __init__(self, kink):
        super().__init__()
        self.a, self.b, self.c, self.kink = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2), kink

    def forward(self, x):
        return self.c(checkpoint(lambda h: self.kink(self.b(h)), self.kink(self.a(x)), use_reentrant=False))


class Bag(nn.Module):
    """A sparse embedding, a kink, a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.net, self.head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.net(self.embed(tokens).sum(1)).relu())


def mlp(kink):
    return nn.Sequential(nn.Linear(4, 9), kink, nn.Linear(9, 2))


def cubed():
    """An old-style function after a max-pool."""
    return Fn(
        lambda m, x: m.head(Cube.apply(F.max_pool1d(m.net(x), 2)).flatten(1)),
        net=nn.Conv1d(1, 2, 3),
        head=nn.Linear(2, 2),
    )


def batch_normed():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    return supervised(model, nn.MSELoss(), X, Y, separable=False)


small_decay = penalised(lambda m: 1e-2 * sum(p.pow(4).sum() for p in m.parameters()))
for kink_ in (nn.ReLU(), nn.LeakyReLU(0.2), nn.Hardtanh(-0.5, 0.5), nn.PReLU(2)):
    kinked_ = lambda kink=kink_: Checkpointed(nn.PReLU(1) if isinstance(kink, nn.PReLU) else kink)
    add(f"kinks: {kink_!r}, checkpointed", lambda model=kinked_: supervised(model(), nn.MSELoss(), X, Y))
add("kinks: relu and a closure over the model", lambda: closed(mlp(nn.ReLU()), small_decay, X, Y))
add("kinks: maxout by an old-style function", lambda: supervised(cubed(), nn.MSELoss(), normal(N, 1, 4), Y))
add("kinks: relu after batch norm in train mode", batch_normed)
add(
    "kinks: relu after a sparse embedding",
    lambda: supervised(Bag(), nn.CrossEntropyLoss(), labels(N, 2, classes=5), labels(N, classes=2)),
)
for loss_ in (nn.HuberLoss(delta=0.6), nn.SmoothL1Loss(beta=0.3)):
    add(
        f"kinks: {loss_!r} and a checkpoint",
        lambda loss=loss_: supervised(Checkpointed(nn.Tanh()), loss, X, Y),
    )
add(
    "kinks: squared hinge and a closure",
    lambda: closed(
        mlp(nn.Tanh()),
        lambda m: lambda o, t: (1 - o * t.sign()).relu().square().mean() + 1e-2 * m[0].weight.pow(4).sum(),
        X,
        Y,
    ),
)
add(
    "kinks: relu, a thousand samples",
    lambda: supervised(Checkpointed(nn.ReLU()), nn.MSELoss(), normal(1000, 4), normal(1000, 2, seed=3)),
)
