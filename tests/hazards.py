"""Ingredients of models and losses, each small, each of them known or suspected to spoil second derivatives somewhere.

No verdict is written down here: `derive.truth` finds it from the model and `whole_loss` alone.
"""

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from derive import duplicate
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from zoo import Attention, Tied, TwoInputs, Wrapper, heat_objective, tanh_net

from pipeline import Problem


@dataclass(frozen=True)
class Hazard:
    """A problem, and the loss over all its data in one batch, written a second time in plain torch.

    `culprit` is what the message of a refusal must match. `problem` is made on first use: that may refuse already.
    """

    name: str
    model: nn.Module
    whole_loss: Callable[[nn.Module, Any], Tensor]
    whole_batch: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    culprit: str = ""

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.model, **self.arguments)


HAZARDS: dict[str, Callable[[], Hazard]] = {}


def add(name, make, culprit=""):
    """Register `make() -> (model, whole_loss, whole_batch, arguments)`."""
    assert name not in HAZARDS, name

    @functools.wraps(make)
    def build():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return Hazard(name, *make(), culprit=culprit)

    HAZARDS[name] = build


class Fn(nn.Module):
    """A function of itself and its inputs, with modules, parameters and buffers by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def like(loss, out):
    """Give a loss module whose own tensors are of the output's type, on its device."""
    return copy.deepcopy(loss).to(out) if isinstance(loss, nn.Module) and isinstance(out, Tensor) else loss


def supervised(model, loss, x, y, **options):
    def whole(m, batch):
        out = call(m, batch[0])
        return like(loss, out)(out, batch[1])

    return model, whole, (x, y), {"loss": loss, "data": (x, y), **options}


def objective(model, function, batch, **options):
    """Of a `function(call, batch) -> (sum, weight)`."""

    def whole(m, b):
        total, weight = function(m, b)
        return total / weight

    return model, whole, batch, {"data": batch, "objective": function, **options}


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape, classes=3, seed=2):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def shaken(model, size=0.3):
    """Move every parameter: ones and zeros hide errors."""
    for p in model.parameters():
        p.data += size * torch.randn(p.shape).to(p)
    return model


def classifier(body, x, **options):
    """Body, flattened, a linear head, cross-entropy."""
    with torch.no_grad(), torch.random.fork_rng():
        # Probed on a copy: a batch norm's statistics are to be those of the ingredient alone.
        features = call(duplicate(body), x).flatten(1).shape[1]
    n = len(x[0] if isinstance(x, tuple) else x)
    head = nn.Sequential(nn.Flatten(), nn.Linear(features, 3))
    model = Fn(lambda m, *inputs: m.head(m.body(*inputs)), body=body, head=head)
    return supervised(model, nn.CrossEntropyLoss(), x, labels(n), **options)


def between(*layers, x=None, **options):
    """Linear(5, 4), the layers, a head."""
    return classifier(nn.Sequential(nn.Linear(5, 4), *layers), normal(7, 5) if x is None else x, **options)


# --- layers: a body and the shape of its input -----------------------------------------------------------------------

