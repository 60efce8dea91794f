"""Transforms of torch.func nested in a loss or a model, some of which end the process under a dispatch mode."""

import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from hazards.base import Fn, adding, normal, objective, supervised

add = adding("transforms inside")
X = normal(6, 2)


def net(out=1):
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, out))


def at(call):
    """The model at one point, a scalar."""
    return lambda p: call(p[None])[0, 0]


def trace(matrices):
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def squared(per_sample):
    """The sum of squares of what is computed for each sample, of their number."""
    return lambda call, b: (vmap(lambda p: per_sample(at(call), p))(b[0]).square().sum(), len(b[0]))


def along(u, p):
    """Second derivative along a direction, forward over reverse."""
    return jvp(grad(u), (p,), (torch.ones_like(p),))[1].sum()


def laplacian(u, p):
    """Forward over reverse along each axis."""
    return vmap(lambda v: (jvp(grad(u), (p,), (v,))[1] * v).sum())(torch.eye(2).to(p)).sum()


def third(u, p):
    return jvp(lambda q: jvp(grad(u), (q,), (torch.ones_like(p),))[1], (p,), (torch.ones_like(p),))[1].sum()


def by_vjp(u, p):
    """Reverse over reverse."""
    _, pull = vjp(grad(u), p)
    return pull(torch.ones_like(p))[0].sum()


PER_SAMPLE = {
    "determinant of hessian": lambda u, p: torch.linalg.det(hessian(u)(p)),
    "jacfwd of jacrev": lambda u, p: trace(jacfwd(jacrev(u))(p)),
    "jacrev of jacfwd": lambda u, p: trace(jacrev(jacfwd(u))(p)),
    "jacfwd of jacfwd": lambda u, p: trace(jacfwd(jacfwd(u))(p)),
    "jvp of grad": along,
    "jvp of grad along each axis": laplacian,
    "three derivatives": third,
    "vjp of grad": by_vjp,
}
for name_, function_ in PER_SAMPLE.items():
    add(f"transforms: {name_} under vmap", lambda f=function_: objective(net(), squared(f), (X,)))


def in_the_model(m, x):
    """A force and a curvature that the model gives of its own energy."""
    energy = lambda p: m.net(p[None])[0, 0]
    return torch.cat([vmap(grad(energy))(x), vmap(hessian(energy))(x).flatten(1)], -1)


def in_the_loss(o, y):
    """A loss that is curved by its own Hessian."""
    curved = lambda q: (q - 0.3).pow(4).sum() + q.prod()
    return vmap(lambda q: trace(hessian(curved)(q)))(o).sub(y).square().mean()


def one_by_one(call, b):
    return sum(trace(hessian(at(call))(p)) ** 2 for p in b[0]), len(b[0])


def by_chunks(call, b):
    return vmap(lambda p: trace(hessian(at(call))(p)), chunk_size=2)(b[0]).square().sum(), len(b[0])


add(
    "transforms: hessian in the model",
    lambda: supervised(Fn(in_the_model, net=net()), nn.MSELoss(), X, normal(6, 6, seed=3)),
)
add("transforms: hessian in the loss", lambda: supervised(net(2), in_the_loss, X, normal(6)))
add("transforms: hessian of one point after another", lambda: objective(net(), one_by_one, (X,)))
add("transforms: hessian by chunks", lambda: objective(net(), by_chunks, (X,)))
