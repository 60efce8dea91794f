"""Nets for compositions: every hidden state is (sample, position, 3); and what wraps them."""

import copy
from typing import Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, POSITIONS, FEATURES, TOKENS = 3, 3, 4, 5


class Residual(nn.Module):
    """x + tanh(A x)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Convolution(nn.Module):
    """Over positions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 2, padding=1)

    def forward(self, x):
        return self.conv(x.transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2)


class Recurrent(nn.Module):
    """An LSTM of one unit, added to its input."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 1, batch_first=True)

    def forward(self, x):
        return x + self.lstm(x)[0]


class Attention(nn.Module):
    """One head, by plain operations, added to its input."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return x + (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ x


class Lifted(nn.Module):
    """Features become one position."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, WIDTH)

    def forward(self, x):
        return self.linear(x).unsqueeze(1)


FRONTS = {
    "features": Lifted,
    "tokens": lambda: nn.Embedding(TOKENS, WIDTH),
    "sequence": lambda: nn.Linear(FEATURES, WIDTH),
}
LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "conv": Convolution,
    "lstm": Recurrent,
    "attention": Attention,
    "residual": Residual,
}


class Net(nn.Module):
    """Front, body, mean over positions, head. `y` is there since a batch that is a dict goes whole to the model."""

    def __init__(self, front: nn.Module, body: nn.Sequential, outputs: int):
        super().__init__()
        self.front, self.body, self.head = front, body, nn.Linear(WIDTH, outputs)

    def forward(self, x, scale: float = 1.0, flip: bool = False, y: Optional[Tensor] = None):  # noqa: UP045 - TorchScript
        h = self.body(self.front(x)).mean(1)
        return self.head(-h if flip else h) * scale


class Checkpointed(Net):
    """Computes its body again in backward."""

    def forward(self, x, scale=1.0, flip=False, y=None):
        h = checkpoint(self.body, self.front(x), use_reentrant=False).mean(1)
        return self.head(-h if flip else h) * scale


def make(front, layers, outputs, wrapper):
    """The bare net of some layers, frozen and tied as the wrapper says."""
    body = [LAYERS[name]() for name in layers]
    if wrapper == "tied":
        shared = LAYERS["residual"]()
        body = [shared, *body, shared]
    net = Net(FRONTS[front](), nn.Sequential(*body), outputs)
    for p in net.parameters():  # ones and zeros hide errors
        p.data += 0.2 * torch.randn_like(p)
    if wrapper == "frozen":
        net.front.requires_grad_(False)
    return net


def checkpointed(net):
    other = Checkpointed(net.front, net.body, net.head.out_features)
    other.head = net.head
    return other


def compiled(net):
    torch.compiler.reset()  # else what was compiled before counts against how often it may be
    return torch.compile(net, backend="eager")


WRAPPERS = {
    "none": lambda net: net,
    "parallel": nn.DataParallel,
    "scripted": torch.jit.script,
    "compiled": compiled,
    "checkpointed": checkpointed,
    "frozen": lambda net: net,
    "tied": lambda net: net,
}


def twin_of(net):
    return copy.deepcopy(net).double()
