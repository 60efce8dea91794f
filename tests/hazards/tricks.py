"""Tricks between two layers: surrogates, hooks, low precision, randomness, numbers that are hard to hold."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from hazards.base import Fn, add, between, twinned
from hazards.functions import Clipped, Cube, CubeDetached, CubeNew, CubeOnce, CubeStored, CubeWrong, Reversed
from hazards.losses import SUMMED


def hooked(scale):
    def function(_, x):
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(lambda g: scale * g)
        return torch.tanh(y)

    return function


def bessel_j0(_, x):
    """By its series: torch takes the function for a constant."""
    return sum((-1) ** k * (x / 2) ** (2 * k) / float(math.factorial(k)) ** 2 for k in range(20))


def without_grad(part):
    def function(_, x):
        with torch.no_grad():
            scale = part(x)
        return torch.tanh(x * scale)

    return function


def reseeded(_, x):
    torch.manual_seed(3)
    return torch.tanh(x + torch.randn(4).to(x))


def own_generator(_, x):
    return torch.tanh(x + torch.randn(4, generator=torch.Generator().manual_seed(3)).to(x))


def rare(chance):
    return lambda _, x: torch.tanh(2 * x) if torch.rand(()) < chance else torch.tanh(x)


def filled(_, x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1].sin()
    y[:, 1:] += x[:, 1:] ** 2
    return y


def newton_root(_, x):
    """The root of y^3 + y = x, by iteration."""
    y = x
    for _step in range(30):
        y = y - (y**3 + y - x) / (3 * y**2 + 1)
    return y


def unconverged(_, x):
    """Iterates until it changes little: the number of steps depends on the data."""
    y = torch.zeros_like(x)
    while float((0.5 * torch.cos(x * y) - y).detach().abs().max()) > 1e-3:
        y = 0.5 * torch.cos(x * y)
    return y


def implicit(_, x):
    """The root of y^3 + y = x, found without a graph and then given its first derivative alone."""
    with torch.no_grad():
        y = newton_root(None, x)
        slope = 1 / (3 * y**2 + 1)
    return y + slope * (x - x.detach())


def low(dtype):
    return lambda m, x: torch.tanh(x.to(dtype)).to(x.dtype)


def autocast(_, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return torch.tanh(x @ x.new_ones(4, 4).tril())


def branch(_, x):
    return torch.tanh(x) if x.sum() > 0 else x.sin()


def per_sample_branch(_, x):
    return torch.stack([row.tanh() if row.sum() > 0 else row.sin() for row in x])


def positive(x):
    """Positive definite matrices from rows.  # shape: (N, 2, 2)"""
    m = x.reshape(-1, 2, 2)
    return m @ m.mT + torch.eye(2).to(x)


def scattered(_, x):
    index = torch.tensor([0, 1, 0, 2], device=x.device).expand(len(x), 4)
    return torch.zeros_like(x).scatter_add(1, index, x**2)


def fft(_, x):
    f = torch.fft.fft(x)
    return f.real * f.imag + f.abs()


def complex_product(_, x):
    z = torch.view_as_complex(x.reshape(-1, 2, 2))
    return torch.view_as_real(z * z.conj().roll(1, -1) + z.exp()).flatten(1)


def quantised(_, x):
    return x + (torch.round(x * 4) / 4 - x).detach()


def gumbel(_, x):
    return F.gumbel_softmax(x, hard=True)


def hard_softmax(_, x):
    soft = x.softmax(-1)
    return F.one_hot(soft.argmax(-1), 4).to(soft) - soft.detach() + soft


def sampled(_, x):
    return torch.distributions.Normal(x, 1.0).rsample()


