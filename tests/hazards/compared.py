"""A matrix against differences of the gradient of a twin, in float64 and entry by entry."""

import copy

import numpy as np
import torch
from scales import bounds, scales

from hazards.composed import Made

STEPS = tuple(10.0**-k for k in range(1, 10))  # of each entry's reach
MOST = 1e3  # that an entry may go
TOLERANCE = {"float64": 1e-6, "float32": 1e-3}  # over the scales of row and column
GAPS, ROUNDING = 30, 32  # how much more than what is seen differences and rounding may be off
SHIFTS = 3  # by some ulps, at which rounding is seen
LEAST = 1e-15  # of the largest entry


class Twin:
    """A net in one type as a function of its selected parameters."""

    def __init__(self, made: Made, dtype: torch.dtype = torch.float64):
        self.net = copy.deepcopy(made.twin).to(dtype)
        named = dict(self.net.named_parameters())
        self.theta = [named[n] for n in made.names]
        self.whole, self.start = made.whole, torch.cat([p.detach().flatten() for p in self.theta])

    def put(self, flat):
        with torch.no_grad():
            for p, part in zip(self.theta, flat.split([p.numel() for p in self.theta]), strict=True):
                p.copy_(part.view_as(p))

    def gradient(self, flat):
        self.put(flat)
        parts = torch.autograd.grad(self.whole(self.net), self.theta, materialize_grads=True)
        return torch.cat([g.flatten() for g in parts]).numpy()

    def hessian(self, flat):
        """By plain double backward: only to see what rounding does."""
        self.put(flat)
        first = torch.autograd.grad(self.whole(self.net), self.theta, create_graph=True, materialize_grads=True)
        rows = [
            torch.autograd.grad(entry, self.theta, retain_graph=True, materialize_grads=True)
            if entry.requires_grad
            else [torch.zeros_like(p) for p in self.theta]
            for entry in torch.cat([g.flatten() for g in first])
        ]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double().numpy()

    def gradient_noise(self):
        """How far rounding takes each entry of the gradient."""
        here, generator = self.gradient(self.start), torch.Generator().manual_seed(1)
        eps = torch.finfo(self.start.dtype).eps
        shifts = [eps * self.sizes() * torch.randn(self.start.shape, generator=generator) for _ in range(SHIFTS)]
        return np.max([np.abs(self.gradient(self.start + shift) - here) for shift in shifts], 0) + eps * np.abs(here)

    def reaches(self):
        """How far each entry may go until the loss has changed by about itself: the scale of its steps."""
        self.put(self.start)
        loss = abs(float(self.whole(self.net).detach()))
        d = scales(self.hessian(self.start))
        reach = np.divide(loss**0.5, d, out=np.zeros_like(d), where=d > 0)
        return np.maximum(np.minimum(reach, MOST), self.sizes().numpy())

    def sizes(self):
        """Of each entry its own size; where it is zero, that of its parameter."""
        parts = []
        for p in self.theta:
            rms = float(p.detach().square().mean().sqrt()) or 0.1
            parts.append(torch.where(p.detach() == 0, rms, p.detach().abs()).flatten())
        return torch.cat(parts)


def by_differences(twin: Twin):
    """H, column by column, by central differences, and by how much each entry may be off."""
    reaches, noise = twin.reaches(), twin.gradient_noise()
    found = [_column(twin, k, float(reach), noise) for k, reach in enumerate(reaches)]
    return tuple(np.stack(parts, 1) for parts in zip(*found, strict=True))


def _column(twin: Twin, k: int, reach: float, noise):
    """By the step that disagrees least with the next one, and with any smaller one beyond what rounding does to that.

    Two large steps may agree on both sides of something narrow, two small ones where there is rounding alone.
    """
    shift, columns, rounded = torch.zeros_like(twin.start), [], []
    for step in STEPS:
        shift[k] = h = step * reach
        columns.append((twin.gradient(twin.start + shift) - twin.gradient(twin.start - shift)) / (2 * h))
        rounded.append(noise / h)
    columns, rounded = np.array(columns), np.array(rounded)
    off = np.full(columns.shape, np.inf)
    for s in range(len(STEPS) - 1):
        gaps = np.abs(columns[s + 1 :] - columns[s])
        off[s] = np.maximum(np.maximum(gaps[0], rounded[s]), (gaps - 4 * rounded[s + 1 :]).max(0))
    best = np.nan_to_num(off, nan=np.inf).argmin(0)[None]
    return np.take_along_axis(columns, best, 0)[0], np.take_along_axis(off, best, 0)[0]


def rounding(made: Made, dtype: torch.dtype):
    """Plain double backward in float64, and what it is off by in a type, at the weights and some ulps beside them."""
    exact, twin = Twin(made), Twin(made, dtype)
    truth, generator = exact.hessian(exact.start), torch.Generator().manual_seed(0)
    eps, errors = torch.finfo(dtype).eps, []
    for shift in range(SHIFTS):
        noise = torch.randn(twin.start.shape, generator=generator).to(dtype)
        found = twin.hessian(twin.start + shift * eps * twin.sizes() * noise)
        errors.append(np.abs(found - truth))
    return truth, bounds(np.nan_to_num(np.max(errors, 0), nan=np.inf, posinf=1e300))


def compare(found, made: Made, dtype: str) -> str:
    """Where a matrix is wrong, beyond what differences resolve and what rounding may do; empty where it is not.

    Plain double backward is right of all ingredients, and counts as well: a tanh that is saturated rounds 1 - y^2 to a
    few last bits, and differences of that stairway agree on zero, to all places.
    """
    if not np.isfinite(found).all():
        return "it is not finite"
    truth, gap = by_differences(Twin(made))
    # Columns are taken apart: where two steps agree by chance in one of them, the other shows it.
    plain, rounded = rounding(made, getattr(torch, dtype))
    noise = ROUNDING * rounded + GAPS * np.maximum(gap, gap.T) + np.abs(truth - truth.T)
    d = scales(truth)
    allowed = TOLERANCE[dtype] * np.multiply.outer(d, d) + noise + LEAST * np.abs(truth).max(initial=0)
    over = np.minimum(np.abs(found - truth), np.abs(found - plain)) / np.where(allowed > 0, allowed, 1e-300)
    i, j = np.unravel_index(over.argmax(), over.shape)
    if over[i, j] <= 1:
        return ""
    return f"entry {i}, {j} is {found[i, j]:.6g}, not {truth[i, j]:.6g} (scales {d[i]:.1g}, {d[j]:.1g})"
