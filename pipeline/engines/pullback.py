"""Pulling back many directions at once."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

Tree = TypeVar("Tree")


def pull_back_each(pull_back: Callable[[Tensor], Tree], directions: Tensor) -> Tree:
    """Pull back directions at once, or one by one where some operation's batching rule fails at this size.

    Args:
        pull_back: of a linearised function.
        directions: # shape: (directions, ...)

    Returns:
        What it gives, with a first dimension of directions.
    """
    with torch.no_grad():  # else each pull-back would keep a graph for a third derivative
        try:
            together: Tree = vmap(pull_back)(directions)
            return together
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # adaptive softmax with one sample beyond its cutoff: a shape mismatch inside vmap
            found = [pull_back(direction) for direction in directions]
    stacked: Tree = tree_map(lambda *parts: torch.stack(parts), found[0], *found[1:])
    return stacked