tanh = nn.Tanh
LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), tanh()), (7, 5)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), tanh()), (7, 5)),
    "bilinear": (lambda: Fn(lambda m, x: m.net(x, x), net=nn.Bilinear(3, 3, 4)), (7, 3)),
    "identity": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Identity(), tanh()), (7, 5)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), tanh(), nn.AvgPool1d(2)), (4, 2, 6)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), tanh()), (4, 1, 6, 6)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), tanh(), nn.AdaptiveAvgPool3d(1)), (3, 1, 3, 3, 3)),
    "conv dilated same": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3, dilation=2, padding="same"), tanh()), (4, 1, 6)),
    "conv circular": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), tanh()),
        (3, 1, 3, 3),
    ),
    "conv reflect": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"), tanh()), (4, 1, 5)),
    "conv replicate": (
        lambda: nn.Sequential(nn.Conv1d(1, 2, 3, padding=1, padding_mode="replicate"), tanh()),
        (4, 1, 5),
    ),
    "conv depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 3, 2, groups=3), tanh(), nn.Conv2d(3, 2, 1)), (4, 3, 3, 3)),
    "conv grouped": (lambda: nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), tanh()), (4, 4, 3, 3)),
    "conv channels-last": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), tanh()).to(memory_format=torch.channels_last),
        (4, 2, 3, 3),
    ),
    "conv transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 3, stride=2), tanh()), (4, 2, 3)),
    "conv transposed 2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 2, 2, stride=2, output_padding=1), tanh()),
        (4, 1, 2, 2),
    ),
    "conv transposed 3d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(1, 2, 2), tanh(), nn.AvgPool3d(3)),
        (3, 1, 2, 2, 2),
    ),
    "max pool 1d": (lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.MaxPool1d(2), tanh()), (5, 1, 8)),
    "max pool 2d": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), tanh()), (5, 1, 6, 6)),
    "max pool 3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.MaxPool3d(2)), (4, 1, 3, 3, 3)),
    "max unpool": (
        lambda: Fn(
            lambda m, x: F.max_unpool1d(*F.max_pool1d(m.net(x), 2, return_indices=True), 2), net=nn.Conv1d(1, 2, 3)
        ),
        (4, 1, 6),
    ),
    "average pool padded": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), tanh(), nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)),
        (4, 1, 6, 6),
    ),
    "adaptive average pool": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), tanh(), nn.AdaptiveAvgPool2d((2, 3))),
        (4, 1, 6, 6),
    ),
    "adaptive max pool": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.AdaptiveMaxPool2d(2)), (4, 1, 6, 6)),
    "LP pool": (lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Softplus(), nn.LPPool1d(3, 2), tanh()), (4, 1, 8)),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.PixelShuffle(2), tanh()), (4, 1, 3, 3)),
    "channel shuffle": (lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.ChannelShuffle(2), tanh()), (4, 1, 3, 3)),
    "unfold": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Unfold(2), tanh()), (4, 1, 4, 4)),
    "fold": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Fold((3, 3), 2), tanh()), (4, 4, 4)),
    "unflatten": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (2, 2)), nn.Softmax(1)), (7, 5)),
    "local response norm": (lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.LocalResponseNorm(2)), (4, 1, 5)),
    "upsample nearest": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Upsample(scale_factor=2), tanh()), (4, 1, 3, 3)),
    "upsample linear": (
        lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Upsample(scale_factor=2, mode="linear"), tanh()),
        (4, 1, 4),
    ),
    "upsample bilinear": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), tanh()
        ),
        (4, 1, 3, 3),
    ),
    "upsample bicubic": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Upsample(scale_factor=2, mode="bicubic"), tanh()),
        (4, 1, 3, 3),
    ),
    "upsample antialiased": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), Fn(lambda _, x: F.interpolate(x, size=2, mode="bilinear", antialias=True)), tanh()
        ),
        (4, 1, 5, 5),
    ),
    "RNN": (lambda: Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.RNN(3, 4, batch_first=True)), (4, 3, 3)),
    "RNN relu": (
        lambda: Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.RNN(3, 4, batch_first=True, nonlinearity="relu")),
        (4, 3, 3),
    ),
    "GRU": (lambda: Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.GRU(3, 3, batch_first=True)), (4, 3, 3)),
    "LSTM": (lambda: Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.LSTM(3, 3, batch_first=True)), (4, 3, 3)),
    "LSTM two layers": (lambda: Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.LSTM(2, 2, 2, batch_first=True)), (4, 3, 2)),
    "LSTM bidirectional": (
        lambda: Fn(lambda m, x: m.rnn(x)[0].mean(1), rnn=nn.LSTM(2, 2, batch_first=True, bidirectional=True)),
        (4, 3, 2),
    ),
    "LSTM projected": (
        lambda: Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.LSTM(2, 3, batch_first=True, proj_size=2)),
        (4, 3, 2),
    ),
    "LSTM cell": (lambda: Fn(lambda m, x: m.cell(x[:, 1], m.cell(x[:, 0]))[0], cell=nn.LSTMCell(3, 3)), (4, 2, 3)),
    "GRU cell": (lambda: Fn(lambda m, x: m.cell(x[:, 1], m.cell(x[:, 0])), cell=nn.GRUCell(3, 3)), (4, 2, 3)),
    "RNN with a learnt first state": (
        lambda: Fn(
            lambda m, x: m.rnn(x, m.first.expand(1, len(x), 3).contiguous())[0][:, -1],
            rnn=nn.GRU(2, 3, batch_first=True),
            first=nn.Parameter(normal(3)),
        ),
        (4, 3, 2),
    ),
    "multi-head attention": (
        lambda: Fn(lambda m, x: m.attend(x, x, x)[0], attend=nn.MultiheadAttention(4, 2, batch_first=True)),
        (4, 3, 4),
    ),
    "multi-head attention with options": (
        lambda: Fn(
            lambda m, x: m.attend(x, x[..., :3], x[..., :2], need_weights=False)[0],
            attend=nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2, add_bias_kv=True, add_zero_attn=True),
        ),
        (3, 3, 4),
    ),
    "transformer encoder layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
        (3, 3, 4),
    ),
    "transformer encoder layer eval gelu norm first": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4, activation="gelu", norm_first=True, batch_first=True).eval(),
        (3, 3, 4),
    ),
    "transformer encoder of copies": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True), 2),
        (3, 3, 2),
    ),
    "transformer decoder layer": (
        lambda: Fn(
            lambda m, x: m.layer(x[:, :2], x[:, 2:]),
            layer=nn.TransformerDecoderLayer(2, 1, 3, dropout=0.0, batch_first=True),
        ),
        (3, 4, 2),
    ),
    "attention function": (
        lambda: Fn(lambda m, x: F.scaled_dot_product_attention(*m.net(x).chunk(3, -1)), net=nn.Linear(3, 9)),
        (4, 4, 3),
    ),
    "attention function causal": (
        lambda: Fn(
            lambda m, x: F.scaled_dot_product_attention(*m.net(x).chunk(3, -1), is_causal=True), net=nn.Linear(3, 9)
        ),
        (4, 4, 3),
    ),
    "attention function masked": (
        lambda: Fn(
            lambda m, x: F.scaled_dot_product_attention(*m.net(x).chunk(3, -1), attn_mask=m.mask),
            net=nn.Linear(3, 9),
            mask=torch.eye(4).bool() | (normal(4, 4) > 0),
        ),
        (4, 4, 3),
    ),
    "attention function with a learnt bias": (
        lambda: Fn(
            lambda m, x: F.scaled_dot_product_attention(*m.net(x).chunk(3, -1), attn_mask=m.bias),
            net=nn.Linear(3, 9),
            bias=nn.Parameter(normal(4, 4)),
        ),
        (4, 4, 3),
    ),
    "attention by hand with -inf": (
        lambda: Fn(
            lambda m, x: (m.net(x) @ x.mT).masked_fill(m.mask, float("-inf")).softmax(-1) @ x,
            net=nn.Linear(3, 3),
            mask=torch.ones(4, 4).triu(1).bool(),
        ),
        (4, 4, 3),
    ),
    "layer norm": (lambda: shaken(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), tanh())), (7, 5)),
    "layer norm not affine": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False), tanh()),
        (7, 5),
    ),
    "layer norm without bias": (
        lambda: shaken(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, bias=False), tanh())),
        (7, 5),
    ),
    "group norm": (lambda: shaken(nn.Sequential(nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), tanh())), (4, 1, 4)),
    "instance norm": (
        lambda: shaken(nn.Sequential(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, affine=True), tanh())),
        (4, 1, 5),
    ),
    "instance norm not affine": (lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3), tanh()), (4, 1, 5)),
    "instance norm tracking in train mode": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, track_running_stats=True), tanh()),
        (4, 1, 5),
    ),
    "RMS norm": (lambda: shaken(nn.Sequential(nn.Linear(5, 4), nn.RMSNorm(4), tanh())), (7, 5)),
    "RMS norm by hand in float32": (
        lambda: Fn(
            lambda m, x: (
                m.gain * (m.net(x).float() * m.net(x).float().square().mean(-1, True).add(1e-6).rsqrt()).to(x.dtype)
            ),
            net=nn.Linear(5, 4),
            gain=nn.Parameter(normal(4)),
        ),
        (7, 5),
    ),
    "batch norm eval": (lambda: shaken(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), tanh())).eval(), (7, 5)),
    "batch norm 2d eval": (
        lambda: shaken(nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), tanh())).eval(),
        (4, 1, 3, 3),
    ),
    "sync batch norm eval": (
        lambda: shaken(nn.Sequential(nn.Linear(5, 4), nn.SyncBatchNorm(4), tanh())).eval(),
        (7, 5),
    ),
    "weight standardisation": (
        lambda: Fn(
            lambda m, x: torch.tanh(
                F.conv1d(x, (m.w - m.w.mean((1, 2), keepdim=True)) / m.w.std((1, 2), keepdim=True))
            ),
            w=nn.Parameter(normal(2, 2, 3)),
        ),
        (4, 2, 5),
    ),
    "cosine similarity": (
        lambda: Fn(
            lambda m, x: F.cosine_similarity(m.net(x)[:, None], m.anchors, dim=-1),
            net=nn.Linear(5, 3),
            anchors=nn.Parameter(normal(4, 3)),
        ),
        (7, 5),
    ),
    "pairwise distance": (
        lambda: Fn(
            lambda m, x: F.pairwise_distance(m.net(x)[:, None], m.anchors),
            net=nn.Linear(5, 3),
            anchors=nn.Parameter(normal(4, 3)),
        ),
        (7, 5),
    ),
    "cdist": (
        lambda: Fn(
            lambda m, x: torch.cdist(m.net(x), m.anchors), net=nn.Linear(5, 3), anchors=nn.Parameter(normal(4, 3))
        ),
        (7, 5),
    ),
    "normalised rows": (lambda: Fn(lambda m, x: F.normalize(m.net(x), dim=-1), net=nn.Linear(5, 4)), (7, 5)),
}
LAYER_CULPRITS = {
    "cdist": r"cdist|body\.anchors",
    "RMS norm by hand in float32": r"float32|body",
    "instance norm tracking in train mode": r"body\.1|InstanceNorm",
}
for name_, (body_, shape_) in LAYERS.items():
    culprit_ = LAYER_CULPRITS.get(name_, "")
    add(name_, lambda body=body_, shape=shape_: classifier(body(), normal(*shape)), culprit_)

CULPRIT_NORM = r"body\.1|BatchNorm|GroupNorm|InstanceNorm"
for separable in (True, False):
    tail = "" if separable else ", said not to be separable"
    for name_, norm in {
        "batch norm train": partial(nn.BatchNorm1d, 4),
        "batch norm train without statistics": partial(nn.BatchNorm1d, 4, track_running_stats=False),
        "batch norm train cumulative": partial(nn.BatchNorm1d, 4, momentum=None),
    }.items():
        add(
            name_ + tail,
            lambda norm=norm, s=separable: between(shaken(norm()), tanh(), separable=s),
            CULPRIT_NORM,
        )
