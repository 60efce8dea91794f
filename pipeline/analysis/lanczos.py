"""Krylov iterations on many vectors at once: one product with a block, one read of the store, a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pipeline.analysis.view import Multiply
from pipeline.errors import ConvergenceError

Vector = npt.NDArray[np.float64]
Which = Literal["LM", "SM", "LA", "SA", "BE"]

DEPENDENT = 1e-8  # of its length: what is left of a direction that the basis holds already, and rounding
BLOCKS_KEPT = 2  # at a restart: the vectors wanted, and as many that come next
_TINY = np.finfo(float).eps


def extreme_eigenpairs(
    multiply: Multiply, start: Vector, k: int, which: Which, *, most: int, tol: float, steps: int
) -> tuple[Vector, Vector]:
    """Find eigenvalues at the ends of the spectrum of a symmetric matrix, and their vectors.

    A block Krylov method with restarts: the basis grows by the residuals of the eigenvectors it holds, and shrinks to
    the best of them when it is full (Rayleigh-Ritz; Stewart, A Krylov-Schur Algorithm for Large Eigenproblems, 2001).
    SciPy's ARPACK is the same with blocks of one vector: a read of the store for each.

    Args:
        multiply: X -> A X.
        start: random; more columns than k converge faster.  # shape: (P, b)
        k: how many.
        which: `"LM"` largest in absolute value, `"LA"` largest, `"SA"` smallest, `"BE"` half from each end.
        most: columns of the basis.
        tol: |A u - w u| is at most tol |A|, of each.
        steps: most products.

    Returns:
        The eigenvalues, ascending, and the vectors in columns.  # shape: (k,), (P, k)

    Raises:
        ConvergenceError: that takes more steps.
    """
    size, width = start.shape
    basis = images = np.zeros((size, 0))
    block, worst = _independent(start, basis), np.inf
    for _ in range(steps):
        basis, images = np.hstack([basis, block]), np.hstack([images, multiply(block)])
        w, S = scipy.linalg.eigh(basis.T @ images)
        order = ranked(w, which)
        best = order[:width]
        residuals = images @ S[:, best] - (basis @ S[:, best]) * w[best]
        lengths = np.linalg.norm(residuals, axis=0) / max(float(np.abs(w).max()), _TINY)
        worst = float(lengths[:k].max())
        if worst <= tol or basis.shape[1] == size:
            found = np.sort(best[:k])
            return w[found], basis @ S[:, found]
        if basis.shape[1] + width > most:
            kept = order[: BLOCKS_KEPT * width]
            basis, images = basis @ S[:, kept], images @ S[:, kept]
        block = _independent(residuals[:, lengths > _TINY], basis)
    raise ConvergenceError(
        f"eigenvectors: after {steps} reads of H the residual is {worst:.1e} of |H|, expected {tol:.1e}: raise "
        "`steps` or `tol`, or ask for more eigenvalues at once"
    )


def ranked(w: Vector, which: Which) -> npt.NDArray[np.int64]:
    """Number ascending eigenvalues from the most wanted on."""
    if which in {"LM", "SM"}:
        ascending = np.argsort(np.abs(w), kind="stable")
        return ascending if which == "SM" else ascending[::-1]
    n = len(w)
    if which == "LA":
        return np.arange(n)[::-1]
    if which == "SA":
        return np.arange(n)
    ends = np.empty(n, np.int64)  # alternating, the upper one first, as SciPy has it where k is odd
    ends[0::2], ends[1::2] = np.arange(n)[::-1][: (n + 1) // 2], np.arange(n // 2)
    return ends


def _independent(block: Vector, basis: Vector) -> Vector:
    """Return an orthonormal basis of what a block adds to one."""
    block = block / np.linalg.norm(block, axis=0)
    for _ in range(2):  # once leaves rounding of the part that is taken away
        block = block - basis @ (basis.T @ block)
        block, R, _ = scipy.linalg.qr(block, mode="economic", pivoting=True)
        block = block[:, np.abs(np.diagonal(R)) > DEPENDENT]
    return block


@dataclass(frozen=True)
class SpectralDensity:
    """An estimate of how the eigenvalues are spread, by stochastic Lanczos quadrature.

    Of each random vector z of length one, sum_k weights[z, k] f(nodes[z, k]) is z' f(H) z, exactly for polynomials up
    to degree 2 steps - 1; its mean over z is tr f(H) / P. Errors are standard errors of that mean; of numbers of
    eigenvalues, which have a jump, what the quadrature may be off is added: many where steps are too few to tell.

    Attributes:
        nodes: # shape: (probes, steps)
        weights: of each vector they sum up to one.  # shape: (probes, steps)
        size: P.
    """

    nodes: Vector
    weights: Vector
    size: int

    def trace_of(self, f: Callable[[Vector], Vector]) -> tuple[float, float]:
        """Estimate tr f(H), as `trace_of(np.exp)`; of what has jumps or poles among the eigenvalues, roughly.

        Args:
            f: from arrays to arrays.

        Returns:
            The estimate, and its error.
        """
        found = self.size * (self.weights * f(self.nodes)).sum(1)
        return float(found.mean()), _error(found)

    def count_below(self, x: float) -> tuple[float, float]:
        """Estimate the number of eigenvalues below x, and its error."""
        below, slack = self._below(np.array([x]))
        return float(below.mean()), _error(below[:, 0]) + float(slack.mean())

    def histogram(self, edges: npt.ArrayLike) -> tuple[Vector, Vector]:
        """Estimate the number of eigenvalues in each bin.

        Args:
            edges: ascending.  # shape: (n + 1,)

        Returns:
            The numbers, and their errors.  # shape: (n,), (n,)
        """
        below, slack = self._below(np.asarray(edges, dtype=np.float64))
        counts, open_ends = np.diff(below, axis=1), slack[:, :-1] + slack[:, 1:]
        return counts.mean(0), np.array([_error(found) for found in counts.T]) + open_ends.mean(0)

    def _below(self, edges: Vector) -> tuple[Vector, Vector]:
        """Return each vector's number of eigenvalues below each edge, and how far the quadrature may be off there.

        Between two nodes the measure is known but for their weights (the inequalities of Chebyshev, Markov and
        Stieltjes; Szego, Orthogonal Polynomials, 3.41).

        Args:
            edges: # shape: (n,)

        Returns:
            # shape: (probes, n), (probes, n)
        """
        sums = np.pad(self.weights.cumsum(1), ((0, 0), (1, 0)))
        beside = np.maximum(np.pad(self.weights, ((0, 0), (1, 0))), np.pad(self.weights, ((0, 0), (0, 1))))
        place = np.stack([np.searchsorted(nodes, edges) for nodes in self.nodes])
        return self.size * np.take_along_axis(sums, place, 1), self.size * np.take_along_axis(beside, place, 1)


def lanczos_density(multiply: Multiply, probes: Vector, steps: int) -> SpectralDensity:
    """Run Lanczos from several vectors at once, each by itself, and take the quadrature that each gives.

    Without reorthogonalisation, which would keep all steps in memory: copies of an eigenvalue that rounding makes share
    its weight (Ubaru, Chen, Saad, SIAM J. Matrix Anal. Appl. 2017; Chen, Trogdon, Ubaru, ICML 2021).

    Args:
        multiply: X -> A X, in float64.
        probes: of length one.  # shape: (P, probes)
        steps: of Lanczos, one product each.

    Returns:
        The estimate.
    """
    size, count = probes.shape
    diagonal, beside = np.zeros((2, count, steps))
    before, q, beta = np.zeros_like(probes), probes, np.zeros(count)
    for step in range(steps):
        w = multiply(q) - before * beta
        alpha = np.einsum("ij,ij->j", q, w)
        w -= q * alpha
        diagonal[:, step], beta = alpha, np.linalg.norm(w, axis=0)
        # All of what a vector can reach is reached: what follows is rounding, and is cut off with weight zero.
        beta = np.where(beta > _TINY * size * np.abs(diagonal).max(1), beta, 0.0)
        beside[:, step] = beta
        before, q = q, np.divide(w, beta, out=np.zeros_like(w), where=beta > 0)
    nodes, weights = np.empty((2, count, steps))
    for z in range(count):
        nodes[z], vectors = scipy.linalg.eigh_tridiagonal(diagonal[z], beside[z, :-1])
        weights[z] = vectors[0] ** 2
    return SpectralDensity(nodes, weights, size)


def _error(found: Vector) -> float:
    return float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else float("nan")
