"""Parameters that reach the loss outside the call: through what the loss, the model or a hook holds."""

import copy
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding
from hazards.outside import ANCHORS, X, closed, net, penalised

add = adding("parameters outside the call")
DOUBLED = weakref.WeakKeyDictionary()


class WithLoss(nn.Module):
    """A model whose method is its loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))

    def loss(self, o, t):
        return F.huber_loss(o, t) + 0.05 * torch.logdet(torch.eye(3).to(o) + self.a.weight @ self.a.weight.mT)


class Recorded(nn.Module):
    """A layer that records its penalty on itself, where the loss reads it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        self.penalty = 1e-2 * self.a.weight.square().sum().square()
        return self.b(torch.tanh(self.a(x)))


def hooked():
    """A model that notes its weights' norms in a dict, by a hook; and the dict."""
    model, notes = net(), {}
    model[2].register_forward_hook(lambda m, _i, _o: notes.update(norm=m.weight.square().sum()))
    return model, lambda _m: lambda o, t: F.mse_loss(o, t) + 0.05 * notes["norm"] ** 2


def stale(m):
    """Taken out before and computed with: it does not follow the parameter."""
    if m not in DOUBLED:
        DOUBLED[m] = 2 * m[0].weight
    return lambda o, t: F.mse_loss(o, t) + 0.1 * DOUBLED[m].square().sum()


def autoencoder():
    return Fn(lambda m, x: torch.tanh(m.encode(x)), encode=nn.Linear(4, 2), decode=nn.Linear(2, 4))


def distilled():
    """A model and a frozen copy of it, to which the loss pulls it: right as it is."""
    model = net()
    teacher, start = copy.deepcopy(model).requires_grad_(False), {n: p.clone() for n, p in model.state_dict().items()}
    distance = lambda m: sum((p - start[n]).square().sum() for n, p in m.named_parameters())
    taught = lambda: (256 * teacher(ANCHORS[:1])).round() / 256  # the same in single precision
    return model, lambda m: lambda o, t: F.mse_loss(o, t) + F.mse_loss(o, taught() + 0 * o) + distance(m)


add("outside: method of the model as its loss", lambda: closed(WithLoss(), lambda m: m.loss))
add("outside: penalty recorded on the model", lambda: closed(Recorded(), penalised(lambda m: m.penalty)))
add("outside: penalty noted by a hook", lambda: closed(*hooked()))
add(
    "outside: decoder called by the loss",
    lambda: closed(autoencoder(), lambda m: lambda o, t: F.mse_loss(m.decode(o), t), X, X),
)
add("outside: a copy as teacher, its weights as a centre", lambda: closed(*distilled()))
add("outside: computed with before", lambda: closed(net(), stale), r"0\.weight|taken|outside")