add(
    "batch norm eval without statistics",
    lambda: between(nn.BatchNorm1d(4, track_running_stats=False).eval(), tanh()),
    CULPRIT_NORM,
)
add(
    "logarithm of a small parameter",
    lambda: between(Fn(lambda m, x: torch.tanh(x * m.scale.log()), scale=nn.Parameter(torch.full((4,), 1e-4)))),
)
add("batch norm, frozen eval inside a train net", lambda: between(nn.BatchNorm1d(4).eval(), tanh()))


def grid_sample(m, x):
    theta = F.affine_grid(m.net(x.flatten(1)).reshape(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, theta, align_corners=False)


def on_tokens(embed, tokens, reduce=lambda e: e.sum(1), **options):
    return classifier(Fn(lambda m, t: torch.tanh(reduce(m.embed(t))), embed=embed), tokens, **options)


TOKENS = torch.tensor([[1, 2, 3], [4, 1, 1], [2, 3, 5], [3, 5, 4]])
WITH_PAD = torch.tensor([[1, 2, 0], [4, 0, 0], [2, 3, 5], [0, 5, 4]])
EMBED = r"embed|Embedding"
add(
    "grid sample", lambda: classifier(Fn(grid_sample, net=nn.Linear(9, 6)), normal(4, 1, 3, 3)), r"grid_sampl|body\.net"
)
add(
    "fractional max pool",
    lambda: classifier(nn.Sequential(nn.Conv2d(1, 2, 2), nn.FractionalMaxPool2d(2, 2)), normal(4, 1, 6, 6)),
    r"body\.1|FractionalMaxPool|random",
)
add("embedding", lambda: on_tokens(nn.Embedding(6, 3), TOKENS))
add("embedding padding_idx not in the data", lambda: on_tokens(nn.Embedding(6, 3, padding_idx=0), TOKENS))
add("embedding padding_idx in the data", lambda: on_tokens(nn.Embedding(6, 3, padding_idx=0), WITH_PAD), EMBED)
add(
    "embedding padding_idx masked out",
    lambda: classifier(
        Fn(lambda m, t: (m.embed(t) * t.ne(0)[..., None]).sum(1), embed=nn.Embedding(6, 3, padding_idx=0)), WITH_PAD
    ),
)
add(
    "embedding frozen padding_idx in the data",
    lambda: on_tokens(nn.Embedding.from_pretrained(normal(6, 3), padding_idx=0), WITH_PAD),
)
add("embedding max_norm exceeded", lambda: on_tokens(nn.Embedding(6, 3, max_norm=1.0), TOKENS), EMBED)
add("embedding max_norm far away", lambda: on_tokens(nn.Embedding(6, 3, max_norm=50.0), TOKENS), EMBED)
add("embedding sparse", lambda: on_tokens(nn.Embedding(6, 3, sparse=True), TOKENS), EMBED)
add("embedding scale_grad_by_freq", lambda: on_tokens(nn.Embedding(6, 3, scale_grad_by_freq=True), TOKENS), EMBED)
add(
    "embedding functional padding_idx",
    lambda: classifier(
        Fn(lambda m, t: F.embedding(t, m.table, padding_idx=0).sum(1), table=nn.Parameter(normal(6, 3))), WITH_PAD
    ),
    r"table|embedding",
)
for mode in ("sum", "mean", "max"):
    add(
        f"embedding bag {mode}",
        lambda mode=mode: on_tokens(nn.EmbeddingBag(6, 3, mode=mode), TOKENS, lambda e: e),
        EMBED,
    )
add(
    "embedding bag padding_idx in the data",
    lambda: on_tokens(nn.EmbeddingBag(6, 3, padding_idx=0, mode="sum"), WITH_PAD, lambda e: e),
    EMBED,
)
add(
    "embedding bag weighted",
    lambda: classifier(
        Fn(
            lambda m, t: torch.tanh(m.embed(t, per_sample_weights=m.w[t])),
            embed=nn.EmbeddingBag(6, 3, mode="sum"),
            w=nn.Parameter(normal(6)),
        ),
        TOKENS,
    ),
    EMBED,
)
add(
    "embedding bag sparse",
    lambda: on_tokens(nn.EmbeddingBag(6, 3, mode="sum", sparse=True), TOKENS, lambda e: e),
    EMBED,
)
add(
    "positional and token embedding",
    lambda: classifier(
        Fn(lambda m, t: torch.tanh(m.tok(t) + m.pos.weight).mean(1), tok=nn.Embedding(6, 3), pos=nn.Embedding(3, 3)),
        TOKENS,
    ),
)


def packed(m, x, lengths):
    run = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return m.rnn(run)[1][-1]


def key_padding(m, x, lengths):
    padded = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return m.layer(x, src_key_padding_mask=padded).mean(1)


LENGTHS = torch.tensor([3, 1, 2, 3])
add("packed sequence", lambda: classifier(Fn(packed, rnn=nn.GRU(2, 3, batch_first=True)), (normal(4, 3, 2), LENGTHS)))
add(
    "transformer with key padding",
    lambda: classifier(
        Fn(key_padding, layer=nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True)),
        (normal(4, 3, 2), LENGTHS),
    ),
)
add(
    "transformer with key padding eval",
    lambda: classifier(
        Fn(key_padding, layer=nn.TransformerEncoderLayer(2, 1, 3, batch_first=True)).eval(), (normal(4, 3, 2), LENGTHS)
    ),
)
add(
    "transformer with dropout in train mode",
    lambda: classifier(nn.TransformerEncoderLayer(2, 1, 3, batch_first=True), normal(4, 3, 2)),
    r"body(\.\w+)*` ?\(|Dropout|dropout",
)
add(
    "LSTM with dropout in train mode",
    lambda: classifier(
        Fn(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.LSTM(2, 2, 2, batch_first=True, dropout=0.5)), normal(4, 3, 2)
    ),
    r"body\.rnn|LSTM",
)
add(
    "attention with dropout in train mode",
    lambda: classifier(
        Fn(lambda m, x: m.attend(x, x, x)[0], attend=nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)),
        normal(4, 3, 4),
    ),
    r"body\.attend|MultiheadAttention|dropout",
)
add(
    "attention function with dropout",
    lambda: classifier(
        Fn(lambda m, x: F.scaled_dot_product_attention(*m.net(x).chunk(3, -1), dropout_p=0.5), net=nn.Linear(3, 9)),
        normal(4, 4, 3),
    ),
    r"random|dropout",
)

# --- activations -----------------------------------------------------------------------------------------------------

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, inplace=True), nn.PReLU(),
    nn.PReLU(4), nn.RReLU().eval(), nn.ELU(), nn.ELU(0.7), nn.ELU(inplace=True), nn.CELU(0.5), nn.SELU(), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Softplus(), nn.Softplus(3, 1), nn.Softsign(),
    nn.Sigmoid(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Hardtanh(-0.5, 0.5), nn.Hardswish(), nn.Hardsigmoid(),
    nn.Hardshrink(0.2), nn.Softshrink(0.2), nn.Threshold(0.1, 0.3), nn.GLU(), nn.Softmax(-1), nn.Softmin(-1),
    nn.LogSoftmax(-1), nn.Softmax2d(),
]  # fmt: skip
for layer_ in ACTIVATIONS:
    images = isinstance(layer_, nn.Softmax2d)
    add(
        "activation " + repr(layer_).replace("negative_slope=", "") + ("" if layer_.training else " eval"),
        lambda layer=layer_, images=images: (
            classifier(nn.Sequential(nn.Conv2d(1, 2, 2), copy.deepcopy(layer)), normal(4, 1, 3, 3))
            if images
            else between(copy.deepcopy(layer))
        ),
        r"hardsigmoid|Hardsigmoid" if isinstance(layer_, nn.Hardsigmoid) else "",
    )
