"""Layers."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, add, between, classifier, normal, shaken

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


add(
    "grid sample", lambda: classifier(Fn(grid_sample, net=nn.Linear(9, 6)), normal(4, 1, 3, 3)), r"grid_sampl|body\.net"
)
add(
    "fractional max pool",
    lambda: classifier(nn.Sequential(nn.Conv2d(1, 2, 2), nn.FractionalMaxPool2d(2, 2)), normal(4, 1, 6, 6)),
    r"body\.1|FractionalMaxPool|random",
)
