"""A graph network: all nodes of a graph belong together, so there is one batch, which is never cut.

    python jobs/examples/graph.py

A graph of torch_geometric (`Data`, or a loader of batches of graphs) is taken as it is; here the tensors are given.
"""

import torch
from torch import nn

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
nodes, edges = torch.randn(30, 4), torch.randint(0, 30, (2, 90))
labels, known = torch.randint(0, 3, (30,)), torch.rand(30) < 0.5  # only some nodes are labelled


class GraphNet(nn.Module):
    """Two rounds of messages along edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, edge_index):
        for layer in (self.first, self.second):
            x = layer(torch.zeros_like(x).index_add(0, edge_index[1], torch.tanh(x)[edge_index[0]]) + x)
        return x


def loss(output, target, mask):
    """Cross-entropy over the nodes that have a label; a batch may be longer than (inputs, target)."""
    return nn.functional.cross_entropy(output[mask], target[mask])


problem = Problem(GraphNet(), loss, ((nodes, edges), labels, known), separable=False)
H = compute_hessian(problem, executor="serial")
print(H, "loss", H.loss)
