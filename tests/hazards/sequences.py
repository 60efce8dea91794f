"""Sequences of uneven lengths, and dropout inside layers that take sequences."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, add, classifier, normal


def packed(m, x, lengths):
    run = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return m.rnn(run)[1][-1]


def key_padding(m, x, lengths):
    padded = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return m.layer(x, src_key_padding_mask=padded).mean(1)


LENGTHS = torch.tensor([3, 1, 2, 3])
add("packed sequence", lambda: classifier(Fn(packed, rnn=nn.GRU(2, 3, batch_first=True)), (normal(4, 3, 2), LENGTHS)))
add(
    "transformer with key padding",
    lambda: classifier(
        Fn(key_padding, layer=nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True)),
        (normal(4, 3, 2), LENGTHS),
    ),
)
add(
    "transformer with key padding eval",
    lambda: classifier(
        Fn(key_padding, layer=nn.TransformerEncoderLayer(2, 1, 3, batch_first=True)).eval(), (normal(4, 3, 2), LENGTHS)
    ),
)
add(
    "transformer with dropout in train mode",
    lambda: classifier(nn.TransformerEncoderLayer(2, 1, 3, batch_first=True), normal(4, 3, 2)),
    r"body(\.\w+)*` ?\(|Dropout|dropout",
)
add(
    "LSTM with dropout in train mode",
    lambda: classifier(
        Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.LSTM(2, 2, 2, batch_first=True, dropout=0.5)), normal(4, 3, 2)
    ),
    r"body\.rnn|LSTM",
)
add(
    "attention with dropout in train mode",
    lambda: classifier(
        Fn(lambda m, x: m.attend(x, x, x)[0], attend=nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)),
        normal(4, 3, 4),
    ),
    r"body\.attend|MultiheadAttention|dropout",
)
add(
    "attention function with dropout",
    lambda: classifier(
        Fn(lambda m, x: F.scaled_dot_product_attention(*m.net(x).chunk(3, -1), dropout_p=0.5), net=nn.Linear(3, 9)),
        normal(4, 4, 3),
    ),
    r"random|dropout",
)
