"""The benchmark's models written once more in JAX: the loss as a function of the flat parameters."""

import math

import jax
import jax.numpy as jnp
from torch import nn


def flat_loss(problem):
    """Return the mean loss of a problem's one batch, and where it is taken.

    Raises:
        NotImplementedError: a module of the model is not written here.
    """
    inputs, target = (jnp.asarray(t.numpy()) for t in problem.batches[0])
    shapes = {p.name: p.shape for p in problem.layout}
    ends = [p.span.stop for p in problem.layout][:-1]
    values = dict(problem.model.named_parameters())
    theta = jnp.concatenate([jnp.asarray(values[name].detach().numpy()).reshape(-1) for name in shapes])
    forward = sequential if isinstance(problem.model, nn.Sequential) else transformer

    def loss(flat):
        parts = jnp.split(flat, ends)
        parameters = {n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = forward(problem.model, parameters, inputs)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1))

    return loss, theta


def affine(parameters, name, x):
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def sequential(model, parameters, x):
    """Dense and convolutional layers, one after the other."""
    for k, module in enumerate(model):
        if isinstance(module, nn.Linear):
            x = affine(parameters, k, x)
        elif isinstance(module, nn.Conv2d):
            x = jax.lax.conv(x, parameters[f"{k}.weight"], (1, 1), "VALID") + parameters[f"{k}.bias"][:, None, None]
        elif isinstance(module, nn.AvgPool2d):
            window = (1, 1, module.kernel_size, module.kernel_size)
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / module.kernel_size**2
        elif isinstance(module, nn.Flatten):
            x = x.reshape(len(x), -1)
        elif isinstance(module, nn.Tanh):
            x = jnp.tanh(x)
        else:
            raise NotImplementedError(f"{module} is not written in JAX here")
    return x


def normed(parameters, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + nn.LayerNorm(1).eps)
    return x * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def transformer(model, parameters, tokens):
    """The char transformer of the jobs."""
    x = parameters["embed.weight"][tokens] + parameters["place.weight"][: tokens.shape[1]]
    for k, block in enumerate(model.blocks):
        x = attended(f"blocks.{k}.", block.heads, parameters, x)
    return affine(parameters, "head", normed(parameters, "norm", x))


def attended(block, heads, parameters, x):
    """Return what a block of attention and a GELU network, each with a residual connection, makes of x."""
    N, T, width = x.shape
    together = affine(parameters, block + "qkv", normed(parameters, block + "norm1", x))
    q, k, v = together.reshape(N, T, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -jnp.inf)
    mixed = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(N, T, width)
    x = x + affine(parameters, block + "out", mixed)
    inner = jax.nn.gelu(affine(parameters, block + "up", normed(parameters, block + "norm2", x)), approximate=False)
    return x + affine(parameters, block + "down", inner)
