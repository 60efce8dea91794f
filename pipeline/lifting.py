"""Single precision that is written into a model or a loss, evaluated in double: what a float64 truth needs.

`x.float()`, `torch.zeros(n)`, `dtype=torch.float32` and float32 tensors that no module owns (attributes, constants of a
loss) would round what is compared at 1e-9, or raise where they meet float64.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_CASTS: Mapping[Callable[..., Any], torch.dtype] = {
    Tensor.float: torch.float64,
    Tensor.cfloat: torch.complex128,  # type: ignore[attr-defined]
}
_LEGACY = {"torch.FloatTensor": torch.float64, "torch.cuda.FloatTensor": torch.float64}


@contextmanager
def evaluated_in(dtype: torch.dtype) -> Iterator[None]:
    """Evaluate in a floating type: what is created without a type has it, and float64 is not left for float32.

    Args:
        dtype: of the run, or float64 of the truth.

    Yields:
        Nothing; torch's default type is put back at the end.
    """
    before = torch.get_default_dtype()
    try:
        if before != dtype:
            torch.set_default_dtype(dtype)
        if dtype == torch.float64:
            with _Lifted():
                yield
        else:
            yield
    finally:
        if before != dtype:
            torch.set_default_dtype(before)


class _Lifted(TorchFunctionMode):
    """Takes float64 for float32, and complex128 for complex64, wherever a type is named or two of them meet."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in {"__get__", "__set__"}:  # of shapes, types and flags
            return func(*args, **kwargs)
        if func in _CASTS:
            return args[0].to(_CASTS[func])
        args, kwargs = tuple(map(_wider, args)), {key: _wider(value) for key, value in kwargs.items()}
        if _meets_double(args) or _meets_double(kwargs.values()):
            # What an operation in place changes is the tensor itself.
            kept = args[:1] if _is_in_place(name) else ()
            args = kept + tuple(map(_doubled, args[len(kept) :]))
            kwargs = {key: value if key == "out" else _doubled(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_in_place(name: str) -> bool:
    """Whether an operation changes its first operand, as `add_`, `__iadd__` and `__setitem__` do."""
    return name.startswith(("__i", "__set")) if name.endswith("__") else name.endswith("_")


def _wider(value: Any) -> Any:
    """Give float64 where float32 is named as a type."""
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    return _LEGACY.get(value, value) if isinstance(value, str) else value


def _meets_double(values: Any) -> bool:
    """Whether one of the tensors that an operation is given is in double precision."""
    for value in values:
        if isinstance(value, Tensor):
            if value.dtype in {torch.float64, torch.complex128}:
                return True
        elif isinstance(value, tuple | list) and _meets_double(value):
            return True
    return False


def _doubled(value: Any) -> Any:
    """Give a tensor in double precision where it is in single."""
    if isinstance(value, Tensor):
        return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
    if type(value) in {tuple, list}:
        return type(value)(map(_doubled, value))
    return value
