"""Activations."""

import copy

from torch import nn

from hazards.base import Fn, add, between, classifier, normal

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
