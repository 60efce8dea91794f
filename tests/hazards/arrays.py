"""Data as NumPy, pandas and torch's data sets keep it: converted, or refused with what to write instead."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from hazards.base import Fn, adding, labels, normal
from hazards.forms import W, X, Y, formed, net, plain, weighted, whole_weighted

add = adding("forms of data")
ARRAY, TARGETS = X.numpy().copy(), Y.numpy().copy()
SEQUENCES = [normal(k, 3, seed=k) for k in (2, 4, 3, 4)]
UNEQUAL = r"length|unequal|shape|collate|pad"


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


ARRAYS = {  # features, targets, and the features that they are
    "of negative strides": (ARRAY[::-1].copy()[::-1], TARGETS, X),
    "big-endian": (ARRAY.astype(">f4"), TARGETS.astype(">i8"), X),
    "of objects": (ARRAY.astype(object), TARGETS.astype(object), X),
    "read-only": (read_only(ARRAY), read_only(TARGETS), X),
    "in Fortran's order": (np.asfortranarray(ARRAY), TARGETS, X),
    "of bytes": ((ARRAY > 0).astype(np.uint8), TARGETS.astype(np.int32), (X > 0).float()),
    "of halves": ((ARRAY > 0).astype(np.float16), TARGETS.astype(np.uint16), (X > 0).float()),
    "of booleans": (ARRAY > 0, TARGETS, (X > 0).float()),
    "as lists of arrays": (list(ARRAY), list(TARGETS), X),
    "as plain lists": (ARRAY.tolist(), TARGETS.tolist(), X),
}
casting = lambda: Fn(lambda m, x: m.net(x.to(m.net[0].weight.dtype)), net=net())
for name_, (x_, y_, features_) in ARRAYS.items():
    add(
        f"arrays: {name_}",
        lambda x=x_, y=y_, features=features_: formed(
            casting(), lambda o, t: F.cross_entropy(o, t.long()), (x, y), plain, (features, Y)
        ),
        r"list|array|int|float",
        optional=name_.startswith("as "),
    )
add(
    "arrays: of records",
    lambda: formed(
        casting(), F.cross_entropy, (np.zeros(7, dtype=[("a", "f4"), ("b", "f4")]), TARGETS), lambda m, b: m(b), None
    ),
    r"records|structured|dtype|void|field|numeric",
)
add(
    "arrays: of words",
    lambda: formed(casting(), F.cross_entropy, (np.array(["a", "b"] * 3 + ["c"]), TARGETS), lambda m, b: m(b), None),
    r"str|words|text|<U1|numeric",
)


class Rows(Dataset):
    """Indexed until it raises; it has no length."""

    def __init__(self, *columns):
        self.columns = columns

    def __getitem__(self, k):
        if k >= len(self.columns[0]):
            raise IndexError(k)
        return tuple(column[k] for column in self.columns)


class Measured(Rows):
    """With a length."""

    def __len__(self):
        return len(self.columns[0])


class Keyed(Measured):
    """Whose samples are dicts."""

    def __getitem__(self, k):
        return dict(zip(("x", "y"), super().__getitem__(k), strict=True))


class Stream(IterableDataset):
    """Gives sample by sample."""

    def __init__(self, *columns):
        self.columns = columns

    def __iter__(self):
        return zip(*self.columns, strict=True)


def pooled():
    """A model of sequences of any length."""
    return Fn(lambda m, x: m.head(torch.tanh(m.net(x)).mean(1)), net=nn.Linear(3, 3), head=nn.Linear(3, 3))


def stacked(m, batch):
    """There is no batch of sequences that are not of one length."""
    return F.cross_entropy(m(torch.stack(batch[0])), batch[1])


def data_set(data, model=net, loss=None):
    return lambda: formed(model(), loss or nn.CrossEntropyLoss(), data(), plain, (X, Y))


SETS = {
    "without a length": lambda: Rows(X, Y),
    "of arrays": lambda: Measured(ARRAY, TARGETS),
    "of numbers": lambda: Measured(ARRAY, TARGETS.tolist()),
    "that streams samples": lambda: Stream(X, Y),
    "that streams arrays": lambda: Stream(ARRAY, TARGETS),
    "put together of two": lambda: ConcatDataset([TensorDataset(X[:3], Y[:3]), TensorDataset(X[3:], Y[3:])]),
    "a subset": lambda: Subset(TensorDataset(X.repeat(2, 1), Y.repeat(2)), range(7, 14)),
    "a loader of uneven batches": lambda: DataLoader(Measured(X, Y), batch_size=3),
    "a loader of streamed samples": lambda: DataLoader(Stream(X, Y), batch_size=4),
    "a loader that does not batch": lambda: DataLoader(Measured(X, Y), batch_size=None),
    "a loader of its own batches": lambda: DataLoader(Measured(X, Y), batch_sampler=[[0, 1], [2, 3, 4, 5], [6]]),
}
for name_, data_ in SETS.items():
    add(f"data set: {name_}", data_set(data_), r"batch_size", optional="not batch" in name_)
by_name = lambda: Fn(lambda m, x, y=None: m.net(x), net=net())
add("data set: of dicts", data_set(lambda: Keyed(X, Y), by_name, lambda o, b: F.cross_entropy(o, b["y"])))
for name_, kind_ in {"of triples": Measured, "that streams triples": Stream}.items():
    add(
        f"data set: {name_}",
        lambda kind=kind_: formed(net(), weighted, kind(X, Y, W), whole_weighted, (X, Y, W)),
    )
for name_, kind_ in {"of sequences": Measured, "that streams sequences": Stream}.items():
    add(
        f"data set: {name_} of unequal length",
        lambda kind=kind_: formed(
            pooled(), F.cross_entropy, kind(SEQUENCES, labels(4)), stacked, (list(SEQUENCES), labels(4))
        ),
        UNEQUAL,
    )
add(
    "data set: batches of sequences of one length each",
    lambda: formed(
        pooled(),
        lambda o, y: (F.cross_entropy(o, y, reduction="sum"), len(y)),
        [(normal(2, 3, 3), labels(2)), (normal(3, 5, 3), labels(3))],
        lambda m, b: sum(F.cross_entropy(m(x), y, reduction="sum") for x, y in zip(b[::2], b[1::2], strict=True)) / 5,
        (normal(2, 3, 3), labels(2), normal(3, 5, 3), labels(3)),
    ),
)
