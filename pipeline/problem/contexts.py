"""What is set around every evaluation, and put back: exact kernels, and the user's model as it was."""

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.problem.batches import digest
from pipeline.problem.kept import Kept

COPIED = 10**6  # elements of a tensor that a model holds unregistered: it may be written into


def applied_contexts(model: nn.Module, device: torch.device) -> list[str]:
    """Name what `exact_kernels` sets for a model on a device."""
    names = ["math attention"]
    if device.type == "cuda":
        names += ["TF32 off", *(["cuDNN off"] if _is_recurrent(model) else [])]
    return names


@contextmanager
def exact_kernels(model: nn.Module) -> Iterator[None]:
    """Choose kernels that have right second derivatives and full precision.

    The fused attention kernels and layers have no double backward, nor have cuDNN's recurrent ones; TF32 leaves 1e-3 of
    relative noise. Operations of a loss are written out in `Problem`.

    Args:
        model: what is going to be evaluated.

    Yields:
        Nothing; the settings are put back at the end.
    """
    matmul, cudnn, mha = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mha
    saved, fast_path = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.enabled), mha.get_fastpath_enabled()
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        cudnn.enabled = cudnn.enabled and not _is_recurrent(model)
        mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), _eager():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.enabled = saved
        mha.set_fastpath_enabled(fast_path)


def is_deterministic(*, asked: bool) -> bool:
    """Whether sums keep a fixed order: where a run asks for it, or torch is set so around it."""
    return asked or torch.are_deterministic_algorithms_enabled()


@contextmanager
def ordered_sums(*, deterministic: bool) -> Iterator[None]:
    """Have kernels add in a fixed order, where torch has such; operations that it has none for raise.

    On CUDA, additions at indices, at tokens and in backward passes of poolings are atomic otherwise, and last bits
    differ from run to run. cuBLAS keeps the order where CUBLAS_WORKSPACE_CONFIG is `:4096:8`, which torch asks for.

    Args:
        deterministic: whether to; torch stays as it is otherwise.

    Yields:
        Nothing; the settings are put back at the end.
    """
    filling: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    try:
        if deterministic:
            torch.use_deterministic_algorithms(True)
            filling.fill_uninitialized_memory = False  # work space is written before it is read
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        filling.fill_uninitialized_memory = fill


@contextmanager
def _eager() -> Iterator[None]:
    """Have what was compiled, or is meanwhile, run as it is written: torch.compile knows no second derivative."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    before = torch.compile  # where nothing was compiled yet; what it is made of takes seconds to load
    try:
        torch.compile = _as_written
        yield
    finally:
        torch.compile = before


def _as_written(model: Any = None, **_: Any) -> Any:
    """Take the place of torch.compile, as a function and as a decorator."""
    return model if model is not None else lambda function: function


def _is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


@contextmanager
def differentiable() -> Iterator[None]:
    """Let autograd work, in the run's type, whatever is on around the call.

    That may be `no_grad`, `inference_mode`, autocast, or hooks on saved tensors, which torch.func does not bear.

    Yields:
        Nothing; all is put back at the end.
    """
    with ExitStack() as stack:
        autograd: Any = torch._C._autograd
        while (hooks := autograd._top_saved_tensors_default_hooks(True)) is not None:
            autograd._pop_saved_tensors_default_hooks()
            stack.callback(autograd._push_saved_tensors_default_hooks, *hooks)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Leave models, and the random state, bit for bit as they are, whatever happens inside."""
    everything = nn.ModuleList(models)
    modules = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in everything.modules()]
    kept = Kept(*models)
    grads = [(p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in everything.parameters()]
    buffers = [(b, b.detach().clone()) for b in everything.buffers()]
    plain = _plain(everything, kept)
    state = random_state()
    try:
        yield
    finally:
        kept.put_back()
        for module, parameters, own_buffers, training in modules:  # of all, scripted and lazy ones and large models too
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, own_buffers)
            if module.training != training:
                module.training = training
        for parameter, flag, grad, value in grads:
            parameter.requires_grad_(flag)
            if parameter.grad is not grad:
                with suppress(RuntimeError):  # in another type meanwhile: whoever put that there puts back the grad too
                    parameter.grad = grad
            if grad is not None and value is not None:
                grad.detach().copy_(value)
        for buffer, value in buffers:
            if digest(buffer) != digest(value):
                buffer.detach().copy_(value)
        for tensor, value, version in plain:
            if tensor._version != version:
                tensor.detach().copy_(value)
        _set_random_state(state)


def _plain(model: nn.Module, kept: Kept) -> list[tuple[Tensor, Tensor, int]]:
    """Copy the tensors that a model holds unregistered, as far as they are small, with the number of their writes."""
    registered = set(map(id, [*model.parameters(), *model.buffers()]))
    tensors = [t for key, t in kept.tensors.items() if key not in registered and t.numel() <= COPIED]
    return [(t, t.detach().clone(), t._version) for t in tensors if not t.is_inference()]


@contextmanager
def on_copies(model: nn.Module, *beside: nn.Module) -> Iterator[None]:
    """Evaluate a model as it is, on copies of its weights: a forward pass may write into them (`max_norm`)."""
    saved = [(p, p.data) for p in model.parameters()]
    try:
        with unchanged(model, *beside), torch.enable_grad(), _eager():
            for p, data in saved:
                p.data = data.clone()
            yield
    finally:
        for p, data in saved:
            p.data = data


def _put_back(place: Any, values: dict[str, Any]) -> None:
    """Put back entries that were replaced; scripted modules hold theirs in no dict."""
    for name, value in values.items():
        if name not in place or place[name] is not value:
            place[name] = value


def random_state() -> dict[str, Any]:
    """Return the state of the generators a model may draw from: torch's, CUDA's, NumPy's and Python's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}


def random_digest() -> str:
    """Return a hash of that state."""
    state = random_state()
    tensors = b"".join(part.numpy().tobytes() for part in (state["torch"], *state["cuda"]))
    _, keys, *place = state["numpy"]
    # Their numbers as leaves of a pytree would take milliseconds, at each call of a module.
    return hashlib.sha256(tensors + keys.tobytes() + repr((place, state["python"])).encode()).hexdigest()


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
