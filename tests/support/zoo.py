"""A zoo of problems: each with the loss over all its data written a second time, for the oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oracle import dense_hessian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipeline import Problem


@dataclass(frozen=True)
class Case:
    """A problem, and (model, batch) -> loss over the whole data set."""

    problem: Problem
    whole_loss: Callable[[nn.Module, Any], torch.Tensor]
    whole_batch: Any

    def truth(self):
        problem = self.problem
        return dense_hessian(problem.model, self.whole_loss, self.whole_batch, problem.layout.names, problem.l2)


def data(n=7, d=5, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randint(0, classes, (n,), generator=g)


def seeded(make):
    torch.manual_seed(0)
    return make()


def tanh_net(d=5, h=4, out=3):
    return seeded(lambda: nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, out)))


def supervised(model, loss, inputs, target, **options):
    return Case(Problem(model, loss, (inputs, target), **options), lambda m, b: loss(m(b[0]), b[1]), (inputs, target))


def mlp():
    return supervised(tanh_net(), nn.CrossEntropyLoss(), *data())


def mlp_sum():
    return supervised(tanh_net(), nn.CrossEntropyLoss(reduction="sum"), *data())


def relu_mse():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)))
    x, _ = data()
    return supervised(model, nn.MSELoss(), x, torch.randn(7, 2, generator=torch.Generator().manual_seed(1)))


def layer_norm():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)))
    torch.nn.init.normal_(model[1].weight)
    return supervised(model, nn.CrossEntropyLoss(), *data())


def batch_norm_eval():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    model(data(n=50)[0])
    return supervised(model.eval(), nn.CrossEntropyLoss(), *data())


def batch_norm_batch():
    """Batch statistics: samples act on each other."""
    make = lambda: nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 3)
    )
    return supervised(seeded(make), nn.CrossEntropyLoss(), *data(), separable=False)


def conv():
    make = lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return supervised(seeded(make), nn.CrossEntropyLoss(), x, torch.tensor([0, 2, 1, 1, 0]))


def weighted_ignored():
    """Class weights and ignored targets: the weight of a batch is not its size."""
    x, y = data(n=9)
    y[[1, 4, 8]] = -100
    weight = torch.tensor([0.2, 1.0, 3.0])
    problem = Problem(tanh_net(), nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), (x, y))
    whole = lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=weight.double(), label_smoothing=0.1)
    return Case(problem, whole, (x, y))


def bce():
    x, y = data(classes=2)
    target = F.one_hot(y, 3).float()
    weight = torch.tensor([1.0, 2.0, 0.5])
    problem = Problem(tanh_net(), nn.BCEWithLogitsLoss(pos_weight=weight), (x, target))
    return Case(
        problem, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1], pos_weight=weight.double()), (x, target)
    )


def functional_loss():
    return supervised(tanh_net(), F.cross_entropy, *data())


def user_mean():
    x, _ = data()
    return supervised(tanh_net(out=1), lambda out, y: ((out - y) ** 4).mean(), x, torch.zeros(7, 1))


def user_sum():
    x, _ = data()
    return supervised(tanh_net(out=1), lambda out, y: ((out - y) ** 4).sum(), x, torch.zeros(7, 1), reduction="sum")


def ridge():
    return supervised(tanh_net(), nn.CrossEntropyLoss(), *data(), l2=0.3)


def uneven_batches():
    x, y = data(n=7)
    loss = nn.CrossEntropyLoss()
    problem = Problem(tanh_net(), loss, [(x[:5], y[:5]), (x[5:], y[5:])])
    return Case(problem, lambda m, b: loss(m(b[0]), b[1]), (x, y))


def loader():
    x, y = data(n=8)
    loss = nn.CrossEntropyLoss()
    problem = Problem(tanh_net(), loss, DataLoader(TensorDataset(x, y), batch_size=3))
    return Case(problem, lambda m, b: loss(m(b[0]), b[1]), (x, y))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.gain = nn.Linear(3, 4), nn.Linear(2, 4), nn.Parameter(torch.tensor(1.5))

    def forward(self, a, b):
        return self.gain * torch.tanh(self.left(a)) * self.right(b)


def dict_inputs():
    """Keywords, a 0-d parameter, and a product of two branches."""
    g = torch.Generator().manual_seed(0)
    inputs = {"b": torch.randn(6, 2, generator=g), "a": torch.randn(6, 3, generator=g)}
    loss, target = nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 3, 0, 1])
    return Case(
        Problem(seeded(TwoInputs), loss, (inputs, target)), lambda m, b: loss(m(**b[0]), b[1]), (inputs, target)
    )


def tuple_inputs():
    g = torch.Generator().manual_seed(0)
    inputs, target = (torch.randn(6, 3, generator=g), torch.randn(6, 2, generator=g)), torch.randn(6, 4, generator=g)
    loss = nn.SmoothL1Loss()
    return Case(Problem(seeded(TwoInputs), loss, (inputs, target)), lambda m, b: loss(m(*b[0]), b[1]), (inputs, target))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embed(tokens)))).transpose(1, 2)


def tied():
    """One tensor as embedding and as head, a sequence target."""
    g = torch.Generator().manual_seed(0)
    tokens, target = torch.randint(0, 6, (4, 3), generator=g), torch.randint(0, 6, (4, 3), generator=g)
    return supervised(seeded(Tied), nn.CrossEntropyLoss(), tokens, target)


def shared_module():
    """One layer applied twice in sequence."""
    layer = seeded(lambda: nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), layer, nn.Tanh(), layer, nn.Linear(4, 3))
    return supervised(model, nn.CrossEntropyLoss(), *data())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        mixed, _ = self.attend(x, x, x, need_weights=False)
        return self.head(self.norm(x + mixed).mean(1))


def attention():
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    return supervised(seeded(Attention), nn.CrossEntropyLoss(), x, torch.tensor([0, 1, 2, 1, 0]))


class LastOfRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def recurrent():
    x = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    return supervised(seeded(LastOfRNN), nn.CrossEntropyLoss(), x, torch.tensor([0, 1, 1, 0]))


def chosen_parameters():
    return supervised(tanh_net(), nn.CrossEntropyLoss(), *data(), params=["*.weight", "!2.*"])


def frozen_and_unused():
    model = tanh_net()
    model.spare = nn.Parameter(torch.ones(2))
    model[0].weight.requires_grad_(False)
    wrapped = Wrapper(model)
    return supervised(wrapped, nn.CrossEntropyLoss(), *data())


class Wrapper(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.unused, self.empty = net, nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x):
        return self.net[4](self.net[3](self.net[2](self.net[1](self.net[0](x)))))


def heat_objective(call, batch):
    """A physics-informed loss: u'' + u at given points, by two derivatives of the input."""
    (x,) = batch

    def u(point):
        return call(point.reshape(1, 1)).reshape(())

    residual = torch.func.vmap(lambda point: torch.func.grad(torch.func.grad(u))(point) + u(point))(x)
    return (residual**2).sum(), len(x)


def physics():
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = torch.linspace(-1, 1, 6)
    problem = Problem(model, data=(x,), objective=heat_objective)

    def whole(m, batch):
        total, weight = heat_objective(m, batch)
        return total / weight

    return Case(problem, whole, (x,))


class Positions(nn.Module):
    """Dense layers applied once to each sample, at two positions, and once again."""

    def __init__(self):
        super().__init__()
        self.before, self.inside, self.after = nn.Linear(5, 16), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x):
        return self.after(torch.tanh(self.inside(torch.tanh(self.before(x)).unflatten(1, (2, 8)))).flatten(1))


def positions():
    return supervised(seeded(Positions), nn.CrossEntropyLoss(), *data())


class Unrolled(nn.Module):
    """A recurrent net, one dense layer for the state and one for the input, step by step."""

    def __init__(self):
        super().__init__()
        self.state, self.input, self.head = nn.Linear(6, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.zeros(len(x), 6, dtype=x.dtype, device=x.device)
        for step in x.unbind(1):
            h = torch.tanh(self.state(h) + self.input(step))
        return self.head(h)


def unrolled():
    x = torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(0))
    return supervised(seeded(Unrolled), nn.CrossEntropyLoss(), x, torch.tensor([0, 2, 1, 1, 0]))


class Words(nn.Module):
    """An embedding, a convolution over it, and the embedding again as the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 4), nn.Conv1d(4, 4, 2, padding=1, stride=2)

    def forward(self, tokens):
        mixed = torch.tanh(self.mix(self.embed(tokens).transpose(1, 2))).mean(2)
        return torch.nn.functional.linear(mixed, self.embed.weight)


def words():
    g = torch.Generator().manual_seed(0)
    tokens, target = torch.randint(0, 7, (5, 3), generator=g), torch.randint(0, 9, (5,), generator=g)
    return supervised(seeded(Words), nn.CrossEntropyLoss(), tokens, target)


def small_maps():
    """Convolutions with more inputs than positions: with stride, dilation and padding, and down to one pixel."""
    make = lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(3, 2, (2, 1), dilation=(2, 1), padding=(1, 0)),
        nn.Tanh(),
        nn.Conv2d(2, 4, 3),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    x = torch.randn(5, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    return supervised(seeded(make), nn.CrossEntropyLoss(), x, torch.tensor([0, 2, 1, 1, 0]))


CASES = [
    mlp, mlp_sum, relu_mse, layer_norm, batch_norm_eval, batch_norm_batch, conv, weighted_ignored, bce, functional_loss,
    positions, user_mean, user_sum, ridge, uneven_batches, loader, dict_inputs, tuple_inputs, tied, shared_module,
    attention, recurrent, chosen_parameters, frozen_and_unused, physics, unrolled, words, small_maps,
]  # fmt: skip
