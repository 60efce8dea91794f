"""A CUDA device that is not there: tensors that say they are on cuda:0, and compute on the CPU.

    with pretended_cuda() as device:
        compute_hessian(problem, executor="serial", gpus_per_worker=1)
    device.seen  # what would have made a GPU wait, by kind, operation and line of the product

Below Python, torch sees device meta, whose guards every build has; Python sees cuda:0. Operations that mix devices
raise as CUDA does, NumPy and addresses of device tensors are refused, and these kinds of events are noted:

    stop          the host waits for the device: a number, a size or a mask is read, or everything is synchronised
    to host       a copy that blocks; "to host later" one into pinned memory, made as late as the program allows
    to device     a copy from the host
    host index    indices from the host, each a copy of its own
    host scalar   a zero-dimensional tensor of the host among those of the device
    atomic        sums whose order on CUDA is open

It does not see the numbers of CUDA's kernels, its allocator's fragments, nor what a driver does.
"""

import contextlib
from unittest import mock

import torch
from pretended_streams import DEVICE, RaceError, Stream, replacements
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from pipeline.problem.problem import PlacedProblem

__all__ = ["DEVICE", "MixedDevicesError", "Pretended", "RaceError", "pretended_cuda"]

aten = torch.ops.aten
CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
STOPS = {
    "_local_scalar_dense": "number",
    "nonzero": "nonzero",
    "equal": "equal",
    "masked_select": "mask",
    "is_nonzero": "number",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "repeat_interleave": "repeats",
}
ATOMIC = {
    "index_add",
    "scatter_add",
    "scatter_reduce",
    "put",
    "histc",
    "cumsum",
    "embedding_dense_backward",
    "_embedding_bag_dense_backward",
    "_adaptive_avg_pool2d_backward",
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward",
    "avg_pool3d_backward",
    "grid_sampler_2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_nearest2d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "replication_pad1d_backward",
    "replication_pad2d_backward",
    "_ctc_loss_backward",
    "nll_loss2d_backward",
    "_cdist_backward",
}
INDEXED = {"index", "index_put", "_unsafe_index", "_index_put_impl", "_unsafe_index_put"}
# What takes no zero-dimensional tensor of the host.
STRICT = {"mm", "bmm", "addmm", "index_add", "scatter", "gather", "cat", "stack", "index_select", "dot", "mv"}


class MixedDevicesError(RuntimeError):
    """As torch says it."""


class Pretended(torch.Tensor):
    """A tensor on the device.

    Args:
        inner: the one that computes.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        about = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), layout=inner.layout, device="meta", **about)

    def __init__(self, inner):
        self.inner = inner
        if inner.layout == torch.strided:
            DEVICE.hold(self, inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return performed(func, args, kwargs or {})

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_meta = is_cpu = property(lambda _: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.inner = value.inner

    def get_device(self):
        return 0

    def cpu(self, *_, **__):
        return aten._to_copy.default(self, device=CPU)

    def cuda(self, *_, **__):
        return self

    def tolist(self):
        DEVICE.note("stop", "numbers")
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host first"
        )

    __array__ = numpy

    def data_ptr(self):
        raise RuntimeError("the address of a tensor on the device")

    def __repr__(self, *_, **__):
        return f"Pretended({tuple(self.shape)}, {self.dtype})"


def performed(func, args, kwargs):
    """Perform an operation as the device would, or as the host would where it is all of the host's."""
    flat = _flat((*args, *kwargs.values()))
    if not any(isinstance(x, Pretended) for x in flat) and not _is_device(kwargs.get("device")):
        return func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if name == "_to_copy":
        return _copied(args[0], **kwargs)
    if name == "copy_":
        return _copied_into(func, *args, **kwargs)
    if name in STOPS:
        DEVICE.note("stop", STOPS[name])
    if (base := name.removesuffix("_")) in ATOMIC:
        DEVICE.note("atomic", name)
    if base in INDEXED:
        args = _placed_indices(func, name, args)
    elif not name.startswith("new_") and not name.endswith("_like"):
        _require_one_device(func, name, flat)
    return _wrapped(func, args, kwargs, _called(func, name, args, kwargs))


def _called(func, name, args, kwargs):
    """Call an operation on what computes."""
    inner = tuple(map(_inner, args))
    options = {key: _inner(value) for key, value in kwargs.items()}
    options |= {"device": CPU} if "device" in options else {}
    if "pin_memory" in options:
        options["pin_memory"] = False
    if name == "_efficientzerotensor":  # has no memory behind it, which torch treats above what is seen here
        func = aten.zeros.default
    return func(*inner, **options)


_FRESH = {}  # whether what an operation gives shares no memory with what it takes


def _wrapped(func, args, kwargs, result):
    """Return a result as one on the device."""
    out = _mapped(lambda x: x if isinstance(x, Pretended) else Pretended(x), result)
    if func not in _FRESH:
        _FRESH[func] = not any(a.alias_info is not None for a in (*func._schema.arguments, *func._schema.returns))
    is_written = _FRESH[func] or func._schema.is_mutable
    for x in _flat([result]) if is_written else ():
        if isinstance(x, torch.Tensor) and x.layout == torch.strided:
            DEVICE.wrote(x)
    if _FRESH[func] or not isinstance(out, torch.Tensor | list | tuple):
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _placed_indices(func, name, args):
    """Take indices from the host, as CUDA does, one by one; and masks, which are counted first."""
    indices = [i for i in args[1] if i is not None]
    for index in indices:
        if not isinstance(index, Pretended):
            DEVICE.note("host index", name)
        if index.dtype in {torch.bool, torch.uint8}:
            DEVICE.note("stop", "mask")
    values = [v for v in args[2:3] if isinstance(v, torch.Tensor) and v.ndim and not isinstance(v, Pretended)]
    if not isinstance(args[0], Pretended) or values:
        _refuse(func, [args[0], *indices, *values])
    return args[0], [i if i is None or isinstance(i, Pretended) else Pretended(i) for i in args[1]], *args[2:]


