"""Below the last rung: rows by central differences of the gradient, where double backward is wrong or missing."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad

from pipeline.errors import ProblemError
from pipeline.problem.batches import Batch, dense
from pipeline.problem.finite_differences import Differences as Found
from pipeline.problem.finite_differences import Vector, agreeing, fourth_order
from pipeline.problem.problem import PlacedProblem

INCONCLUSIVE = 1e-4  # relative gap between steps beyond which a row is no derivative
SMALL = 0.1  # of which size a parameter is taken to be at least


@dataclass(frozen=True)
class Differences:
    """Rows of H by central differences of the gradient, of fourth order, in float64 whatever the run's type.

        H[r, :] = (8 (g(+h) - g(-h)) - (g(+2h) - g(-2h))) / 12 h,        g(t) = dL / dtheta at theta + t e_r

    Three neighbouring steps must agree; each row takes those that agree best. Exact to 1e-7 or so: for functions whose
    gradient is right and whose second derivative is not (kernels with a backward of their own).

    Attributes:
        problem: the problem.
    """

    problem: PlacedProblem

    def add(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add one micro-batch's part of H[rows, cols]; see `Engine.add`.

        Raises:
            ProblemError: no three steps agree.
        """
        exact = self._in_double()
        columns = list(exact.layout.segments(cols))
        batch = exact.cast(batch)
        with torch.enable_grad(), exact.own_parameters() as own:
            theta: list[Tensor] = [own[p.name] for p, _ in columns]
            for parameter, segment in exact.layout.segments(rows):
                size = max(float(own[parameter.name].detach().square().mean().sqrt()), SMALL)
                for row in segment:
                    found = self._row(exact, batch, theta, own[parameter.name], row - parameter.offset, size)
                    if found.gap > INCONCLUSIVE:
                        raise ProblemError(
                            f"engine differences: no three steps agree at row {row} (of `{parameter.name}`), they are "
                            f"{found.gap:.1e} apart: the loss bends or is rounded there. Leave `{parameter.name}` out "
                            "with params, or change the operation"
                        )
                    values = np.concatenate(
                        [
                            part[span.start - p.offset : span.stop - p.offset]
                            for (p, span), part in zip(columns, found.values, strict=True)
                        ]
                    )
                    out[row - rows.start] += torch.from_numpy(values).to(out)

    def _in_double(self) -> PlacedProblem:
        """Return the problem at the same values in float64."""
        if self.problem.dtype == torch.float64:
            return self.problem
        exact = self.problem.problem.place(torch.float64, self.problem.device)
        return replace(exact, parameters={name: t.double() for name, t in self.problem.parameters.items()})

    @staticmethod
    def _row(
        exact: PlacedProblem, batch: Batch, theta: list[Tensor], parameter: Tensor, entry: int, size: float
    ) -> Found:
        """Differentiate the gradient along one entry of a parameter, whose values are put back."""
        start = parameter.data

        def gradient(t: float) -> Vector:
            moved = start.clone(memory_format=torch.contiguous_format)
            moved.view(-1)[entry] += t * size
            parameter.data = moved
            value = exact.loss_sum(None, batch)[0]
            parts = grad(value, theta, materialize_grads=True) if value.requires_grad else theta
            flat = np.concatenate([dense(part.detach()).reshape(-1).cpu().numpy() for part in parts])
            return flat / size if value.requires_grad else np.zeros_like(flat)

        cuts = np.cumsum([t.numel() for t in theta])[:-1]
        try:
            return agreeing(lambda step: np.split(fourth_order(gradient, step), cuts), _sizes)
        finally:
            parameter.data = start


def _sizes(parts: list[Vector]) -> list[float]:
    """Hold each column parameter's part against the largest entry of the row."""
    largest = max((float(np.abs(part).max(initial=0.0)) for part in parts), default=0.0)
    return [largest or 1.0 for _ in parts]
