"""The spectrum of a finished Hessian in a few numbers: what `hessian spectrum` shows."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from pipeline.analysis.lanczos import SpectralDensity, Vector
from pipeline.analysis.solve import Solve

FEW = 3  # eigenvalues that an estimate may be off, however few there are
DECADES = 8  # below the largest eigenvalue's, on each side of zero


def spectrum_of(
    hessian: Solve, how: Literal["few", "density", "whole"], k: int = 20, *, steps: int = 64
) -> dict[str, Any]:
    """Describe a spectrum in plain values, for a table or JSON.

    Args:
        hessian: a finished one, or a view.
        how: the k eigenvalues largest in absolute value; an estimate of how many are in each decade; or all of them.
        k: how many.
        steps: of the estimate: reads of what does not fit into memory.

    Returns:
        What it is of; with `few` and `whole` the eigenvalues, ascending; with `density` and `whole` the bins, a count
        and its error for each; with `density` the number below zero, too; with `whole` signs, rank and condition
        number, None where that is infinite.
    """
    found: dict[str, Any] = {
        "url": hessian.url,
        "P": hessian.shape[0],
        "parameters": list(hessian.parameters.names),
        "trace": hessian.trace(),
    }
    if how == "few":
        w = hessian.eigsh(min(k, hessian.shape[0]), "LM", return_eigenvectors=False)
        return found | {"eigenvalues": w.tolist()}
    if how == "density":
        density = hessian.spectral_density(steps=steps)
        count, error = density.count_below(0.0)
        return found | {"negative": {"count": count, "error": error}, "bins": _bins(*_resolved(density))}
    w = hessian.eigvalsh()
    edges, condition = decades(w), hessian.condition_number()
    counts = np.histogram(w, edges)[0].astype(float)
    return found | {
        "eigenvalues": w.tolist(),
        "inertia": hessian.inertia()._asdict(),
        "rank": hessian.rank(),
        "condition_number": condition if np.isfinite(condition) else None,  # JSON knows no infinity
        "bins": _bins(edges, counts, np.zeros(len(counts))),
    }


def decades(eigenvalues: Vector) -> Vector:
    """Return edges of bins: powers of ten on both sides of zero, down from the one above the largest.

    Args:
        eigenvalues: at least one.

    Returns:
        Ascending.  # shape: (2 * (DECADES + 1),)
    """
    top = float(np.abs(eigenvalues).max()) or 1.0
    powers = 10.0 ** (np.floor(np.log10(top)) + 1 - np.arange(DECADES + 1))
    return np.concatenate([-powers, powers[::-1]])


def _resolved(density: SpectralDensity) -> tuple[Vector, Vector, Vector]:
    """Return bins, counts and errors; decades about zero are one bin where single ones are not told apart."""
    edges = decades(density.nodes[density.weights > 0])
    while True:
        counts, errors = density.histogram(edges)
        middle = len(edges) // 2
        is_told = (errors <= np.maximum(counts / 2, FEW)) | (counts == 0)
        if len(edges) <= 4 or np.delete(is_told, middle - 1).all():
            return edges, counts, errors
        edges = np.delete(edges, [middle - 1, middle])


def _bins(edges: Vector, counts: Sequence[float] | Vector, errors: Vector) -> list[dict[str, float]]:
    """Name the bins that hold anything."""
    rows = zip(edges[:-1].tolist(), edges[1:].tolist(), np.asarray(counts).tolist(), errors.tolist(), strict=True)
    return [{"from": low, "to": high, "count": n, "error": e} for low, high, n, e in rows if n]