def _require_one_device(func, name, flat):
    """Refuse tensors of the host, but for numbers where kernels take them."""
    for x in flat:
        if isinstance(x, torch.Tensor) and not isinstance(x, Pretended):
            if x.ndim or name.removesuffix("_") in STRICT:
                _refuse(func, flat)
            DEVICE.note("host scalar", name)


def _refuse(func, flat):
    seen = [f"{x.device}{tuple(x.shape)}" for x in flat if isinstance(x, torch.Tensor)]
    raise MixedDevicesError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"({func}: {', '.join(seen)})"
    )


def _copied(x, *, device=None, non_blocking=False, pin_memory=False, **kind):
    """Copy a tensor into another type, or to another device."""
    stays = _is_device(device) if device is not None else isinstance(x, Pretended)
    inner = aten._to_copy.default(_inner(x), **kind)
    if not stays:
        DEVICE.note("to host", "to")
        return inner
    if not isinstance(x, Pretended):
        DEVICE.note("to device", "to")
    DEVICE.wrote(inner) if inner.layout == torch.strided else None
    return Pretended(inner)


def _copied_into(func, into, source, non_blocking=False):
    """Copy a tensor into one that is there."""
    if isinstance(into, Pretended):
        if not isinstance(source, Pretended):
            DEVICE.note("to device", "copy_")
        func(into.inner, _inner(source))
        DEVICE.wrote(into.inner)
        return into
    DEVICE.require_waited(source.inner)
    if not (non_blocking and DEVICE.is_pinned(into)):
        DEVICE.note("to host", "copy_")
        Stream.current.run()
        return func(into, source.inner)
    DEVICE.note("to host later", "copy_")
    if into.is_floating_point():
        into.fill_(torch.nan)
    DEVICE.copy_later(lambda: into.copy_(source.inner))
    return into


def _is_device(device):
    return device is not None and torch.device(device).type in {"cuda", "meta"}


def _flat(values):
    """Return tensors and values, of lists too: arguments of operations are nested one deep."""
    return [x for value in values for x in (value if isinstance(value, list | tuple) else (value,))]


def _mapped(function, value):
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, x) for x in value])
    return function(value) if isinstance(value, torch.Tensor) else value


def _inner(value):
    return _mapped(lambda x: x.inner if isinstance(x, Pretended) else x, value)


class _Made(TorchDispatchMode):
    """Takes what is made on the device; all else on it comes by its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return performed(func, args, kwargs or {})


class _Named(torch.overrides.TorchFunctionMode):
    """Has torch see device meta where the product says cuda, and keeps what is pinned."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in {torch.Tensor.device.__get__, torch.device}:
            return func(*args, **kwargs)
        if func is torch.Tensor.is_pinned:
            return DEVICE.is_pinned(args[0])
        args = tuple(_renamed(a) if isinstance(a, torch.device | str) else a for a in args)
        if "device" in kwargs:
            kwargs["device"] = _renamed(kwargs["device"])
        if func is torch.Tensor.pin_memory or kwargs.pop("pin_memory", False):
            return DEVICE.pin(args[0].clone() if func is torch.Tensor.pin_memory else func(*args, **kwargs))
        return _made_of_numbers(func, args, kwargs) if func in _OF_NUMBERS else func(*args, **kwargs)


_OF_NUMBERS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}


def _made_of_numbers(func, args, kwargs):
    """Make a tensor on the host, and copy it where it is wanted: torch does both where no mode sees it."""
    if func is torch.Tensor.new_tensor:
        device, kind = kwargs.get("device", args[0].device), kwargs.get("dtype", args[0].dtype)
        made = torch.tensor(args[1], dtype=kind)
    else:
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs)
    return aten._to_copy.default(made, device=META) if _is_device(device) and made.device.type == "cpu" else made


def _renamed(device):
    if isinstance(device, str):
        return META if device in {"cuda", "cuda:0"} else device
    return META if isinstance(device, torch.device) and device.type == "cuda" else device


@contextlib.contextmanager
def _own_parameters(placed):
    """As `PlacedProblem.own_parameters`, by replacing modules' entries: no wrapper becomes a tensor's data."""
    if placed.device.type != "cuda":
        with _ORIGINAL(placed) as own:
            yield own
        return
    model, values = placed.problem.model, {**placed.constants, **placed.parameters}
    named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    names = {id(t): name for name, t in [*named.items(), *buffers.items()]}
    new = {name: values[name].clone() for name in buffers}
    new |= {n: nn.Parameter(values[n].detach(), requires_grad=n in placed.parameters) for n in named}
    tables = [table for m in model.modules() for table in (m._parameters, m._buffers)]
    places = [(table, key, t) for table in tables for key, t in table.items() if t is not None]
    try:
        for table, key, t in places:
            table[key] = new[names[id(t)]]
        with placed._evaluated():
            yield {name: new[name] for name in placed.parameters}
    finally:
        for table, key, t in places:
            table[key] = t


_ORIGINAL = PlacedProblem.own_parameters


@contextlib.contextmanager
def pretended_cuda(total=80 * 10**9):
    """Pretend that there is a device with so many bytes of memory; yields what it sees."""
    DEVICE.start(total)
    with contextlib.ExitStack() as stack:
        for name, value in replacements().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(PlacedProblem, "own_parameters", _own_parameters))
        stack.enter_context(_Made())
        stack.enter_context(_Named())
        yield DEVICE
