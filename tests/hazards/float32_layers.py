"""Single precision written into layers, as language models have it: norms, rotary embedding, attention, heads."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import normal
from hazards.float32 import SEQUENCES, X, add_all, head, small

FREQUENCIES = torch.tensor([1.0, 0.25])  # such numbers as both types hold


def rms_norm(m, x, h):
    """`h` is x in the type that the norm is taken in, as in Llama."""
    return m.head(torch.tanh(m.gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 2**-10)).type_as(x)))


def rotary(m, x, angles):
    """Attention with rotary embedding."""
    angles = torch.cat([angles, angles], -1)
    turn = lambda q: q * angles.cos().to(x) + torch.cat([-q[..., 2:], q[..., :2]], -1) * angles.sin().to(x)
    return attention(m, x, lambda q, k: (turn(q) @ turn(k).mT).softmax(-1))


def attention(m, x, weights):
    return m.head((weights(m.q(x), m.k(x)) @ x).mean(1))


def timed(m, x, angles):
    """Sines and cosines of an integer, as diffusion models embed time."""
    return m.head(torch.tanh(m.net(x) + torch.cat([angles.sin(), angles.cos()], -1)))


def without_autocast(m, x):
    with torch.autocast("cpu", enabled=False):
        return m.head(m.net(x).float().exp())


ages = lambda x: (4 * x[:, :1].detach()).long()
positions = lambda: torch.arange(3)[:, None]
keyed = {"q": lambda: nn.Linear(4, 4), "k": lambda: nn.Linear(4, 4, bias=False), "head": head()}
add_all(
    {
        "RMS norm by float()": (
            lambda m, x: rms_norm(m, m.net(x), m.net(x).float()),
            lambda m, x: rms_norm(m, m.net(x), m.net(x)),
            X,
            {"net": lambda: nn.Linear(4, 4), "gain": lambda: nn.Parameter(1 + normal(4)), "head": head()},
        ),
        "RMS norm by to()": (
            lambda m, x: rms_norm(m, m.net(x), m.net(x).to(torch.float32)),
            lambda m, x: rms_norm(m, m.net(x), m.net(x)),
            X,
            {"net": lambda: nn.Linear(4, 4), "gain": lambda: nn.Parameter(1 + normal(4)), "head": head()},
        ),
        "rotary embedding": (
            lambda m, x: rotary(m, x, positions().float() * m.frequencies.float()),
            lambda m, x: rotary(m, x, positions() * m.frequencies),
            SEQUENCES,
            {**keyed, "frequencies": lambda: FREQUENCIES},
        ),
        "softmax in single": (
            lambda m, x: attention(m, x, lambda q, k: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype)),
            lambda m, x: attention(m, x, lambda q, k: F.softmax(q @ k.mT, dim=-1)),
            SEQUENCES,
            keyed,
        ),
        "mask of a float's lowest": (
            lambda m, x: attention(
                m, x, lambda q, k: (q @ k.mT + torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)).softmax(-1)
            ),
            lambda m, x: attention(
                m, x, lambda q, k: (q @ k.mT).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e30).softmax(-1)
            ),
            SEQUENCES,
            keyed,
        ),
        "sinusoids of an integer": (
            lambda m, x: timed(m, x, ages(x).float() * FREQUENCIES),
            lambda m, x: timed(m, x, ages(x) * FREQUENCIES.to(x)),
            X,
            small,
        ),
        "head in single": (
            lambda m, x: m.head(m.net(x).float()),
            lambda m, x: m.head(m.net(x)),
            X,
            small,
        ),
        "region without autocast": (
            lambda m, x: without_autocast(m, x),
            lambda m, x: m.head(m.net(x).exp()),
            X,
            small,
        ),
    }
)