add("activation RReLU in train mode", lambda: between(nn.RReLU()), r"body\.1|RReLU")
add("activation in place on a sigmoid", lambda: between(Fn(lambda _, x: x.sigmoid().mul_(x))), r"in-?place")

# --- losses: a loss, the outputs' number and activation, the target -------------------------------------------------

ONE_HOT = F.one_hot(labels(7), 3).float()
SOFT = normal(7, 3, seed=5).softmax(-1)
IGNORED = torch.where(torch.arange(7) % 3 == 1, -100, labels(7))
SIGNS = labels(7, classes=2) * 2 - 1
WEIGHTS = torch.tensor([0.2, 1.0, 3.0])
logp = lambda: nn.LogSoftmax(-1)
TORCH_LOSSES = {
    "L1": (nn.L1Loss, nn.Identity, normal(7, 3)),
    "MSE": (nn.MSELoss, nn.Identity, normal(7, 3)),
    "smooth L1": (partial(nn.SmoothL1Loss, beta=0.7), nn.Identity, normal(7, 3)),
    "Huber": (partial(nn.HuberLoss, delta=0.6), nn.Identity, normal(7, 3)),
    "cross-entropy": (nn.CrossEntropyLoss, nn.Identity, labels(7)),
    "cross-entropy weighted": (partial(nn.CrossEntropyLoss, WEIGHTS), nn.Identity, labels(7)),
    "cross-entropy ignored targets": (nn.CrossEntropyLoss, nn.Identity, IGNORED),
    "cross-entropy ignored class": (partial(nn.CrossEntropyLoss, ignore_index=1), nn.Identity, labels(7)),
    "cross-entropy smoothed": (partial(nn.CrossEntropyLoss, label_smoothing=0.2), nn.Identity, labels(7)),
    "cross-entropy smoothed weighted ignored": (
        partial(nn.CrossEntropyLoss, WEIGHTS, label_smoothing=0.2),
        nn.Identity,
        IGNORED,
    ),
    "cross-entropy soft targets": (nn.CrossEntropyLoss, nn.Identity, SOFT),
    "cross-entropy soft targets weighted smoothed": (
        partial(nn.CrossEntropyLoss, WEIGHTS, label_smoothing=0.1),
        nn.Identity,
        SOFT,
    ),
    "NLL": (nn.NLLLoss, logp, labels(7)),
    "NLL weighted ignored": (partial(nn.NLLLoss, WEIGHTS), logp, IGNORED),
    "Poisson NLL": (nn.PoissonNLLLoss, nn.Identity, labels(7, 3).float()),
    "Poisson NLL full": (partial(nn.PoissonNLLLoss, log_input=False, full=True), nn.Softplus, labels(7, 3).float()),
    "KL divergence": (nn.KLDivLoss, logp, SOFT),
    "KL divergence log target": (partial(nn.KLDivLoss, log_target=True), logp, SOFT.log()),
    "BCE": (nn.BCELoss, nn.Sigmoid, ONE_HOT),
    "BCE weighted": (partial(nn.BCELoss, WEIGHTS), nn.Sigmoid, ONE_HOT),
    "BCE with logits": (nn.BCEWithLogitsLoss, nn.Identity, ONE_HOT),
    "BCE with logits weighted": (
        partial(nn.BCEWithLogitsLoss, WEIGHTS, pos_weight=WEIGHTS.flip(0)),
        nn.Identity,
        ONE_HOT,
    ),
    "soft margin": (nn.SoftMarginLoss, nn.Identity, ONE_HOT * 2 - 1),
    "multi-label soft margin": (partial(nn.MultiLabelSoftMarginLoss, WEIGHTS), nn.Identity, ONE_HOT),
    "multi margin": (nn.MultiMarginLoss, nn.Identity, labels(7)),
    "multi margin squared weighted": (partial(nn.MultiMarginLoss, p=2, weight=WEIGHTS), nn.Identity, labels(7)),
    "multi-label margin": (
        nn.MultiLabelMarginLoss,
        nn.Identity,
        torch.tensor([[0, -1, -1], [1, 2, -1], [2, -1, -1], [0, 1, -1], [1, -1, -1], [0, 2, -1], [2, 1, -1]]),
    ),
    "hinge embedding": (nn.HingeEmbeddingLoss, nn.Identity, ONE_HOT * 2 - 1),
}


def scorer(activation, out=3):
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, out), activation())


for name_, (loss_, activation_, target_) in TORCH_LOSSES.items():
    reductions = ("mean", "sum", "batchmean") if "KL" in name_ else ("mean", "sum")
    for reduction_ in reductions:
        add(
            f"loss {name_} {reduction_}",
            lambda loss=loss_, act=activation_, y=target_, r=reduction_: supervised(
                scorer(act), loss(reduction=r), normal(7, 5), y
            ),
            r"multi_?(label_?)?margin" if "margin" in name_ else "",
        )

pairwise = {  # (output, target) -> scalar mean over samples
    "triplet": lambda o, _: F.triplet_margin_loss(o[:, :2], o[:, 2:4], o[:, 4:]),
    "triplet with a distance": lambda o, _: nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance(1))(
        o[:, :2], o[:, 2:4], o[:, 4:]
    ),
    "margin ranking": lambda o, y: F.margin_ranking_loss(o[:, 0], o[:, 1], y, margin=0.1),
    "cosine embedding": lambda o, y: F.cosine_embedding_loss(o[:, :3], o[:, 3:], y),
    "Gaussian NLL": lambda o, y: F.gaussian_nll_loss(o[:, 0], y.to(o), F.softplus(o[:, 1])),
    "focal": lambda o, y: ((1 - o.softmax(-1)[:, 0]) ** 2 * o.log_softmax(-1)[:, 0]).neg().mean(),
    "log-cosh": lambda o, y: (o[:, 0] - y).cosh().log().mean(),
    "quantile": lambda o, y: torch.maximum(0.9 * (y - o[:, 0]), 0.1 * (o[:, 0] - y)).mean(),
    "dice per sample": lambda o, y: (1 - (2 * o.sigmoid() * y[:, None]).sum(1) / (o.sigmoid() + 2).sum(1)).mean(),
}
for name_, loss_ in pairwise.items():
    add(f"user loss {name_}", lambda loss=loss_: supervised(scorer(nn.Identity, 6), loss, normal(7, 5), SIGNS))
    add(
        f"user loss {name_}, a sum",
        lambda loss=loss_: supervised(
            scorer(nn.Identity, 6), lambda o, y: loss(o, y) * len(o), normal(7, 5), SIGNS, reduction="sum"
        ),
    )


def pair(function, model, x, y, **options):
    """A loss (output, target) -> (sum, weight)."""

    def whole(m, b):
        total, weight = function(call(m, b[0]), b[1])
        return total / weight

    return model, whole, (x, y), {"loss": function, "data": (x, y), **options}


