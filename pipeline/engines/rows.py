"""The last rung: plain double backward on the module itself, row by row."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from pipeline.problem.batches import Batch, dense
from pipeline.problem.problem import PlacedProblem


@dataclass(frozen=True)
class Rows:
    """Rows of H by `autograd.grad` twice on the module's own parameters; no vmap, no functional_call.

    Slow, but right for much that torch.func cannot transform: old-style autograd functions, activation checkpointing,
    cuDNN recurrent nets.

    Attributes:
        problem: the problem.
    """

    problem: PlacedProblem

    def add(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add one micro-batch's part of H[rows, cols]; see `Engine.add`."""
        columns = list(self.problem.layout.segments(cols))
        with torch.enable_grad(), self.problem.own_parameters() as own:
            loss = self.problem.loss_sum(None, batch)[0]
            for parameter, segment in self.problem.layout.segments(rows):
                (gradient,) = grad(loss, own[parameter.name], create_graph=True, materialize_grads=True)
                if not gradient.requires_grad:  # the loss is linear in everything
                    continue
                flat = dense(gradient).reshape(-1)
                for row in segment:
                    entry = flat[row - parameter.offset]
                    parts = grad(entry, [own[p.name] for p, _ in columns], retain_graph=True, materialize_grads=True)
                    for (p, span), part in zip(columns, parts, strict=True):
                        piece = dense(part).reshape(-1)[span.start - p.offset : span.stop - p.offset]
                        out[row - rows.start, span.start - cols.start : span.stop - cols.start] += piece
