"""Functions with a backward of their own."""

import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    """x^3 in the old style, right to second order."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeNew(Cube):
    """In the new style."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


def cube_with(slope):
    """x^3 with a slope of its own."""

    class CubeWith(Cube):
        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return slope(x) * g

    return CubeWith


class CubeOnce(Cube):
    backward = staticmethod(once_differentiable(Cube.backward))


CubeWrong = cube_with(lambda x: 2.9 * x**2)
CubeDetached = cube_with(lambda x: 3 * x.detach() ** 2)  # the gradient is right, its graph is not


class CubeStored(Cube):
    """Keeps a tensor on ctx and not by save_for_backward, of a graph that is gone."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx, g):
        return ctx.slope * g


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.02, 0.02)


class Reversed(torch.autograd.Function):
    """Gradient reversal of domain-adversarial nets."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g
