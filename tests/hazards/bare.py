"""Batches that are one object, with tensors as attributes: named tuples, data classes, graphs of torch_geometric."""

import dataclasses
import importlib.util
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from hazards.base import Fn, adding
from hazards.forms import EDGES, X, Y, formed
from hazards.unequal import messages, whole_graph

add = adding("forms of data")


class Points(NamedTuple):
    """A named tuple that is a batch."""

    x: Tensor
    edges: Tensor
    y: Tensor


@dataclasses.dataclass
class Cloud:
    """A data class that is a batch, with a flag in it."""

    x: Tensor
    edges: Tensor
    y: Tensor
    residual: bool = True


class Data:
    """As torch_geometric's: tensors in a store, read as attributes; iterates over its items, as long as its keys."""

    def __init__(self, **tensors: Any) -> None:
        self.__dict__["_store"] = tensors

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.__dict__.get("_store", {}):
            raise AttributeError(name)
        return self._store[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._store[name] = value

    def __iter__(self):
        return iter(self._store.items())

    def __len__(self) -> int:
        return len(self._store)

    def keys(self):
        return list(self._store)

    def __getitem__(self, name: str) -> Any:
        return self._store[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._store[name] = value

    def to_dict(self):
        return dict(self._store)

    def apply(self, function, *names):
        """In place, as there."""
        for name in names or list(self._store):
            if isinstance(self._store[name], Tensor):
                self._store[name] = function(self._store[name])
        return self

    def to(self, *args, **kwargs):
        return self.apply(lambda t: t.to(*args, **kwargs))

    def clone(self):
        return Data(**{n: t.clone() if isinstance(t, Tensor) else t for n, t in self._store.items()})


Data.__module__ = "torch_geometric.data.data"
on_object = lambda: Fn(lambda m, data: messages(m, data.x, data.edges), a=nn.Linear(4, 3), b=nn.Linear(3, 3))


def bare(data):
    return formed(on_object(), lambda o, d: F.cross_entropy(o, d.y), data, whole_graph, (X, EDGES, Y), separable=False)


add("bare: named tuple", lambda: bare(Points(X, EDGES, Y)))
add("bare: data class", lambda: bare(Cloud(X, EDGES, Y)))
add("bare: graph as torch_geometric keeps it", lambda: bare(Data(x=X, edges=EDGES, y=Y)))
add("bare: a list of one graph", lambda: bare([Data(x=X, edges=EDGES, y=Y)]))
if importlib.util.find_spec("torch_geometric"):

    def real(make):
        from torch_geometric import data

        return bare(make(data))

    add("bare: torch_geometric's Data", lambda: real(lambda g: g.Data(x=X, edges=EDGES, y=Y)))
