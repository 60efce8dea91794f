"""Embeddings."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, add, classifier, normal


def on_tokens(embed, tokens, reduce=lambda e: e.sum(1), **options):
    return classifier(Fn(lambda m, t: torch.tanh(reduce(m.embed(t))), embed=embed), tokens, **options)


TOKENS = torch.tensor([[1, 2, 3], [4, 1, 1], [2, 3, 5], [3, 5, 4]])
WITH_PAD = torch.tensor([[1, 2, 0], [4, 0, 0], [2, 3, 5], [0, 5, 4]])
EMBED = r"embed|Embedding"
add("embedding", lambda: on_tokens(nn.Embedding(6, 3), TOKENS))
add("embedding padding_idx not in the data", lambda: on_tokens(nn.Embedding(6, 3, padding_idx=0), TOKENS))
add("embedding padding_idx in the data", lambda: on_tokens(nn.Embedding(6, 3, padding_idx=0), WITH_PAD), EMBED)
add(
    "embedding padding_idx masked out",
    lambda: classifier(
        Fn(lambda m, t: (m.embed(t) * t.ne(0)[..., None]).sum(1), embed=nn.Embedding(6, 3, padding_idx=0)), WITH_PAD
    ),
)
add(
    "embedding frozen padding_idx in the data",
    lambda: on_tokens(nn.Embedding.from_pretrained(normal(6, 3), padding_idx=0), WITH_PAD),
)
add("embedding max_norm exceeded", lambda: on_tokens(nn.Embedding(6, 3, max_norm=1.0), TOKENS), EMBED)
add("embedding max_norm far away", lambda: on_tokens(nn.Embedding(6, 3, max_norm=50.0), TOKENS), EMBED)
add("embedding sparse", lambda: on_tokens(nn.Embedding(6, 3, sparse=True), TOKENS), EMBED)
add("embedding scale_grad_by_freq", lambda: on_tokens(nn.Embedding(6, 3, scale_grad_by_freq=True), TOKENS), EMBED)
add(
    "embedding functional padding_idx",
    lambda: classifier(
        Fn(lambda m, t: F.embedding(t, m.table, padding_idx=0).sum(1), table=nn.Parameter(normal(6, 3))), WITH_PAD
    ),
    r"table|embedding",
)
for mode in ("sum", "mean", "max"):
    add(
        f"embedding bag {mode}",
        lambda mode=mode: on_tokens(nn.EmbeddingBag(6, 3, mode=mode), TOKENS, lambda e: e),
        EMBED,
    )
add(
    "embedding bag padding_idx in the data",
    lambda: on_tokens(nn.EmbeddingBag(6, 3, padding_idx=0, mode="sum"), WITH_PAD, lambda e: e),
    EMBED,
)
add(
    "embedding bag weighted",
    lambda: classifier(
        Fn(
            lambda m, t: torch.tanh(m.embed(t, per_sample_weights=m.w[t])),
            embed=nn.EmbeddingBag(6, 3, mode="sum"),
            w=nn.Parameter(normal(6)),
        ),
        TOKENS,
    ),
    EMBED,
)
add(
    "embedding bag sparse",
    lambda: on_tokens(nn.EmbeddingBag(6, 3, mode="sum", sparse=True), TOKENS, lambda e: e),
    EMBED,
)
add(
    "positional and token embedding",
    lambda: classifier(
        Fn(lambda m, t: torch.tanh(m.tok(t) + m.pos.weight).mean(1), tok=nn.Embedding(6, 3), pos=nn.Embedding(3, 3)),
        TOKENS,
    ),
)
