"""Tensors that are not strided, as data: sparse, nested, packed; converted, or refused with what to write instead."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, labels, normal
from hazards.forms import X, Y, formed, net, plain

add = adding("forms of data")
LENGTHS = torch.tensor([3, 1, 2, 3])
SEQUENCES = [normal(int(n), 3, seed=k) for k, n in enumerate(LENGTHS)]
PADDED = nn.utils.rnn.pad_sequence(SEQUENCES, batch_first=True)


def recurrent():
    return Fn(lambda m, x: m.head(m.rnn(x)[1][0]), rnn=nn.GRU(3, 2, batch_first=True), head=nn.Linear(2, 3))


def packed(x, lengths):
    return nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


def of_nested():
    return Fn(
        lambda m, x: m.head(torch.tanh(m.net(x.to_padded_tensor(0.0))).sum(1)),
        net=nn.Linear(3, 3, bias=False),
        head=nn.Linear(3, 3),
    )


for layout_ in (torch.sparse_coo, torch.sparse_csr):
    add(
        f"form: features in {layout_}",
        lambda layout=layout_: formed(
            Fn(lambda m, x: m.net(x.to_dense()), net=net()),
            F.cross_entropy,
            (X.relu().to_sparse(layout=layout), Y),
            plain,
            (X.relu(), Y),
        ),
    )
    add(
        f"form: features in {layout_}, multiplied as such",
        lambda layout=layout_: formed(
            Fn(lambda m, x: m.b(torch.sparse.mm(x, m.a).tanh()), a=nn.Parameter(normal(4, 3)), b=nn.Linear(3, 3)),
            F.cross_entropy,
            (X.relu().to_sparse(layout=layout), Y),
            lambda m, b: F.cross_entropy(m.b((b[0] @ m.a).tanh()), b[1]),
            (X.relu(), Y),
        ),
        r"sparse|dense",
        optional=True,
    )
add(
    "form: targets in torch.sparse_coo",
    lambda: formed(
        net(),
        lambda o, y: F.mse_loss(o, y.to_dense()),
        (X, normal(7, 3).relu().to_sparse()),
        lambda m, b: F.mse_loss(m(b[0]), b[1]),
        (X, normal(7, 3).relu()),
    ),
)
add(
    "form: packed sequence as input",
    lambda: formed(
        recurrent(),
        F.cross_entropy,
        (packed(PADDED, LENGTHS), labels(4)),
        lambda m, b: F.cross_entropy(m(packed(*b[:2])), b[2]),
        (PADDED, LENGTHS, labels(4)),
        separable=False,
    ),
    r"[Pp]acked|pad",
    optional=True,
)
add(
    "form: nested tensor",
    lambda: formed(
        of_nested(),
        F.cross_entropy,
        (torch.nested.nested_tensor(SEQUENCES), labels(4)),
        lambda m, b: F.cross_entropy(m.head(torch.tanh(m.net(b[0])).sum(1)), b[1]),
        (PADDED, labels(4)),
    ),
    r"nested|pad",
    optional=True,
)
