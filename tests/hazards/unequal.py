"""Tensors of unequal length in one batch that goes together: graphs, points of several kinds, contexts."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, call, labels, normal
from hazards.forms import EDGES, X, Y, formed, net

add = adding("forms of data")
OF_GRAPH, GRAPH_LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 2]), labels(3, classes=2)
COORDINATES = torch.linspace(-1, 1, 9)[:, None]


def messages(m, x, edges):
    """Sums over neighbours, twice."""
    for layer in (m.a, m.b):
        x = layer(x).tanh().index_add(0, edges[1], layer(x)[edges[0]])
    return x


def pooled(m, x, edges, of_graph):
    nodes = messages(m, x, edges)
    return torch.zeros(3, nodes.shape[1]).to(nodes).index_add(0, of_graph, nodes)


def incident(m, x, nodes, hyperedges):
    """A hypergraph network: node to hyperedge and back."""
    over = torch.zeros(4, 3).to(x).index_add(0, hyperedges, m.a(x)[nodes]).tanh()
    return m.b(torch.zeros(7, 3).to(x).index_add(0, nodes, over[hyperedges]))


def from_context(m, x, context):
    """A conditional neural process."""
    summary = torch.tanh(m.encode(context)).mean(0)
    return m.head(torch.tanh(torch.cat([m.encode(x), summary.expand(len(x), -1)], -1)))


def residuals(c, batch):
    """A boundary-value problem: u'' = u inside, u = y on the boundary."""
    inside, boundary, values = batch
    with torch.enable_grad():
        x = inside.detach().requires_grad_()
        u = c(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend - u).square().mean() + 10 * (c(boundary) - values).square().mean(), 1


graph_net = lambda out=3: Fn(messages, a=nn.Linear(4, 3), b=nn.Linear(3, out))
whole_graph = lambda m, b: F.cross_entropy(messages(m, *b[:2]), b[2])


def together(model, loss, inputs, target):
    """The judge calls the model as the problem does."""
    return formed(
        model, loss, (inputs, target), lambda m, b: loss(call(m, b[0]), b[1]), (inputs, target), separable=False
    )


add("unequal: edges beside node labels", lambda: together(graph_net(), F.cross_entropy, (X, EDGES), Y))
add(
    "unequal: three graphs in one",
    lambda: together(
        Fn(pooled, a=nn.Linear(4, 3), b=nn.Linear(3, 2)), F.cross_entropy, (X, EDGES, OF_GRAPH), GRAPH_LABELS
    ),
)
add(
    "unequal: hypergraph",
    lambda: together(
        Fn(incident, a=nn.Linear(4, 3), b=nn.Linear(3, 3)), F.cross_entropy, (X, EDGES[0], EDGES[1] % 4), Y
    ),
)
add(
    "unequal: targets and a context",
    lambda: together(
        Fn(from_context, encode=nn.Linear(4, 3), head=nn.Linear(6, 3)),
        F.cross_entropy,
        {"x": X, "context": normal(4, 4)},
        Y,
    ),
)
add(
    "unequal: adjacency as a sparse tensor",
    lambda: together(
        Fn(lambda m, x, graph: m.b(torch.sparse.mm(graph, torch.tanh(m.a(x)))), a=nn.Linear(4, 3), b=nn.Linear(3, 3)),
        F.cross_entropy,
        (X, torch.sparse_coo_tensor(EDGES, torch.ones(10), (7, 7)).coalesce()),
        Y,
    ),
)
add(
    "unequal: inside and boundary",
    lambda: (
        net(1, 1),
        lambda m, b: residuals(m, b)[0],
        (COORDINATES, COORDINATES[[0, -1]], torch.tensor([[0.5], [1.0]])),
        {
            "objective": residuals,
            "data": (COORDINATES, COORDINATES[[0, -1]], torch.tensor([[0.5], [1.0]])),
            "separable": False,
        },
    ),
)
