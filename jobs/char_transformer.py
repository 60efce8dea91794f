"""A small causal transformer that predicts the next character of English prose."""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from pipeline import Problem


class Block(nn.Module):
    """Pre-norm attention and a GELU network, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # shape: (N, heads, T, width / heads)
        x = x + self.out(mixed.transpose(1, 2).reshape(N, T, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self, symbols: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.place(place))))


def next_character(logits: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy summed over all characters, and their number."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"), target.numel()


def transformer(
    samples: int = 64,
    context: int = 16,
    width: int = 16,
    heads: int = 2,
    layers: int = 2,
    steps: int = 60,
    seed: int = 0,
) -> Problem:
    """Train on the descriptions that come with scikit-learn's data sets; 5,792 parameters at the default width."""
    torch.manual_seed(seed)
    inputs, target, symbols = prose(samples, context)
    model = Transformer(symbols, context, width, heads, layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        total, weight = next_character(model(inputs), target)
        (total / weight).backward()
        optimizer.step()
    return Problem(model.eval(), next_character, (inputs, target))


def prose(samples: int, context: int) -> tuple[Tensor, Tensor, int]:
    """Cut text into windows: characters, the characters that follow them, and the number of symbols."""
    text = load_breast_cancer().DESCR.lower() + load_digits().DESCR.lower()
    text = "".join(c if c.isalpha() or c in " .,;()" else " " for c in text)
    text = " ".join(text.split())
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(c) for c in text])
    starts = torch.arange(samples) * math.floor((len(codes) - context - 1) / samples)
    windows = codes[starts[:, None] + torch.arange(context + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), len(symbols)
