"""Single precision that is written into a model or a loss, evaluated in double: what a float64 truth needs.

`x.float()`, `torch.zeros(n)`, `dtype=torch.float32` and float32 tensors that no module owns (attributes, constants of a
loss) would round what is compared at 1e-9, or raise where they meet float64.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.problem.modes import within
from pipeline.problem.written_out import WrittenOut

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_CASTS: Mapping[Callable[..., Any], torch.dtype] = {
    Tensor.float: torch.float64,
    Tensor.cfloat: torch.complex128,  # type: ignore[attr-defined]
}
_DRAWS = {torch.rand, torch.randn, torch.rand_like, torch.randn_like}
_LEGACY = {"torch.FloatTensor": torch.float64, "torch.cuda.FloatTensor": torch.float64}


@contextmanager
def evaluated_in(
    dtype: torch.dtype, own: torch.dtype = torch.float64, written_out: Collection[str] | None = ()
) -> Iterator[None]:
    """Evaluate in a floating type: what is created without a type has it, and float64 is not left for float32.

    Args:
        dtype: of the run, or float64 of the truth.
        own: of the model, in which random numbers are drawn.
        written_out: names of operations to be written out, see `WrittenOut`; all that have a form when None.

    Yields:
        Nothing; torch's default type is put back at the end.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if before != dtype:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, before)
        if written_out is None or written_out:
            stack.enter_context(WrittenOut(written_out))
        if dtype == torch.float64:
            stack.enter_context(_Lifted(own))
        yield


class _Lifted(TorchFunctionMode):
    """Takes float64 for float32, and complex128 for complex64, wherever a type is named or a tensor of one is used.

    Args:
        drawn_in: the run's own type: from one seed, generators give other numbers in another type.
    """

    def __init__(self, drawn_in: torch.dtype) -> None:
        super().__init__()
        self._drawn_in = drawn_in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in {"__get__", "__set__"}:  # of shapes, types and flags
            return func(*args, **kwargs)
        if self._drawn_in != torch.float64 and func in _DRAWS:
            return self._drawn(func, args, kwargs)
        if func in _CASTS:
            return args[0].to(_CASTS[func])
        if name == "__getitem__":  # a part, and not all that it is taken of
            return _wider(within(self, func, args, kwargs))
        kept = args[:1] if _is_in_place(name) else ()  # what it changes is the tensor itself
        args = kept + tuple(map(_wider, args[len(kept) :]))
        kwargs = {key: value if key == "out" else _wider(value) for key, value in kwargs.items()}
        return within(self, func, args, kwargs)

    def _drawn(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Draw the numbers that the run draws."""
        if kwargs.get("dtype") not in {None, torch.float32, torch.float64}:
            return func(*args, **kwargs)
        found = func(*args, **(kwargs | {"dtype": self._drawn_in}))
        return found.to(torch.float64)


def _is_in_place(name: str) -> bool:
    """Whether an operation changes its first operand, as `add_`, `__iadd__` and `__setitem__` do."""
    return name.startswith(("__i", "__set")) if name.endswith("__") else name.endswith("_")


def _wider(value: Any) -> Any:
    """Return a tensor in double precision where it is in single, and the wider type where one is named."""
    if isinstance(value, Tensor):
        return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if type(value) in {tuple, list}:
        return type(value)(map(_wider, value))
    return _LEGACY.get(value, value) if isinstance(value, str) else value
