"""MINRES for many right-hand sides at once: a read of the store is one step of all of them."""

import numpy as np

from pipeline.analysis.lanczos import Vector
from pipeline.analysis.view import Multiply
from pipeline.errors import ConvergenceError

_TINY = np.finfo(float).tiny
ROUND = 0.1  # what is left of a residual after a round, in the preconditioner's norm, as a share of what is asked for


def solve_by_minres(multiply: Multiply, precondition: Multiply, b: Vector, *, tol: float, steps: int) -> Vector:
    """Solve A x = b for a symmetric A, definite or not, until |b - A x| is at most tol |b| in each column.

    MINRES judges its residual in the preconditioner's norm; here it is run again on what is left, until the residual
    itself, computed anew, is small.

    Args:
        multiply: X -> A X.
        precondition: X -> M X, M near the inverse of A in size and positive definite.
        b: # shape: (P, k)
        tol: see above.
        steps: most products.

    Returns:
        x.  # shape: (P, k)

    Raises:
        ConvergenceError: that takes more steps.
    """
    x, left, lengths = np.zeros_like(b), b, np.maximum(np.linalg.norm(b, axis=0), _TINY)
    taken, worst = 0, 1.0 if b.any() else 0.0
    while worst > tol and taken < steps:
        more, some = minres(multiply, precondition, left, tol=min(ROUND, ROUND * tol / worst), steps=steps - taken)
        x, taken = x + more, taken + some + 1
        left = b - multiply(x)
        worst = float((np.linalg.norm(left, axis=0) / lengths).max())
    if worst > tol:
        raise ConvergenceError(
            f"solve: after {taken} reads of H the residual is {worst:.1e} of |b|, expected {tol:.1e}: raise `damping`, "
            "`steps` or `tol`"
        )
    return x


def minres(multiply: Multiply, precondition: Multiply, b: Vector, *, tol: float, steps: int) -> tuple[Vector, int]:
    """Run MINRES (Paige and Saunders, SIAM J. Numer. Anal. 12, 1975), every column by itself.

    In the notation of `scipy.sparse.linalg.minres`, which takes one column: a read of the store for each.

    Args:
        multiply: X -> A X.
        precondition: X -> M X, M positive definite.
        b: # shape: (P, k)
        tol: of the residual in M's norm, as a share of that of b.
        steps: most of them.

    Returns:
        The solution as far as it came, and the steps taken.
    """
    x, w, w2 = np.zeros((3, *b.shape))
    r1 = r2 = b
    y = precondition(b)
    beta = phibar = beta1 = _length(b, y)
    oldb = dbar = epsln = sn = np.zeros(b.shape[1])
    cs = -np.ones(b.shape[1])
    step = 0
    while step < steps and (phibar > tol * beta1).any():
        step += 1
        v = y * _ratio(1.0, beta)
        y = multiply(v) - r1 * _ratio(beta, oldb)
        alfa = _dots(v, y)
        y -= r2 * _ratio(alfa, beta)
        r1, r2, y = r2, y, precondition(y)
        oldb, beta = beta, _length(r2, y)
        oldeps, delta, gbar = epsln, cs * dbar + sn * alfa, sn * dbar - cs * alfa  # by the rotation before
        epsln, dbar = sn * beta, -cs * beta
        gamma = np.maximum(np.hypot(gbar, beta), _TINY)
        cs, sn = gbar / gamma, beta / gamma
        w2, w = w, (v - oldeps * w2 - delta * w) / gamma
        x += cs * phibar * w
        phibar = sn * phibar
    return x, step


def _dots(a: Vector, b: Vector) -> Vector:
    """Return the inner products of columns."""
    return np.asarray(np.einsum("ij,ij->j", a, b))


def _length(r: Vector, y: Vector) -> Vector:
    """Return the length of each column r in the norm of M, y being M r."""
    return np.asarray(np.sqrt(np.maximum(_dots(r, y), 0)))


def _ratio(a: Vector | float, b: Vector) -> Vector:
    """Divide; zero where a column is solved and nothing is left of it."""
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)