SUMMED = r"sum|weight|separable"
ce_net = lambda: scorer(nn.Identity)
ignored_pair = lambda o, y: (F.cross_entropy(o, y, reduction="sum"), y.ne(-100).sum())
add("user loss as (sum, weight)", lambda: pair(ignored_pair, ce_net(), normal(7, 5), IGNORED))
add(
    "user mean over targets not ignored",
    lambda: supervised(ce_net(), lambda o, y: F.cross_entropy(o, y), normal(7, 5), IGNORED),
    SUMMED,
)
add(
    "user sum said to be a mean",
    lambda: supervised(ce_net(), lambda o, y: o.square().sum(), normal(7, 5), labels(7)),
    SUMMED,
)
add(
    "user mean said to be a sum",
    lambda: supervised(ce_net(), lambda o, y: o.square().mean(), normal(7, 5), labels(7), reduction="sum"),
    SUMMED,
)
add(
    "root of the mean square",
    lambda: supervised(ce_net(), lambda o, y: o.square().mean().sqrt(), normal(7, 5), labels(7)),
    SUMMED,
)
add(
    "root of the mean square, said not to be separable",
    lambda: supervised(ce_net(), lambda o, y: o.square().mean().sqrt(), normal(7, 5), labels(7), separable=False),
)
add(
    "loss as a partial",
    lambda: supervised(
        ce_net(),
        partial(F.cross_entropy, weight=torch.tensor([0.5, 1, 2], dtype=torch.float64), label_smoothing=0.1),
        normal(7, 5),
        IGNORED,
    ),
)
add("loss as a function", lambda: supervised(ce_net(), F.smooth_l1_loss, normal(7, 5), normal(7, 3)))
add(
    "loss as a module of the user's",
    lambda: supervised(
        ce_net(), Fn(lambda m, o, y: F.cross_entropy(o * m.scale, y), scale=torch.tensor(2.0)), normal(7, 5), labels(7)
    ),
)
add(
    "loss of a loss module's subclass",
    lambda: supervised(
        ce_net(),
        type(
            "Sharper", (nn.CrossEntropyLoss,), {"forward": lambda self, o, y: super(type(self), self).forward(3 * o, y)}
        )(),
        normal(7, 5),
        IGNORED,
    ),
    SUMMED,
)
add("sequence targets", lambda: supervised(Tied(), nn.CrossEntropyLoss(), TOKENS, WITH_PAD))
add(
    "sequence targets, padding ignored",
    lambda: supervised(Tied(), nn.CrossEntropyLoss(ignore_index=0), TOKENS, WITH_PAD),
)
add(
    "segmentation targets",
    lambda: supervised(
        nn.Conv2d(1, 3, 2),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), ignore_index=2),
        normal(4, 1, 3, 3),
        labels(4, 2, 2),
    ),
)
add(
    "segmentation NLL",
    lambda: supervised(
        nn.Sequential(nn.Conv2d(1, 3, 2), nn.LogSoftmax(1)), nn.NLLLoss(), normal(4, 1, 3, 3), labels(4, 2, 2)
    ),
)


def ctc(call, batch):
    x, target, lengths = batch
    scores = call(x).log_softmax(-1).transpose(0, 1)
    whole = torch.full_like(lengths, x.shape[1])
    return F.ctc_loss(scores, target, whole, lengths, reduction="sum"), len(x)


def contrastive(call, batch):
    first, second = (F.normalize(call(view), dim=-1) for view in batch)
    return F.cross_entropy(first @ second.mT / 0.5, torch.arange(len(first)).to(first.device), reduction="sum"), len(
        first
    )


def vae(noise):
    def function(call, batch):
        x, fixed = batch
        mean, spread, back = call(x, noise(fixed))
        return ((back - x) ** 2).sum() + 0.5 * (mean**2 + spread.exp() - spread - 1).sum(), len(x)

    return function


def coder(m, x, noise):
    mean, spread = m.encode(x).chunk(2, -1)
    return mean, spread, m.decode(torch.tanh(mean + noise * (spread / 2).exp()))


def heat_by_autograd(call, batch):
    """u'' + u by autograd inside the objective."""
    (x,) = batch
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = call(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return ((second + u) ** 2).sum(), len(x)


def hugging_face(m, input_ids, attention_mask, labels):
    hidden = torch.tanh(m.embed(input_ids)) * attention_mask[..., None]
    logits = m.head(hidden.cumsum(1))
    return {"loss": F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum"), "logits": logits}


vae_net = lambda: Fn(coder, encode=nn.Linear(4, 4), decode=nn.Linear(2, 4))
line_net = lambda: nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))
views = (normal(6, 5), normal(6, 5, seed=9))
tokens_net = lambda: Fn(hugging_face, embed=nn.Embedding(6, 3), head=nn.Linear(3, 6))
HF_BATCH = {"input_ids": TOKENS, "attention_mask": TOKENS.ne(5).long(), "labels": WITH_PAD}
adaptive = lambda: Fn(
    lambda m, x, y: m.head(m.net(x), y).loss,
    net=nn.Linear(5, 4),
    head=nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2),
)
add(
    "CTC",
    lambda: objective(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)),
        ctc,
        (normal(3, 6, 3), labels(3, 2) + 1, torch.tensor([2, 1, 2])),
    ),
    r"ctc",
)
add("contrastive", lambda: objective(scorer(nn.Identity), contrastive, views), SUMMED)
add(
    "contrastive, said not to be separable", lambda: objective(scorer(nn.Identity), contrastive, views, separable=False)
)
add(
    "VAE with noise in the data",
    lambda: objective(vae_net(), vae(lambda fixed: fixed), (normal(6, 4), normal(6, 2, seed=4))),
)
add(
    "VAE with fresh noise",
    lambda: objective(vae_net(), vae(torch.randn_like), (normal(6, 4), normal(6, 2, seed=4))),
    "random",
)
add("physics by torch.func", lambda: objective(line_net(), heat_objective, (torch.linspace(-1, 1, 6),)))
add("physics by autograd", lambda: objective(line_net(), heat_by_autograd, (torch.linspace(-1, 1, 6)[:, None],)))
add(
    "gradient penalty",
    lambda: objective(
        nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Softplus(), nn.Linear(5, 1)),
        heat_by_autograd,
        (normal(6, 2),),
    ),
    r"`[013]\.(weight|bias)|LayerNorm",
)
add(
    "adaptive softmax in the model",
    lambda: objective(
        adaptive(), lambda c, b: (c(*b) * len(b[1]), len(b[1])), (normal(6, 5), torch.tensor([0, 1, 2, 3, 4, 5]))
    ),
)


def dict_batch():
    function = lambda c, b: (c(**b)["loss"], b["labels"].numel())
    return objective(tokens_net(), function, HF_BATCH, data=[HF_BATCH])


def ridge():
    model, whole, batch, arguments = supervised(tanh_net(), nn.CrossEntropyLoss(), normal(7, 5), labels(7))
    total = lambda m, b: whole(m, b) + 0.15 * sum((p**2).sum() for p in m.parameters())
    return model, total, batch, {**arguments, "l2": 0.3}


add("L2 term", ridge)
add("Hugging Face batch", dict_batch)
add(
    "L2 term in the objective",
    lambda: objective(
        Fn(lambda m, x: (m.net(x), m.net.weight), net=nn.Linear(5, 3)),
        lambda c, b: (
            (lambda o, w: F.cross_entropy(o, b[1], reduction="sum") + len(b[1]) * 0.1 * (w**2).sum())(*c(b[0])),
            len(b[1]),
        ),
        (normal(7, 5), labels(7)),
    ),
)
add(
    "entropy of the mean prediction",
    lambda: supervised(ce_net(), lambda o, y: torch.special.entr(o.softmax(-1).mean(0)).sum(), normal(7, 5), labels(7)),
    SUMMED,
)

# --- wrappers, parametrisations, odd parameters ----------------------------------------------------------------------


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


def half_double():
    return Fn(
        lambda m, x: torch.tanh(m.b(m.a(x.float()).double()).to(x)), a=nn.Linear(5, 4), b=nn.Linear(4, 4).double()
    )


