"""The general engine: reverse over reverse with torch.func, for any model that torch.func can transform."""

from dataclasses import dataclass

from torch import Tensor
from torch.func import grad, vjp

from pipeline.engines.pullback import pull_back_each
from pipeline.planning.parameters import Parameter
from pipeline.problem.batches import Batch
from pipeline.problem.problem import PlacedProblem


@dataclass(frozen=True)
class Jacrev:
    """Rows of H as vmapped pull-backs of the gradient.

    With L the un-normalised loss of a micro-batch, theta_a the parameter that rows belong to and theta_c those that the
    columns meet,

        g(theta_c) = dL / d theta_a,        H[r, :] = (d g / d theta_c)' e_r

    is `jacrev(jacrev(L, chunk_size=1))` over `functional_call`, written as what it does. The inner jacrev of a scalar
    with chunk_size=1 is `grad`, which is not vmapped: the vmapped backward of a normalisation layer treats its saved
    statistics as constants, and a second derivative of that is silently wrong (pytorch/functorch issue 534). The outer
    one is `vjp`, linearised once for a micro-batch, and vmapped pull-backs of just the rows asked for, which stop at
    theta_c. Pulling back the other parameters and slicing them away would cost about half as much again.

    Attributes:
        problem: the problem.
        row_group: rows pulled back at a time; memory grows with it, and with the micro-batch.
    """

    problem: PlacedProblem
    row_group: int

    def add(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add one micro-batch's part of H[rows, cols]; see `Engine.add`."""
        for parameter, segment in self.problem.layout.segments(rows):
            start = segment.start - rows.start
            self._add_segment(batch, parameter, segment, cols, out[start : start + len(segment)])

    def _add_segment(self, batch: Batch, parameter: Parameter, rows: range, cols: range, out: Tensor) -> None:
        """Add rows that belong to one parameter."""
        theta = self.problem.parameters
        first, last = rows.start - parameter.offset, rows.stop - parameter.offset

        def row_gradient(columns: dict[str, Tensor]) -> Tensor:
            def loss(row_parameter: Tensor) -> Tensor:
                return self.problem.loss_sum({**columns, parameter.name: row_parameter}, batch)[0]

            at = columns.get(parameter.name, theta[parameter.name])
            gradient: Tensor = grad(loss)(at)
            return gradient.reshape(-1)[first:last]  # shape: (rows,)

        columns = list(self.problem.layout.segments(cols))
        pull_back = vjp(row_gradient, {p.name: theta[p.name] for p, _ in columns})[1]
        for start in range(0, len(rows), self.row_group):
            group = range(start, min(start + self.row_group, len(rows)))
            unit = out.new_zeros(len(group), len(rows))
            unit.diagonal(group.start).fill_(1)
            (parts,) = pull_back_each(pull_back, unit)
            for p, span in columns:
                part = parts[p.name].reshape(len(group), -1)  # shape: (group, size of p)
                out[group.start : group.stop, span.start - cols.start : span.stop - cols.start] += part[
                    :, span.start - p.offset : span.stop - p.offset
                ]