GENERATOR = np.random.default_rng(0)
RANDOM = r"body\.1|Fn|random"
UP = r"body\.0\.(weight|bias)|body\.1|Fn"
TRICKS = {
    "straight-through rounding": (quantised, UP),
    "straight-through argmax": (hard_softmax, UP),
    "gumbel softmax": (gumbel, RANDOM),
    "round": (lambda _, x: torch.tanh(x) + torch.round(x), UP),
    "sign": (lambda _, x: torch.tanh(x) * torch.sign(x), ""),
    "argmax as an index": (lambda _, x: x.tanh().gather(1, x.argmax(1, keepdim=True).expand(-1, 2)), ""),
    "no_grad around a factor": (without_grad(lambda x: x.exp()), UP),
    "no_grad around a constant": (without_grad(lambda x: torch.ones_like(x) * 2), ""),
    "detached normaliser": (lambda _, x: x / x.norm(dim=-1, keepdim=True).detach(), UP),
    "detached maximum in a log-sum-exp": (
        lambda _, x: (x - x.amax(-1, True).detach()).exp().cumsum(-1).log() + x.amax(-1, True).detach(),
        "",
    ),
    "old-style Function": (lambda _, x: Cube.apply(x), ""),
    "new-style Function": (lambda _, x: CubeNew.apply(x), ""),
    "Function with a wrong backward": (lambda _, x: CubeWrong.apply(x), UP + "|Cube"),
    "Function once differentiable": (lambda _, x: CubeOnce.apply(x), UP + "|once_differentiable|Cube"),
    "Function with a wrong double backward": (lambda _, x: CubeDetached.apply(x), UP + "|Cube"),
    "Function with its slope stored on ctx": (lambda _, x: CubeStored.apply(x), UP + "|Cube"),
    "Function that clips its gradient": (lambda _, x: Clipped.apply(x).tanh(), UP + "|Clipped"),
    "Function that reverses its gradient": (lambda _, x: Reversed.apply(x).tanh(), UP + "|Reversed"),
    "hook that scales gradients": (hooked(0.5), UP + "|hook"),
    "hook that leaves gradients": (hooked(1.0), ""),
    "float32 inside": (low(torch.float32), UP + "|float32"),
    "bfloat16 inside": (low(torch.bfloat16), UP + "|bfloat16"),
    "float16 inside": (low(torch.float16), UP + "|float16|half"),
    "autocast to bfloat16": (autocast, UP + "|autocast|bfloat16"),
    "float64 inside": (lambda _, x: torch.tanh(x.double()).to(x.dtype), ""),
    "additive noise": (lambda _, x: x + torch.randn_like(x), RANDOM),
    "noise by NumPy": (lambda _, x: x + float(np.random.standard_normal()), RANDOM),
    "noise by Python": (lambda _, x: x * (1 + random.random()), RANDOM),
    "noise by a NumPy generator": (
        lambda _, x: x + float(GENERATOR.standard_normal()),
        RANDOM + "|not deterministic",
    ),
    "rare random branch": (rare(0.2), RANDOM),
    "very rare random branch": (rare(1e-4), RANDOM),
    "random permutation that does not matter": (
        lambda _, x: x[:, torch.randperm(4)].square().sum(-1, keepdim=True).tanh(),
        RANDOM,
    ),
    "noise that is reseeded": (reseeded, RANDOM),
    "noise from a generator of its own": (own_generator, ""),
    "noise reparametrised": (sampled, RANDOM),
    "where with NaN not taken": (lambda _, x: torch.where(x > 0, x.sqrt(), 0.3 * x), UP + "|finite|NaN"),
    "where made safe": (lambda _, x: torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.3 * x), ""),
    "square root at zero": (lambda _, x: (x.relu() * 0 + (x - x)).sqrt() + x.tanh(), UP + "|finite|NaN"),
    "square root of a relu": (lambda _, x: x.relu().sqrt(), UP + "|finite|NaN"),
    "absolute value": (lambda _, x: x.abs(), ""),
    "absolute value at zero": (lambda _, x: (x - x.detach()).abs() + x.tanh(), UP),
    "norm at zero": (lambda _, x: (x - x).norm(dim=-1, keepdim=True) + x.tanh(), UP + "|finite|NaN"),
    "norm": (lambda _, x: x / (1 + x.norm(dim=-1, keepdim=True)), ""),
    "norm that is infinite": (lambda _, x: x / x.norm(p=float("inf"), dim=-1, keepdim=True), ""),
    "power zero": (lambda _, x: x**0 + x.tanh(), ""),
    "power of a relu": (lambda _, x: x.relu() ** 1.5, UP + "|finite|NaN"),
    "power of an exponent": (lambda _, x: x.abs() ** x, ""),
    "x log x at zero": (lambda _, x: torch.special.xlogy(x * 0, x * 0) + x.tanh(), UP + "|finite|NaN"),
    "clamp": (lambda _, x: x.clamp(-0.3, 0.4), ""),
    "clamp in place": (lambda _, x: (x * 1.0).clamp_(-0.3, 0.4), ""),
    "maximum": (lambda _, x: x.max(-1, keepdim=True)[0], ""),
    "amax with ties": (lambda _, x: torch.cat([x, x], -1).amax(-1, keepdim=True).tanh(), ""),
    "top k": (lambda _, x: x.topk(2)[0].tanh(), ""),
    "median": (lambda _, x: x.median(-1, keepdim=True)[0].tanh(), ""),
    "quantile": (lambda _, x: torch.quantile(x, 0.4, dim=-1, keepdim=True).tanh(), ""),
    "sort": (lambda _, x: x.sort(-1)[0].tanh(), ""),
    "cumulative sum": (lambda _, x: x.cumsum(-1).tanh(), ""),
    "cumulative product": (lambda _, x: x.cumprod(-1), ""),
    "cumulative maximum": (lambda _, x: x.cummax(-1)[0].tanh(), ""),
    "logcumsumexp": (lambda _, x: x.logcumsumexp(-1), ""),
    "product with zeros": (lambda _, x: torch.cat([x, 0 * x[:, :1]], -1).prod(-1, keepdim=True) + x.tanh(), ""),
    "logsumexp": (lambda _, x: x.logsumexp(-1, keepdim=True), ""),
    "standard deviation": (lambda _, x: x.std(-1, keepdim=True), ""),
    "determinant": (lambda _, x: torch.linalg.det(x.reshape(-1, 2, 2))[:, None].tanh(), ""),
    "log-determinant": (lambda _, x: torch.logdet(positive(x))[:, None], ""),
    "inverse": (lambda _, x: torch.linalg.inv(positive(x)), ""),
    "solve": (lambda _, x: torch.linalg.solve(positive(x), x.reshape(-1, 2, 2)), ""),
    "pseudo-inverse": (lambda _, x: torch.linalg.pinv(positive(x)), ""),
    "cholesky": (lambda _, x: torch.linalg.cholesky(positive(x)), ""),
    "eigenvalues": (lambda _, x: torch.linalg.eigvalsh(positive(x)), ""),
    "eigenvectors": (lambda _, x: torch.linalg.eigh(positive(x))[1].abs(), ""),
    "equal eigenvalues": (
        lambda _, x: torch.linalg.eigh(x[:, :1, None] * torch.eye(2).to(x))[1] + x.tanh()[:, :2, None],
        UP + "|finite|NaN|linalg",
    ),
    "singular values": (lambda _, x: torch.linalg.svdvals(x.reshape(-1, 2, 2)), ""),
    "QR": (lambda _, x: torch.linalg.qr(positive(x))[1], ""),
    "matrix exponential": (lambda _, x: torch.linalg.matrix_exp(x.reshape(-1, 2, 2)), ""),
    "FFT": (fft, ""),
    "complex": (complex_product, ""),
    "einsum": (lambda _, x: torch.einsum("ni,nj,nk->nk", x, x.tanh(), x), ""),
    "batched product": (lambda _, x: torch.bmm(x[:, :, None], x[:, None]).tanh(), ""),
    "scatter add": (scattered, ""),
    "index add": (
        lambda _, x: torch.zeros_like(x).index_add(1, torch.tensor([0, 1, 0, 2], device=x.device), x.sin()),
        "",
    ),
    "index put accumulating": (
        lambda _, x: torch.zeros_like(x).index_put(
            (torch.arange(len(x), device=x.device)[:, None], torch.tensor([0, 1, 0, 2], device=x.device)),
            x.sin(),
            accumulate=True,
        ),
        "",
    ),
    "gather": (lambda _, x: x.gather(1, x.argsort(1)).tanh(), ""),
    "windows by unfold": (lambda _, x: x.unfold(1, 2, 1).prod(-1), ""),
    "strided view": (lambda _, x: x.contiguous().as_strided((len(x), 3, 2), (4, 1, 1)).prod(-1), ""),
    "filled in place": (filled, ""),
    "in place on a saved result": (lambda _, x: x.exp().add_(1.0).tanh(), UP + "|in-?place"),
    "Newton iteration": (newton_root, ""),
    "iteration until converged": (unconverged, UP + "|" + SUMMED),
    "implicit first derivative": (implicit, UP),
    "branch on a sum over the batch": (branch, SUMMED),
    "branch on each sample": (per_sample_branch, UP),
    ".item() as a factor": (lambda _, x: torch.tanh(x) * x.detach().square().mean().item(), UP + "|" + SUMMED),
    ".tolist() of a shape": (lambda _, x: x.reshape([-1, *torch.tensor([2, 2]).tolist()]).tanh(), ""),
    "centred over the batch": (lambda _, x: (x - x.mean(0)).tanh(), SUMMED),
    "sorted over the batch": (lambda _, x: x.sort(0)[0].tanh(), SUMMED),
    "first sample as a reference": (lambda _, x: (x - x[:1]).tanh(), SUMMED),
    "Bessel function i0": (lambda _, x: torch.special.i0(x), ""),
    "log-gamma": (lambda _, x: torch.lgamma(x.exp()), ""),
    "digamma": (lambda _, x: torch.digamma(x.exp()), ""),
    "error function": (lambda _, x: torch.erf(x) + torch.erfinv(x.tanh() / 2), ""),
    "sinc at zero": (lambda _, x: torch.sinc(x - x) + x.tanh(), UP),
    "arc tangent of two": (lambda _, x: torch.atan2(x, x.roll(1, -1)), ""),
    "hypotenuse": (lambda _, x: torch.hypot(x, x.roll(1, -1)), ""),
    "remainder": (lambda _, x: torch.remainder(x, 0.7).sin(), ""),
    "stop-gradient target": (lambda _, x: (x - x.tanh().detach()).square(), UP),
}
for name_, (function_, culprit_) in TRICKS.items():
    add(name_, lambda function=function_: between(Fn(function)), culprit_)
add(
    "Bessel functions",
    lambda: (lambda made, twin: twinned(made[0], twin[0], *made[1:]))(
        between(Fn(lambda _, x: torch.special.bessel_j0(x))), between(Fn(bessel_j0))
    ),
    UP + "|bessel",
)
