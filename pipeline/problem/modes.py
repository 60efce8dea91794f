"""Modes that look at each operation, also in what torch makes one of: a backward pass, a distance of the user's."""

from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def within(mode: TorchFunctionMode, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a function that a mode was told of, with the mode on where it calls functions of others.

    Args:
        mode: torch has it off while it handles a call.
        function: that was called.
        args: of it.
        kwargs: likewise.

    Returns:
        What it gives.
    """
    if inside := _INSIDES.get(function):
        with mode:
            return inside(*args, **kwargs)
    return function(*args, **kwargs)


def _inside(function: Any) -> Any:
    """Copy a function of torch that is written in Python, but for handing itself to a mode as one operation."""
    # A mode is off in what it calls. That may not be where torch calls functions of others: a distance; or, in a
    # backward pass, a checkpointed forward pass, which must do what the first one did.
    handing = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = function.__globals__ | dict.fromkeys(handing, _never)
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _never(*_: Any) -> bool:
    return False


_INSIDES = {
    function: _inside(function)
    for function in (
        torch.autograd.grad,
        torch.autograd.backward,
        Tensor.backward,
        F.triplet_margin_with_distance_loss,
    )
}
