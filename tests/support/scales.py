"""Errors of single entries: rows and columns have scales of their own, since features have."""

import numpy as np

ITERATIONS = 20
RANDOM_SHIFTS = 2
VANISHING = 1e-15  # of the largest entry: what a row that is zero but for rounding may hold
NOISE = 32  # how much more than a few shifts by an ulp show rounding may leave


def scales(matrix):
    """Return d, as small as |H_ij| <= d_i d_j allows; zero for a row of zeros.

    sqrt(|H_ii|) where the diagonal leads, and not only there: a bilinear form has none.
    """
    size = np.abs(np.asarray(matrix, dtype=np.float64))
    size = np.maximum(size, size.T)
    d = np.sqrt(size.max(1, initial=0))
    for _ in range(ITERATIONS):
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.nan_to_num(size / d[:, None] / d[None, :], nan=0.0, posinf=0.0)
        d = d * np.sqrt(share.max(1, initial=0))
    return d


def bounds(matrix):
    """Return d_i d_j."""
    d = scales(matrix)
    return np.multiply.outer(d, d)


def entry_error(found, truth, noise):
    """Largest error of an entry, beyond what is noise, over the scales of its row and its column. Prints where."""
    gap = np.maximum(np.abs(np.asarray(found, dtype=np.float64) - truth) - noise - VANISHING * np.abs(truth).max(), 0)
    gap = np.nan_to_num(gap, nan=np.inf)
    limit = bounds(truth)
    share = np.divide(gap, limit, out=np.where(gap > 0, np.inf, 0.0), where=limit > 0)
    worst = float(share.max(initial=0))
    if worst > 0:
        i, j = np.unravel_index(share.argmax(), share.shape)
        print(f"entry error {worst:.2e} at {i}, {j}: found {found[i, j]:.6g}, truth {truth[i, j]:.6g}")
    return worst
