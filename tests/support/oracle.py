"""The oracle: plain autograd, row by row, in float64. Imports nothing of the engines."""

import copy

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map


def double(tree):
    return tree_map(lambda t: wide(t) if isinstance(t, torch.Tensor) else t, tree)


def wide(t):
    """In the type of twice the width."""
    return t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t


def dense_hessian(model, loss, batch, names=None, l2=0.0, only=slice(None)):
    """H of loss(model, batch), the whole data set as one batch, with respect to named parameters.  # shape: (P, P)

    `only` some rows of it are computed where that takes long.
    """
    model = copy.deepcopy(model)._apply(wide)
    named = dict(model.named_parameters())
    theta = [named[n] for n in (names or named)]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no double backward
        value = loss(model, double(batch)) + 0.5 * l2 * sum((p**2).sum() for p in theta)
    flat = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(value, theta, create_graph=True, materialize_grads=True)]
    )
    rows = []
    for entry in flat[only]:
        parts = (
            torch.autograd.grad(entry, theta, retain_graph=True, materialize_grads=True)
            if entry.requires_grad
            else [torch.zeros_like(p) for p in theta]
        )
        rows.append(torch.cat([p.reshape(-1) for p in parts]))
    return torch.stack(rows).numpy()


def block_error(found, truth, layout, ulps=16, noise=0.0):
    """Largest error of a block over sqrt(max|H_aa| max|H_bb|) + 1e-9 max|H|, beyond some last bits of max|H| itself.

    Structural zeros (a bias before a normalisation) carry that rounding whatever their own size; `ulps=0` allows for
    none, `noise` for more, entry by entry. Prints where the worst error is, since a test that fails shows it.
    """
    found, truth = np.asarray(found, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    assert found.shape == truth.shape
    spans = {p.name: slice(p.span.start, p.span.stop) for p in layout if p.size}
    largest = {n: np.abs(truth[s, s]).max() for n, s in spans.items()}
    floor = 1e-9 * np.abs(truth).max()
    rounding = ulps * np.finfo(np.float64).eps * np.abs(truth).max()
    noise = np.broadcast_to(noise, truth.shape)
    worst, where = 0.0, None
    for a, rows in spans.items():
        for b, cols in spans.items():
            gap = np.maximum(np.abs(found - truth)[rows, cols] - (rounding + noise)[rows, cols], 0)
            scale = np.sqrt(largest[a] * largest[b]) + floor or 1.0
            error = np.nan_to_num(gap, nan=np.inf).max() / scale
            if error > worst:
                worst, where = error, (a, b, np.unravel_index(gap.argmax(), gap.shape), gap.max(), scale)
    print(
        f"block error {worst:.2e} at {where}; extremes: found {found.min():.3g} {found.max():.3g}, "
        f"truth {truth.min():.3g} {truth.max():.3g}"
    )
    return worst
