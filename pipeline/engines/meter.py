"""Seconds, FLOPs and bytes of a call, while nothing of this package stands between its operators and torch.

A dispatch mode would see them all too, but under any of them nested transforms of torch.func crash the process.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from heapq import merge
from itertools import accumulate, chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy, _enable_record_function
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

_C10 = Path(torch.__file__).parent / "lib" / "libc10.so"
ERRORS = 2  # of torch's levels of messages: errors, and no warnings
TAKEN = "Profiler is already enabled"  # torch's words
_CLEAR_PEAK = Path("/proc/self/clear_refs")
LEAST_BYTES = 64 * 2**10  # a sample, where the profiler is taken: what the heap still had is not seen


@dataclass(frozen=True)
class Metered:
    """What a call took.

    Attributes:
        seconds: wall time.
        flops: of matrix products and convolutions, two for each multiplication.
        peak_bytes: most bytes alive at once on its device, beyond those alive before.
    """

    seconds: float
    flops: int
    peak_bytes: int


def metered(
    call: Callable[[], object], device: torch.device, dtype: torch.dtype, samples: int, *, counted: bool
) -> Metered:
    """Make a call, and say what it took.

    torch's profilers do not nest. Under one of the caller's, or where the call starts one itself, which it then does
    when it is made a second time, FLOPs are 0, and on a CPU the process's memory stands for what was alive.

    Args:
        call: that computes, and waits for its device.
        device: that it computes on.
        dtype: that it computes in.
        samples: that it computes from.
        counted: whether FLOPs are: a call of many small operators is half as fast then.

    Returns:
        What it took.
    """
    try:
        with _recorded(counted) as threads:
            seconds, on_gpu = _timed(call, device)
    except Exception as error:
        if not any(TAKEN in str(each) for each in _causes(error)):
            raise
    else:
        read = [_read(events, dtype.itemsize) for events in threads]
        flops = sum(count for count, _ in read)
        return Metered(seconds, flops, _peak([changes for _, changes in read]) if on_gpu is None else on_gpu)
    with _resident() as seen:
        seconds, on_gpu = _timed(call, device)
    return Metered(seconds, 0, max([*seen, samples * LEAST_BYTES]) if on_gpu is None else on_gpu)


@contextmanager
def _recorded(counted: bool) -> Iterator[list[Any]]:
    """Record what is allocated and freed, and on demand operators and the shapes they are given.

    torch's old profiler does: it starts in microseconds, and gives its results in a third of the time that the new one
    needs, whose Kineto writes to stderr besides.

    Args:
        counted: whether operators are recorded.

    Yields:
        The events of each thread, once all is over.
    """
    threads: list[Any] = []
    _enable_profiler_legacy(
        ProfilerConfig(ProfilerState.CPU, counted, True, False, False, False, _ExperimentalConfig())
    )
    _enable_record_function(counted)
    try:
        with _quiet():
            yield threads
    finally:
        _enable_record_function(True)  # as torch has it
        threads += _disable_profiler_legacy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's allocator from warning that memory is freed which was there before: it is, and is not counted."""
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(str(_C10)), "FLAGS_caffe2_log_level")
    except (OSError, ValueError):  # built otherwise: it warns
        yield
        return
    before, level.value = level.value, ERRORS
    try:
        yield
    finally:
        level.value = before


def _timed(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Return the seconds of a call, and on a GPU its peak.

    Args:
        call: to be timed.
        device: that it computes on.

    Returns:
        Seconds; and bytes as the allocator counts them: on a GPU autograd computes, and frees, on a thread of its own,
        and the profiler is not told of all that it frees.
    """
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    if device.type != "cuda":
        return seconds, None
    return seconds, torch.cuda.max_memory_allocated(device) - min(before, torch.cuda.memory_allocated(device))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _resident() -> Iterator[list[int]]:
    """Watch this process's resident memory.

    Yields:
        Once all is over, by how much its peak was more than it had in the beginning; empty where the system keeps none.
    """
    seen: list[int] = []
    try:
        _CLEAR_PEAK.write_text("5")  # of VmHWM; Linux alone
        before = _status("VmRSS")
    except OSError:
        yield seen
        return
    yield seen
    seen.append(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith(field))


def _read(events: Sequence[Any], itemsize: int) -> tuple[int, list[tuple[Any, int]]]:
    """Read what was recorded on a thread.

    An operator under vmap or autograd calls itself, or others, for each level of them, and a kernel may call more:
    those that call none that is counted are counted.

    Args:
        events: in the order of time.
        itemsize: bytes of an element.

    Returns:
        FLOPs; and bytes allocated, or freed, with the event that says when.
    """
    flops, alive = 0, 0
    changes: list[tuple[Any, int]] = []
    begun: dict[int, tuple[Any, int, int]] = {}
    for event in events:
        kind = event.kind()
        if kind == "memory_alloc":
            changes.append((event, event.cpu_memory_usage()))
            alive += event.cpu_memory_usage() + event.cuda_memory_usage()
        elif kind == "push" and event.name() in _FLOPS:
            begun[event.handle()] = event, flops, alive
        elif kind == "pop" and (found := begun.pop(event.handle(), None)):
            start, flops_before, alive_before = found
            if flops == flops_before:  # nothing inside it was counted
                with suppress(IndexError, ValueError):  # shapes are not recorded of every kind of tensor
                    flops += _FLOPS[start.name()](start.shapes(), (alive - alive_before) // itemsize)
    return flops, changes


def _peak(threads: Sequence[list[tuple[Any, int]]]) -> int:
    """Return the most bytes that were alive at once, of what threads allocated and freed."""
    origin = next((event for changes in threads for event, _ in changes), None)
    changes = merge(*threads, key=lambda change: 0.0 if origin is None else origin.cpu_elapsed_us(change[0]))
    alive = list(accumulate(chain([0], (size for _, size in changes))))
    return max(alive) - min(alive[-1], 0)  # less than in the beginning: garbage of before was collected meanwhile


_Shapes = Sequence[Sequence[int]]


def _product(shapes: _Shapes, _: int) -> int:
    """Count a matrix product, or a batch of them."""
    a, b = shapes[:2]
    return 2 * prod(a) * b[-1]


def _sum_of_product(shapes: _Shapes, _: int) -> int:
    """Count a product that is added to something."""
    return _product(shapes[1:], _)


def _convolution(shapes: _Shapes, made: int) -> int:
    """Count a convolution: each entry of what has the weight's first channels, the output, meets a slice of the weight.

    The input has, where it is transposed. No more is recorded of that than the shapes of what it is given; where they
    leave it open, the smaller is it, strides being larger than one.

    Args:
        shapes: of input and weight.
        made: elements of the output.

    Returns:
        FLOPs.
    """
    x, weight = shapes[:2]
    entries = min(prod(x), made * weight[0] // max(weight[1], 1)) if x[1] == weight[0] else made
    return 2 * entries * prod(weight[1:])


def _convolution_backward(shapes: _Shapes, made: int) -> int:
    """Count the gradients of a convolution, each like the convolution: of input, weight or both, by what was made."""
    output, x, weight = shapes[:3]
    entries = min((prod(each) for each in (output, x) if each[1] == weight[0]), default=0)
    return 2 * entries * prod(weight[1:]) * (2 if made >= prod(x) + prod(weight) else 1)


_FLOPS: dict[str, Callable[[_Shapes, int], int]] = {
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::addmm": _sum_of_product,
    "aten::baddbmm": _sum_of_product,
    "aten::_convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
}