def with_table(keep):
    model = Fn(lambda m, x: torch.tanh(m.net(x) @ m.table), net=nn.Linear(5, 4))
    keep(model, "table", normal(4, 4))
    return model


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
    "two floating types": (half_double, r"body|float|dtype|a\.weight|b\.weight"),
    "plain tensor attribute": (lambda: with_table(object.__setattr__), r"dtype|float|Float|Double"),
    "buffer not persistent": (lambda: with_table(partial(nn.Module.register_buffer, persistent=False)), ""),
}


for name_, (body_, culprit_) in WRAPPED.items():
    width_ = 4 if name_.startswith(("orthogonal", "symmetric")) else 5
    add(name_, lambda body=body_, d=width_: classifier(nn.Sequential(body(), nn.Tanh()), normal(7, d)), culprit_)

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

# --- modes and tricks: a function between two linear layers ----------------------------------------------------------


class Cube(torch.autograd.Function):
    """x^3 in the old style, right to second order."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeNew(Cube):
    """In the new style."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class CubeWrong(Cube):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2.9 * x**2 * g


class CubeOnce(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeDetached(Cube):
    """The gradient is right, its graph is not."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * g


class CubeStored(Cube):
    """Keeps a tensor on ctx and not by save_for_backward, of a graph that is gone."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x**2
        return x**3

    @staticmethod
    def backward(ctx, g):
        return ctx.slope * g


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.02, 0.02)


class Reversed(torch.autograd.Function):
    """Gradient reversal of domain-adversarial nets."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Counter(nn.Module):
    """Its output depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + self.calls % 3)


class Average(nn.Module):
    """Keeps a moving average, which matters or not."""

    def __init__(self, matters):
        super().__init__()
        self.matters = matters
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return torch.tanh(x - self.mean) if self.matters else torch.tanh(x)


class Carried(nn.Module):
    """A recurrent net that goes on from the state of its last call."""

    def __init__(self):
        super().__init__()
        self.cell, self.state = nn.RNNCell(4, 4), None

    def forward(self, x):
        self.state = self.cell(x, None if self.state is None else self.state.detach())
        return self.state


class Cached(nn.Module):
    """Computes from its parameter once, and keeps that."""

    def __init__(self):
        super().__init__()
        self.weight, self.cache = nn.Parameter(normal(4, 4)), None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.linalg.matrix_exp(self.weight.detach())
        return torch.tanh(x @ self.cache)


class Switched(nn.Module):
    """Switches itself to eval mode when first called."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(x)
        self.drop.eval()
        return y


def hooked(scale):
    def function(_, x):
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(lambda g: scale * g)
        return torch.tanh(y)

    return function


def without_grad(part):
    def function(_, x):
        with torch.no_grad():
            scale = part(x)
        return torch.tanh(x * scale)

    return function


def reseeded(_, x):
    torch.manual_seed(3)
    return torch.tanh(x + torch.randn(4).to(x))


def own_generator(_, x):
    return torch.tanh(x + torch.randn(4, generator=torch.Generator().manual_seed(3)).to(x))


def rare(chance):
    return lambda _, x: torch.tanh(2 * x) if torch.rand(()) < chance else torch.tanh(x)


def filled(_, x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1].sin()
    y[:, 1:] += x[:, 1:] ** 2
    return y


def newton_root(_, x):
    """The root of y^3 + y = x, by iteration."""
    y = x
    for _step in range(30):
        y = y - (y**3 + y - x) / (3 * y**2 + 1)
    return y


def unconverged(_, x):
    """Iterates until it changes little: the number of steps depends on the data."""
    y = torch.zeros_like(x)
    while float((0.5 * torch.cos(x * y) - y).detach().abs().max()) > 1e-3:
        y = 0.5 * torch.cos(x * y)
    return y


def implicit(_, x):
    """The root of y^3 + y = x, found without a graph and then given its first derivative alone."""
    with torch.no_grad():
        y = newton_root(None, x)
        slope = 1 / (3 * y**2 + 1)
    return y + slope * (x - x.detach())


def low(dtype):
    return lambda m, x: torch.tanh(x.to(dtype)).to(x.dtype)


def autocast(_, x):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return torch.tanh(x @ x.new_ones(4, 4).tril())


def branch(_, x):
    return torch.tanh(x) if x.sum() > 0 else x.sin()


def per_sample_branch(_, x):
    return torch.stack([row.tanh() if row.sum() > 0 else row.sin() for row in x])


def positive(x):
    """Positive definite matrices from rows.  # shape: (N, 2, 2)"""
    m = x.reshape(-1, 2, 2)
    return m @ m.mT + torch.eye(2).to(x)


def scattered(_, x):
    index = torch.tensor([0, 1, 0, 2], device=x.device).expand(len(x), 4)
    return torch.zeros_like(x).scatter_add(1, index, x**2)


def fft(_, x):
    f = torch.fft.fft(x)
    return f.real * f.imag + f.abs()


def complex_product(_, x):
    z = torch.view_as_complex(x.reshape(-1, 2, 2))
    return torch.view_as_real(z * z.conj().roll(1, -1) + z.exp()).flatten(1)


def sparse_mm(m, x):
    return torch.sparse.mm(m.graph, x.T).T.tanh()


def quantised(_, x):
    return x + (torch.round(x * 4) / 4 - x).detach()


def gumbel(_, x):
    return F.gumbel_softmax(x, hard=True)


def hard_softmax(_, x):
    soft = x.softmax(-1)
    return F.one_hot(soft.argmax(-1), 4).to(soft) - soft.detach() + soft


def sampled(_, x):
    return torch.distributions.Normal(x, 1.0).rsample()


def fixed_noise(m, x):
    return torch.tanh(x + m.noise)


