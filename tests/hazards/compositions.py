"""What a composition is, and its losses: in torch's form, as a user writes them, and of several passes or terms."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, OUTPUTS = 7, 3
CLASS_WEIGHTS = torch.tensor([0.25, 1.0, 3.0])
DECAY, PULL, SCALE = 0.02, 0.3, 0.5
LOSSES = ("mse", "huber", "ce", "ignored", "weighted classes", "smoothed")
WAYS = ("torch", "closure", "pair", "two passes", "terms")
FORMS = ("tuple", "loader", "data set", "flags", "three parts", "numpy")
PARAMS = (None, "*weight*", ("!*head.bias",), ("*head*", "*front*"))


@dataclass(frozen=True)
class Composition:
    """A problem by the names of its ingredients; made again from its repr.

    Scales are powers of ten: of each feature, where there are some; of the front's weights, beyond what undoes the
    features' scales where the weights are fitted.
    """

    front: str = "features"
    layers: tuple[str, ...] = ("tanh",)
    wrapper: str = "none"
    loss: str = "mse"
    way: str = "torch"
    form: str = "tuple"
    features: tuple[int, ...] = (0, 0, 0, 0)
    weights: int = 0
    fitted: bool = True
    dtype: str = "float64"
    separable: bool = True
    microbatch: int | None = None
    params: str | tuple[str, ...] | None = None
    l2: float = 0.0
    reduction: str = "mean"
    seed: int = 0


def values(c: Composition, o: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each sample, and its weight."""
    if c.loss in {"mse", "huber"}:
        each = (o - y) ** 2 if c.loss == "mse" else F.huber_loss(o, y, reduction="none", delta=0.7)
        return each.sum(1), torch.full_like(each[:, 0], OUTPUTS)
    if c.loss == "smoothed":
        return F.cross_entropy(o, y, reduction="none", label_smoothing=0.1), torch.ones_like(o[:, 0])
    weight = CLASS_WEIGHTS.to(o) if c.loss == "weighted classes" else torch.ones_like(o[0])
    counts = torch.where(y == -100, 0.0, weight[y.clamp(min=0)])
    return counts * F.cross_entropy(o, y.clamp(min=0), reduction="none"), counts


def torch_loss(c: Composition) -> nn.Module:
    return {
        "mse": lambda: nn.MSELoss(reduction=c.reduction),
        "huber": lambda: nn.HuberLoss(reduction=c.reduction, delta=0.7),
        "ce": lambda: nn.CrossEntropyLoss(reduction=c.reduction),
        "ignored": lambda: nn.CrossEntropyLoss(reduction=c.reduction),
        "weighted classes": lambda: nn.CrossEntropyLoss(CLASS_WEIGHTS, reduction=c.reduction),
        "smoothed": lambda: nn.CrossEntropyLoss(label_smoothing=0.1, reduction=c.reduction),
    }[c.loss]()


def user_loss(c: Composition, model: nn.Module):
    """The loss as a user writes it: a scalar that closes over the model, or (sum, weight)."""

    def loss(o, y, w=None):
        each, weight = values(c, o, y["y"] if isinstance(y, dict) else y)
        if w is not None:
            each, weight = w * each, w * weight
        if c.way != "closure":
            return each.sum(), weight.sum()
        decay = DECAY * sum(p.pow(4).sum() for p in model.parameters())
        return each.sum() / len(o) + decay if c.reduction == "mean" else each.sum() + len(o) * decay

    return loss


def two_passes(c: Composition, other):
    """An objective that pulls the outputs of two inputs together."""

    def objective(call, batch):
        x, y = batch
        o = call(x)
        return values(c, o, y)[0].sum() + PULL * (o - call(other(x))).square().sum(), len(o)

    return objective


def anchored(call, x):
    """A term of its own over its own data, a tensor alone."""
    return call(x).square().mean()


def reduced(c: Composition, found):
    if not isinstance(found, tuple):
        return found
    return found[0] / found[1] if c.reduction == "mean" or c.way == "terms" else found[0]
