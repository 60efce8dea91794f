"""Blocks whose own diagonal is zero, or next to it: what starts at zero, and what fits its targets."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, labels, normal, supervised

add, N = adding("zero diagonals"), 150  # so many samples that single precision rounds


class Residual(nn.Module):
    """A residual branch whose gain is zero when training starts, or next to it."""

    def __init__(self, gain):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.full((4,), gain))

    def forward(self, x):
        return self.head(x + self.gain * self.b(torch.tanh(self.a(x))))


class Conditioned(nn.Module):
    """Scale and shift from a generator that starts at zero."""

    def __init__(self):
        super().__init__()
        self.net, self.generate, self.head = nn.Linear(4, 3), nn.Linear(2, 6), nn.Linear(3, 3)
        nn.init.zeros_(self.generate.weight)
        nn.init.zeros_(self.generate.bias)

    def forward(self, x, condition):
        scale, shift = self.generate(condition).chunk(2, -1)
        return self.head(torch.tanh(self.net(x)) * (1 + scale) + shift)


def kronecker(m, x):
    return torch.tanh(m.base(x) + x @ torch.kron(m.left, m.right)) @ m.out


def zero_convolution(m, x):
    return m.head((m.body(x) + m.zero(torch.tanh(m.side(x)))).mean(-1).tanh())


def zeroed(model, *names, value=0.0):
    for name in names:
        nn.init.constant_(model.get_parameter(name), value)
    return model


def adapter():
    model = Fn(
        kronecker,
        base=nn.Linear(4, 4).requires_grad_(False),
        left=nn.Parameter(normal(2, 2)),
        right=nn.Parameter(torch.zeros(2, 2)),
        out=nn.Parameter(normal(4, 3), requires_grad=False),
    )
    return supervised(model, nn.CrossEntropyLoss(), normal(N, 4), labels(N))


def fitted():
    """A model that fits its targets to single precision: nothing but rounding is left of the residuals."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return supervised(model, nn.MSELoss(), normal(N, 4), model(normal(N, 4)).detach())


two_layers = lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
controlled = lambda: zeroed(
    Fn(
        zero_convolution,
        body=nn.Conv1d(2, 3, 2),
        side=nn.Conv1d(2, 3, 2),
        zero=nn.Conv1d(3, 3, 1),
        head=nn.Linear(3, 3),
    ),
    "zero.weight",
    "zero.bias",
)
ZEROS = {
    "gain of a residual branch at zero": lambda: Residual(0.0),
    "gain of a residual branch at 1e-6": lambda: Residual(1e-6),
    "head at 1e-9": lambda: zeroed(two_layers(), "1.weight", value=1e-9),
    "first layer at zero": lambda: zeroed(two_layers(), "0.weight", "0.bias"),
    "gate that is all but shut": lambda: Fn(
        lambda m, x: m.head(torch.tanh(m.net(x)) * torch.sigmoid(m.gate)),
        net=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
        gate=nn.Parameter(torch.tensor(-32.0)),
    ),
}
for name_, model_ in ZEROS.items():
    add(f"zeros: {name_}", lambda model=model_: supervised(model(), nn.CrossEntropyLoss(), normal(N, 4), labels(N)))
add("zeros: adapter, of Kronecker factors", adapter)
add("zeros: targets that are fitted", fitted)
add(
    "zeros: convolution that starts at zero",
    lambda: supervised(controlled(), F.cross_entropy, normal(N, 2, 5), labels(N)),
)
add(
    "zeros: generator of scale and shift",
    lambda: supervised(Conditioned(), nn.CrossEntropyLoss(), (normal(N, 4), normal(N, 2, seed=5)), labels(N)),
)
add(
    "zeros: only the adapter's factors, by name",
    lambda: supervised(
        Fn(
            lambda m, x: torch.tanh(m.base(x) + m.lora_up(m.lora_down(x))).sum(-1, keepdim=True),
            base=nn.Linear(4, 4),
            lora_down=nn.Linear(4, 2, bias=False),
            lora_up=zeroed(nn.Linear(2, 4, bias=False), "weight"),
        ),
        nn.MSELoss(),
        normal(N, 4),
        normal(N, 1, seed=5),
        params="lora_*",
    ),
)