GENERATOR = np.random.default_rng(0)
eye4 = lambda: torch.eye(4).roll(1, 0).to_sparse()
RANDOM = r"body\.1|Fn|random"
UP = r"body\.0\.(weight|bias)|body\.1|Fn"
TRICKS = {
    "straight-through rounding": (quantised, UP),
    "straight-through argmax": (hard_softmax, UP),
    "gumbel softmax": (gumbel, RANDOM),
    "round": (lambda _, x: torch.tanh(x) + torch.round(x), UP),
    "sign": (lambda _, x: torch.tanh(x) * torch.sign(x), ""),
    "argmax as an index": (lambda _, x: x.tanh().gather(1, x.argmax(1, keepdim=True).expand(-1, 2)), ""),
    "no_grad around a factor": (without_grad(lambda x: x.exp()), UP),
    "no_grad around a constant": (without_grad(lambda x: torch.ones_like(x) * 2), ""),
    "detached normaliser": (lambda _, x: x / x.norm(dim=-1, keepdim=True).detach(), UP),
    "detached maximum in a log-sum-exp": (
        lambda _, x: (x - x.amax(-1, True).detach()).exp().cumsum(-1).log() + x.amax(-1, True).detach(),
        "",
    ),
    "old-style Function": (lambda _, x: Cube.apply(x), ""),
    "new-style Function": (lambda _, x: CubeNew.apply(x), ""),
    "Function with a wrong backward": (lambda _, x: CubeWrong.apply(x), UP + "|Cube"),
    "Function once differentiable": (lambda _, x: CubeOnce.apply(x), UP + "|once_differentiable|Cube"),
    "Function with a wrong double backward": (lambda _, x: CubeDetached.apply(x), UP + "|Cube"),
    "Function with its slope stored on ctx": (lambda _, x: CubeStored.apply(x), UP + "|Cube"),
    "Function that clips its gradient": (lambda _, x: Clipped.apply(x).tanh(), UP + "|Clipped"),
    "Function that reverses its gradient": (lambda _, x: Reversed.apply(x).tanh(), UP + "|Reversed"),
    "hook that scales gradients": (hooked(0.5), UP + "|hook"),
    "hook that leaves gradients": (hooked(1.0), ""),
    "float32 inside": (low(torch.float32), UP + "|float32"),
    "bfloat16 inside": (low(torch.bfloat16), UP + "|bfloat16"),
    "float16 inside": (low(torch.float16), UP + "|float16|half"),
    "autocast to bfloat16": (autocast, UP + "|autocast|bfloat16"),
    "float64 inside": (lambda _, x: torch.tanh(x.double()).to(x.dtype), ""),
    "additive noise": (lambda _, x: x + torch.randn_like(x), RANDOM),
    "noise by NumPy": (lambda _, x: x + float(np.random.standard_normal()), RANDOM),
    "noise by Python": (lambda _, x: x * (1 + random.random()), RANDOM),
    "noise by a NumPy generator": (
        lambda _, x: x + float(GENERATOR.standard_normal()),
        RANDOM + "|not deterministic",
    ),
    "rare random branch": (rare(0.2), RANDOM),
    "very rare random branch": (rare(1e-4), RANDOM),
    "random permutation that does not matter": (
        lambda _, x: x[:, torch.randperm(4)].square().sum(-1, keepdim=True).tanh(),
        RANDOM,
    ),
    "noise that is reseeded": (reseeded, RANDOM),
    "noise from a generator of its own": (own_generator, ""),
    "noise reparametrised": (sampled, RANDOM),
    "where with NaN not taken": (lambda _, x: torch.where(x > 0, x.sqrt(), 0.3 * x), UP + "|finite|NaN"),
    "where made safe": (lambda _, x: torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.3 * x), ""),
    "square root at zero": (lambda _, x: (x.relu() * 0 + (x - x)).sqrt() + x.tanh(), UP + "|finite|NaN"),
    "square root of a relu": (lambda _, x: x.relu().sqrt(), UP + "|finite|NaN"),
    "absolute value": (lambda _, x: x.abs(), ""),
    "absolute value at zero": (lambda _, x: (x - x.detach()).abs() + x.tanh(), UP),
    "norm at zero": (lambda _, x: (x - x).norm(dim=-1, keepdim=True) + x.tanh(), UP + "|finite|NaN"),
    "norm": (lambda _, x: x / (1 + x.norm(dim=-1, keepdim=True)), ""),
    "norm that is infinite": (lambda _, x: x / x.norm(p=float("inf"), dim=-1, keepdim=True), ""),
    "power zero": (lambda _, x: x**0 + x.tanh(), ""),
    "power of a relu": (lambda _, x: x.relu() ** 1.5, UP + "|finite|NaN"),
    "power of an exponent": (lambda _, x: x.abs() ** x, ""),
    "x log x at zero": (lambda _, x: torch.special.xlogy(x * 0, x * 0) + x.tanh(), UP + "|finite|NaN"),
    "clamp": (lambda _, x: x.clamp(-0.3, 0.4), ""),
    "clamp in place": (lambda _, x: (x * 1.0).clamp_(-0.3, 0.4), ""),
    "maximum": (lambda _, x: x.max(-1, keepdim=True)[0], ""),
    "amax with ties": (lambda _, x: torch.cat([x, x], -1).amax(-1, keepdim=True).tanh(), ""),
    "top k": (lambda _, x: x.topk(2)[0].tanh(), ""),
    "median": (lambda _, x: x.median(-1, keepdim=True)[0].tanh(), ""),
    "quantile": (lambda _, x: torch.quantile(x, 0.4, dim=-1, keepdim=True).tanh(), ""),
    "sort": (lambda _, x: x.sort(-1)[0].tanh(), ""),
    "cumulative sum": (lambda _, x: x.cumsum(-1).tanh(), ""),
    "cumulative product": (lambda _, x: x.cumprod(-1), ""),
    "cumulative maximum": (lambda _, x: x.cummax(-1)[0].tanh(), ""),
    "logcumsumexp": (lambda _, x: x.logcumsumexp(-1), ""),
    "product with zeros": (lambda _, x: torch.cat([x, 0 * x[:, :1]], -1).prod(-1, keepdim=True) + x.tanh(), ""),
    "logsumexp": (lambda _, x: x.logsumexp(-1, keepdim=True), ""),
    "standard deviation": (lambda _, x: x.std(-1, keepdim=True), ""),
    "determinant": (lambda _, x: torch.linalg.det(x.reshape(-1, 2, 2))[:, None].tanh(), ""),
    "log-determinant": (lambda _, x: torch.logdet(positive(x))[:, None], ""),
    "inverse": (lambda _, x: torch.linalg.inv(positive(x)), ""),
    "solve": (lambda _, x: torch.linalg.solve(positive(x), x.reshape(-1, 2, 2)), ""),
    "pseudo-inverse": (lambda _, x: torch.linalg.pinv(positive(x)), ""),
    "cholesky": (lambda _, x: torch.linalg.cholesky(positive(x)), ""),
    "eigenvalues": (lambda _, x: torch.linalg.eigvalsh(positive(x)), ""),
    "eigenvectors": (lambda _, x: torch.linalg.eigh(positive(x))[1].abs(), ""),
    "equal eigenvalues": (
        lambda _, x: torch.linalg.eigh(x[:, :1, None] * torch.eye(2).to(x))[1] + x.tanh()[:, :2, None],
        UP + "|finite|NaN|linalg",
    ),
    "singular values": (lambda _, x: torch.linalg.svdvals(x.reshape(-1, 2, 2)), ""),
    "QR": (lambda _, x: torch.linalg.qr(positive(x))[1], ""),
    "matrix exponential": (lambda _, x: torch.linalg.matrix_exp(x.reshape(-1, 2, 2)), ""),
    "FFT": (fft, ""),
    "complex": (complex_product, ""),
    "einsum": (lambda _, x: torch.einsum("ni,nj,nk->nk", x, x.tanh(), x), ""),
    "batched product": (lambda _, x: torch.bmm(x[:, :, None], x[:, None]).tanh(), ""),
    "scatter add": (scattered, ""),
    "index add": (
        lambda _, x: torch.zeros_like(x).index_add(1, torch.tensor([0, 1, 0, 2], device=x.device), x.sin()),
        "",
    ),
    "index put accumulating": (
        lambda _, x: torch.zeros_like(x).index_put(
            (torch.arange(len(x), device=x.device)[:, None], torch.tensor([0, 1, 0, 2], device=x.device)),
            x.sin(),
            accumulate=True,
        ),
        "",
    ),
    "gather": (lambda _, x: x.gather(1, x.argsort(1)).tanh(), ""),
    "windows by unfold": (lambda _, x: x.unfold(1, 2, 1).prod(-1), ""),
    "strided view": (lambda _, x: x.contiguous().as_strided((len(x), 3, 2), (4, 1, 1)).prod(-1), ""),
    "filled in place": (filled, ""),
    "in place on a saved result": (lambda _, x: x.exp().add_(1.0).tanh(), UP + "|in-?place"),
    "Newton iteration": (newton_root, ""),
    "iteration until converged": (unconverged, UP + "|" + SUMMED),
    "implicit first derivative": (implicit, UP),
    "branch on a sum over the batch": (branch, SUMMED),
    "branch on each sample": (per_sample_branch, UP),
    ".item() as a factor": (lambda _, x: torch.tanh(x) * x.detach().square().mean().item(), UP + "|" + SUMMED),
    ".tolist() of a shape": (lambda _, x: x.reshape([-1, *torch.tensor([2, 2]).tolist()]).tanh(), ""),
    "centred over the batch": (lambda _, x: (x - x.mean(0)).tanh(), SUMMED),
    "sorted over the batch": (lambda _, x: x.sort(0)[0].tanh(), SUMMED),
    "first sample as a reference": (lambda _, x: (x - x[:1]).tanh(), SUMMED),
    "Bessel functions": (lambda _, x: torch.special.bessel_j0(x), UP + "|bessel"),
    "Bessel function i0": (lambda _, x: torch.special.i0(x), ""),
    "log-gamma": (lambda _, x: torch.lgamma(x.exp()), ""),
    "digamma": (lambda _, x: torch.digamma(x.exp()), ""),
    "error function": (lambda _, x: torch.erf(x) + torch.erfinv(x.tanh() / 2), ""),
    "sinc at zero": (lambda _, x: torch.sinc(x - x) + x.tanh(), UP),
    "arc tangent of two": (lambda _, x: torch.atan2(x, x.roll(1, -1)), ""),
    "hypotenuse": (lambda _, x: torch.hypot(x, x.roll(1, -1)), ""),
    "remainder": (lambda _, x: torch.remainder(x, 0.7).sin(), ""),
    "stop-gradient target": (lambda _, x: (x - x.tanh().detach()).square(), UP),
}
for name_, (function_, culprit_) in TRICKS.items():
    add(name_, lambda function=function_: between(Fn(function)), culprit_)

