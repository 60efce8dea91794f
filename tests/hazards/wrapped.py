"""Models that are wrapped, compiled, scripted or read late; their twin is what is inside."""

import copy
import functools
import io
import os
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, labels, normal, supervised, twinned

add = adding("wrapped modules")
X, Y = normal(7, 4), labels(7)
eager = functools.partial(torch.compile, backend="eager")


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


class Gated(nn.Module):
    """A model with a branch that scripting keeps."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        if x.shape[1] > 3:
            h = h * torch.sigmoid(h)
        return self.b(h)


class CompiledForward(Gated):
    """Whose forward is compiled in the class."""

    @eager
    def forward(self, x):
        return super().forward(x)


def wrapped(wrap, inner=net, **options):
    """`wrap` of a model; judged is the model."""
    torch.compiler.reset()  # else what was compiled before counts against how often a function may be
    model = inner()
    twin = copy.deepcopy(model)
    return twinned(wrap(model), twin, *supervised(model, nn.CrossEntropyLoss(), X, Y, **options)[1:])


def loaded(model):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def distributed(model):
    """In a group of one process, which is made once."""
    if not torch.distributed.is_initialized():
        file = os.path.join(tempfile.mkdtemp(), "group")
        torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def inside(wrap, **parts):
    """Of a larger model one part is wrapped."""
    return lambda model: Fn(lambda m, x: m.after(m.inner(x)), inner=wrap(model), after=nn.Identity())


def forward_replaced(model):
    model.forward = eager(model.forward)
    return model


def compiled_loss():
    torch.compiler.reset()
    model, loss = net(), lambda o, y: F.cross_entropy(o.sin(), y)
    return model, lambda m, b: loss(m(b[0]), b[1]), (X, Y), {"loss": eager(loss), "data": (X, Y)}


def scripted_loss(o, y):
    return torch.nn.functional.cross_entropy(o * o, y)


def frozen_script(model):
    return torch.jit.freeze(torch.jit.script(model.eval()))


parallel = nn.DataParallel
WRAPPERS = {
    "scripted": torch.jit.script,
    "traced": lambda m: torch.jit.trace(m, X),
    "loaded": loaded,
    "DataParallel": parallel,
    "DistributedDataParallel": distributed,
    "compiled": eager,
    "compiled for aot": functools.partial(torch.compile, backend="aot_eager"),
    "compiled by default": torch.compile,
    "DataParallel of compiled": lambda m: parallel(eager(m)),
    "compiled DataParallel": lambda m: eager(parallel(m)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "symbolically traced": torch.fx.symbolic_trace,
    "exported": lambda m: torch.export.export(m, (X,), dynamic_shapes=({0: torch.export.Dim("n")},)).module(),
    "a scripted part": inside(torch.jit.script),
    "a compiled part": inside(eager),
    "a DataParallel part": inside(parallel),
    "forward compiled in place": forward_replaced,
}
for name_, wrap_ in WRAPPERS.items():
    inner_ = net if "trac" in name_ else Gated
    add(f"wrapped: {name_}", lambda wrap=wrap_, inner=inner_: wrapped(wrap, inner))
add("wrapped: forward compiled in the class", lambda: wrapped(lambda m: m, CompiledForward))
add("wrapped: some parameters by their inner names", lambda: wrapped(parallel, Gated, params=("*a.*", "!*a.bias")))
add(
    "wrapped: a script without parameters",
    lambda: supervised(frozen_script(net()), nn.CrossEntropyLoss(), X, Y),
    r"no parameters|frozen|freeze",
)
add("wrapped: compiled loss", compiled_loss)
add("wrapped: scripted loss", lambda: supervised(net(), torch.jit.script(scripted_loss), X, Y))
