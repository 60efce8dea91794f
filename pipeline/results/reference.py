"""What a matrix is proven by: products with H by plain double backward, in this process or in a worker's place."""

from typing import Protocol

import torch

from pipeline.problem.double_backward import Vector, hessian_vector_products, jittered
from pipeline.problem.problem import PlacedProblem, Problem


class Reference(Protocol):
    """Products with H that share nothing with the engines."""

    def multiply(self, vectors: Vector, weight: float, dtype: str = "float64", seed: int | None = None) -> Vector:
        """Multiply H with vectors.

        Args:
            vectors: one a row.  # shape: (k, P)
            weight: the total weight.
            dtype: that is computed in.
            seed: of weights that are moved by their last bit; as they are when None.

        Returns:
            The products.  # shape: (k, P)
        """


class Here:
    """`Reference` in this process, whose caller sets what is around an evaluation (`pipeline.problem.contexts`).

    Args:
        problem: with its parameters selected.
        samples: at a time; fewer where a GPU's memory is too small, which others may hold as well.
        device: to compute on.
    """

    def __init__(self, problem: Problem, samples: int, device: str) -> None:
        self._problem, self._samples, self._device = problem, samples, device
        self._placed: dict[str, PlacedProblem] = {}

    def multiply(self, vectors: Vector, weight: float, dtype: str = "float64", seed: int | None = None) -> Vector:
        """See `Reference`."""
        placed = self.placed(dtype) if seed is None else jittered(self.placed(dtype), seed)
        while True:
            try:
                return hessian_vector_products(placed, vectors, weight, self._samples)
            except torch.OutOfMemoryError:
                if self._samples == 1 or not self._problem.is_cuttable:
                    raise
                self._samples = (self._samples + 1) // 2

    def placed(self, dtype: str) -> PlacedProblem:
        """Return the problem in a type, on the device."""
        if dtype not in self._placed:
            self._placed[dtype] = self._problem.place(getattr(torch, dtype), self._device)
        return self._placed[dtype]


def reference_device() -> str:
    """Return where this process computes a reference: on a GPU where its machine has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