for drop in (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout):
    dropped = rf"body\.1|{drop.__name__}"
    add(f"{drop.__name__} train", lambda drop=drop: between(drop(0.5), tanh()), dropped)
    add(f"{drop.__name__} eval", lambda drop=drop: between(drop(0.5).eval(), tanh()))
    add(f"{drop.__name__} train p=0", lambda drop=drop: between(drop(0.0), tanh()), dropped)
add("dropout always on", lambda: between(Fn(lambda _, x: F.dropout(x, 0.5))), RANDOM)
add("dropout p=1", lambda: between(nn.Dropout(1.0), nn.Linear(4, 4)), r"body\.1|Dropout")
STATEFUL = {
    "counter": (Counter, r"body\.1|Counter|not deterministic"),
    "moving average that does not matter": (partial(Average, matters=False), r"body\.1|Average"),
    "moving average that matters": (partial(Average, matters=True), r"body\.1|Average"),
    "state carried between calls": (Carried, r"body\.1|Carried|not deterministic"),
    "value cached from a parameter": (Cached, r"body\.1\.weight|Cached"),
    "dropout that switches itself off": (Switched, r"body\.1|Switched|Dropout|not deterministic"),
    "noise in a buffer": (lambda: Fn(fixed_noise, noise=normal(4)), ""),
    "sparse matrix in a buffer": (lambda: Fn(sparse_mm, graph=eye4()), ""),
    "complex buffer": (
        lambda: Fn(lambda m, x: (m.rotation * x).real.tanh(), rotation=torch.polar(torch.ones(4), normal(4))),
        "",
    ),
    "integer and boolean buffers": (
        lambda: Fn(
            lambda m, x: (x[:, m.order] * m.mask).tanh(),
            order=torch.tensor([2, 0, 3, 1]),
            mask=torch.tensor([True, False, True, True]),
        ),
        "",
    ),
    "buffer that is NaN and unused": (lambda: Fn(lambda m, x: x.tanh(), bad=torch.full((2,), float("nan"))), ""),
    "frozen random projection": (
        lambda: Fn(lambda m, x: torch.tanh(x @ m.map), map=nn.Parameter(normal(4, 4), requires_grad=False)),
        "",
    ),
    "complex parameter": (
        lambda: Fn(
            lambda m, x: (m.rotation * x).real.tanh(), rotation=nn.Parameter(torch.polar(torch.ones(4), normal(4)))
        ),
        r"rotation",
    ),
}
for name_, (part, culprit_) in STATEFUL.items():
    add(name_, lambda part=part: between(part()), culprit_)


def zero_head(body):
    model, *rest = between(body)
    model.head[1].weight.data.zero_()
    model.head[1].bias.data.zero_()
    return model, *rest


def zero_bias(body, x):
    """A sample of zeros and biases of zero: the pre-activations lie at the kink."""
    model, *rest = between(body, x=x)
    model.body[0].bias.data.zero_()
    return model, *rest


WITH_ZEROS = torch.cat([normal(6, 5), torch.zeros(1, 5)])
add("zero head over a layer norm", lambda: zero_head(nn.Sequential(nn.LayerNorm(4), tanh())))
add("zero head over a wrong backward", lambda: zero_head(Fn(lambda _, x: CubeWrong.apply(x))), UP + "|Cube")
add("zero head over a wrong double backward", lambda: zero_head(Fn(lambda _, x: CubeDetached.apply(x))), UP + "|Cube")
for kinked in (nn.ReLU(), nn.LeakyReLU(0.1), nn.Softshrink(0.0), nn.ELU(0.5), nn.Hardtanh(0.0, 1.0)):
    add(
        f"{kinked!r} at its kink",
        lambda kinked=kinked: zero_bias(copy.deepcopy(kinked), WITH_ZEROS),
        r"body\.[01]|kink|differentiable",
    )
for kinked in (nn.ELU(), nn.CELU(0.5), nn.GELU(), nn.Softplus()):
    add(
        f"{kinked!r} at zero",
        lambda kinked=kinked: zero_bias(copy.deepcopy(kinked), WITH_ZEROS),
        r"body\.[01]|kink|differentiable",
    )
add(
    "max pool of ties that stay",
    lambda: classifier(
        nn.Sequential(nn.Conv1d(1, 3, 1), nn.MaxPool1d(2), tanh()), normal(5, 1, 3).repeat_interleave(2, 2)
    ),
)
add(
    "max pool of ties that break",
    lambda: classifier(
        nn.Sequential(
            nn.Conv1d(1, 2, 1, bias=False),
            Fn(lambda m, x: x + m.shift, shift=nn.Parameter(torch.zeros(6))),
            nn.MaxPool1d(2),
            tanh(),
        ),
        torch.ones(5, 1, 6) * normal(5, 1, 1),
    ),
    r"body\.1\.shift|body\.2|kink|differentiable",
)
add(
    "absolute error of a linear model",
    lambda: supervised(nn.Linear(5, 3), nn.L1Loss(), torch.cat([normal(6, 5), torch.zeros(1, 5)]), normal(7, 3)),
)
add("dead relu", lambda: between(Fn(lambda _, x: (x - 50).relu() + x.tanh())))
add("saturated softmax", lambda: between(Fn(lambda _, x: (200 * x).softmax(-1) + x.tanh())))
add(
    "huge and tiny scales",
    lambda: between(
        Fn(
            lambda m, x: m.big * 1e-6 * x.tanh() + 1e-5 * m.small,
            big=nn.Parameter(1e6 + normal(4)),
            small=nn.Parameter(normal(4)),
        )
    ),
)
add("catastrophic cancellation", lambda: between(Fn(lambda _, x: (x + 1e9) - 1e9 + x.tanh())), UP)
add("linear model and linear loss", lambda: supervised(nn.Linear(5, 1), lambda o, y: o.mean(), normal(7, 5), labels(7)))
add(
    "loss that does not depend on the data",
    lambda: supervised(ce_net(), lambda o, y: (0 * o).sum(), normal(7, 5), labels(7)),
)
