"""Wrappers, parametrisations, odd parameters, and what a model may give."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from zoo import Attention, Tied, TwoInputs, Wrapper, tanh_net

from hazards.base import Fn, add, between, classifier, labels, normal, supervised, twinned
from hazards.layers import tanh
from hazards.tokens import TOKENS


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


def symmetric():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def pruned():
    layer = nn.Linear(5, 4)
    prune.l1_unstructured(layer, "weight", amount=0.4)
    return layer


def two_paths():
    layer = nn.Linear(4, 4)
    return Fn(lambda m, x: m.b.inner(torch.tanh(m.a(m.net(x)))), net=nn.Linear(5, 4), a=layer, b=Fn(None, inner=layer))


def transposed_tie():
    net = nn.Linear(5, 3)
    return Fn(lambda m, x: F.linear(torch.tanh(m.net(x)), m.net.weight.T), net=net)


def lora(m, x):
    return m.base(x) + x @ m.down @ m.up


def checkpointed(reentrant):
    return Fn(
        lambda m, x: checkpoint(m.inner, m.net(x), use_reentrant=reentrant),
        net=nn.Linear(5, 4),
        inner=nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    )


def detached_by_hook(layer):
    layer.register_forward_hook(lambda _m, _i, out: out.detach() * 1.0 + 0 * out)
    return layer


def computed_in_a_hook():
    """A model whose weight is a buffer computed from its parameter in a hook before forward."""
    model = Fn(lambda m, x: torch.tanh(x @ m.computed), source=nn.Parameter(normal(5, 4)))
    model.register_forward_pre_hook(lambda m, _: object.__setattr__(m, "computed", m.source.sinh()))
    return model


def odd_parameters():
    net = nn.Linear(5, 4)
    return Fn(
        lambda m, x: torch.tanh(m.net(x)) * m.gain + sum(m.more) + m.by_name["shift"],
        net=net,
        gain=nn.Parameter(torch.tensor(1.5)),
        empty=nn.Parameter(torch.zeros(0, 3)),
        unused=nn.Parameter(torch.ones(2)),
        more=nn.ParameterList([normal(4), normal(4, seed=3)]),
        by_name=nn.ParameterDict({"shift": normal(1)}),
    )


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)))


def traced():
    return torch.jit.trace(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)), normal(7, 5))


def aliased():
    """A parameter that holds a view of another."""
    net = nn.Linear(5, 4)
    alias = nn.Parameter(net.weight.data[:2])
    return Fn(lambda m, x: torch.tanh(m.net(x)) + x[:, :4] @ m.alias[:, :4].mT.repeat(1, 2), net=net, alias=alias)


def half_double(second=lambda m, x: m.b(m.a(x.float()).double()).to(x), dtype=torch.float64):
    return Fn(lambda m, x: torch.tanh(second(m, x)), a=nn.Linear(5, 4), b=nn.Linear(4, 4).to(dtype))


def with_table(keep):
    model = Fn(lambda m, x: torch.tanh(m.net(x) @ m.table), net=nn.Linear(5, 4))
    keep(model, "table", normal(4, 4))
    return model


def classified(body):
    return classifier(nn.Sequential(body, nn.Tanh()), normal(7, 5))


def with_twin(body, twin):
    return twinned(classified(body)[0], classified(twin)[0], *classified(body)[1:])


WEIGHT_NORM = r"body\.0|weight_norm"
P_NAMED = r"`\w[\w.]*`"
WRAPPED = {
    "weight norm old style": (lambda: nn.utils.weight_norm(nn.Linear(5, 4)), WEIGHT_NORM),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(5, 4)), WEIGHT_NORM),
    "spectral norm old style train": (lambda: nn.utils.spectral_norm(nn.Linear(5, 4)), r"body\.0|weight|spectral"),
    "spectral norm old style eval": (
        lambda: nn.utils.spectral_norm(nn.Linear(5, 4)).eval(),
        r"body\.0|weight|spectral",
    ),
    "spectral norm train": (lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), r"body\.0|weight|[Ss]pectral"),
    "spectral norm eval": (
        lambda: parametrizations.spectral_norm(nn.Linear(5, 4)).eval(),
        r"body\.0|weight|[Ss]pectral",
    ),
    "orthogonal matrix_exp": (lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp"), ""),
    "orthogonal cayley": (lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), ""),
    "orthogonal householder": (lambda: parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="householder"), ""),
    "pruned": (pruned, ""),
    "symmetric": (symmetric, ""),
    "layer reachable by two paths": (two_paths, ""),
    "weight tied to its transpose": (transposed_tie, ""),
    "low-rank adapter on a frozen layer": (
        lambda: Fn(
            lora,
            base=nn.Linear(5, 4).requires_grad_(False),
            down=nn.Parameter(normal(5, 2)),
            up=nn.Parameter(normal(2, 4)),
        ),
        "",
    ),
    "low-rank adapter, zero up": (
        lambda: Fn(lora, base=nn.Linear(5, 4), down=nn.Parameter(normal(5, 2)), up=nn.Parameter(torch.zeros(2, 4))),
        "",
    ),
    "odd parameters": (odd_parameters, ""),
    "weight frozen, bias not": (lambda: frozen(nn.Linear(5, 4), "weight"), ""),
    "checkpoint": (lambda: checkpointed(False), r"checkpoint"),
    "checkpoint reentrant": (lambda: checkpointed(True), r"[Cc]heckpoint"),
    "scripted": (scripted, ""),
    "traced": (traced, ""),
    "parameter through .data": (
        lambda: Fn(lambda m, x: m.net(x) * m.gain.data, net=nn.Linear(5, 4), gain=nn.Parameter(normal(4))),
        r"gain",
    ),
    "parameter through .detach()": (
        lambda: Fn(lambda m, x: m.net(x) + F.linear(x, m.net.weight.detach()), net=nn.Linear(5, 4)),
        r"net\.weight",
    ),
    "parameter through .item()": (
        lambda: Fn(lambda m, x: m.net(x) * m.gain.item(), net=nn.Linear(5, 4), gain=nn.Parameter(torch.tensor(0.7))),
        r"gain",
    ),
    "parameter through NumPy": (
        lambda: Fn(
            lambda m, x: m.net(x) + torch.from_numpy(m.shift.detach().cpu().numpy()).to(x),
            net=nn.Linear(5, 4),
            shift=nn.Parameter(normal(4)),
        ),
        r"shift",
    ),
    "parameter through state_dict()": (
        lambda: Fn(lambda m, x: F.linear(x, m.net.state_dict()["weight"]) + m.net(x), net=nn.Linear(5, 4)),
        r"net\.weight",
    ),
    "hook that detaches": (lambda: nn.Sequential(nn.Linear(5, 4), detached_by_hook(nn.Linear(4, 4))), P_NAMED),
    "weight computed in a hook": (computed_in_a_hook, ""),
    "parameter that is a view of another": (aliased, r"alias|net\.weight"),
    "buffer not persistent": (lambda: with_table(partial(nn.Module.register_buffer, persistent=False)), ""),
}


for name_, (body_, culprit_) in WRAPPED.items():
    width_ = 4 if name_.startswith(("orthogonal", "symmetric")) else 5
    add(name_, lambda body=body_, d=width_: classifier(nn.Sequential(body(), nn.Tanh()), normal(7, d)), culprit_)

add(
    "two floating types",
    lambda: with_twin(half_double(), half_double(lambda m, x: m.b(m.a(x)), torch.float32)),
    r"body|float|dtype|a\.weight|b\.weight",
)
add(
    "plain tensor attribute",
    lambda: with_twin(with_table(object.__setattr__), with_table(nn.Module.register_buffer)),
    r"dtype|float|Float|Double",
)
add("shared layer", lambda: (lambda layer: between(tanh(), layer, tanh(), layer))(nn.Linear(4, 4)))
add("tied embedding", lambda: supervised(Tied(), nn.CrossEntropyLoss(), TOKENS, labels(4, 3, classes=6)))
add(
    "wrapper with unused and empty",
    lambda: supervised(Wrapper(tanh_net()), nn.CrossEntropyLoss(), normal(7, 5), labels(7)),
)
add("attention with layer norm", lambda: supervised(Attention(), nn.CrossEntropyLoss(), normal(5, 3, 4), labels(5)))
add(
    "two inputs by keyword",
    lambda: supervised(TwoInputs(), nn.CrossEntropyLoss(), {"b": normal(6, 2), "a": normal(6, 3)}, labels(6)),
)
add(
    "all but a bias frozen",
    lambda: supervised(
        frozen(tanh_net(), "0.weight", "0.bias", "2.weight", "4.weight", "4.bias"),
        nn.CrossEntropyLoss(),
        normal(7, 5),
        labels(7),
    ),
)
add(
    "double model, float data",
    lambda: supervised(tanh_net().double(), nn.CrossEntropyLoss(), normal(7, 5).double(), labels(7)),
)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


def with_output(kind):
    net = Fn(
        lambda m, x: (lambda h: kind(logits=m.head(h), hidden=h))(torch.tanh(m.net(x))),
        net=nn.Linear(5, 4),
        head=nn.Linear(4, 3),
    )
    read = (lambda out: out["logits"]) if kind is dict else (lambda out: out.logits)
    return supervised(net, lambda out, y: F.cross_entropy(read(out), y), normal(7, 5), labels(7))


add("output as a dict", lambda: with_output(dict))
add("output as a dataclass", lambda: with_output(Output))
