"""Applications of weights as linear maps: what was seen, put together again, is what the layer gave."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.engines.linear_uses import Uses

IMAGES = torch.randn(3, 2, 5, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[0, 2, 1], [3, 3, 0]])

LAYERS = {
    "dense": (nn.Linear(6, 4), IMAGES[:, 0]),
    "dense on one position": (nn.Linear(6, 4), IMAGES[:, 0, 0]),
    "one dimension": (nn.Conv1d(5, 4, 2, stride=2, padding=1, dilation=2), IMAGES[:, 0]),
    "two dimensions": (nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), IMAGES),
    "embedding": (nn.Embedding(4, 5), TOKENS),
}


def seen(call, parameters, shifts=None):
    watch = Uses({id(p): name for name, p in parameters.items()}, shifts or {})
    with watch:
        z = call()
    return watch, z


@pytest.mark.parametrize("name", LAYERS)
def test_z_is_a_times_w_plus_b(name):
    layer, given = LAYERS[name]
    watch, z = seen(lambda: layer(given), dict(layer.named_parameters()))
    (use,) = watch.uses
    assert not watch.otherwise
    assert (use.weight, use.bias) == ("weight", "bias" if getattr(layer, "bias", None) is not None else None)
    a = F.one_hot(use.input, 4).float() if use.patches is None else use.input
    weight = layer.weight.T if use.patches is None else layer.weight.flatten(1)
    expected = a @ weight.T + (0 if use.bias is None else layer.bias)
    torch.testing.assert_close(use.by_position(z), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(use.of_position(use.by_position(z)), z)
    several = torch.stack([z, 2 * z])  # dimensions before the samples stay
    torch.testing.assert_close(use.of_position(use.by_position(several)), several)


def test_shifts_are_added_at_their_place():
    layer = nn.Linear(6, 6)
    x = IMAGES[:, 0, 0]
    _, z = seen(lambda: layer(layer(x)), dict(layer.named_parameters()), {1: torch.ones(3, 6)})
    torch.testing.assert_close(z, layer(layer(x)) + 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda w: F.conv2d(IMAGES, w, groups=2),
        lambda w: F.conv2d(IMAGES, w.repeat(1, 2, 1, 1)[:, :, :1, :1], padding="same"),
        lambda w: w.square().sum() * IMAGES,
        lambda w: torch.zeros(2, 1, 2, 2).copy_(w),
    ],
)
def test_other_uses_are_noted_as_such(call):
    w = nn.Parameter(torch.randn(2, 1, 2, 2))
    watch, _ = seen(lambda: call(w), {"w": w})
    assert not watch.uses
    assert watch.otherwise == {"w"}


def test_shapes_and_types_are_no_uses():
    w = nn.Parameter(torch.ones(2, 2))
    watch, _ = seen(lambda: (w.shape, w.dtype, w.requires_grad), {"w": w})
    assert not watch.uses
    assert not watch.otherwise


def test_a_parameter_that_is_an_input_is_used_otherwise_too():
    layer, prompt = nn.Linear(2, 2), nn.Parameter(torch.ones(1, 2))
    watch, _ = seen(lambda: layer(prompt), {**dict(layer.named_parameters()), "prompt": prompt})
    assert len(watch.uses) == 1
    assert watch.otherwise == {"prompt"}
