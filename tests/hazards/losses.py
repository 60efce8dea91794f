"""Losses, objectives, and what a batch may be."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from zoo import Tied, heat_objective, tanh_net

from hazards.base import Fn, add, call, labels, normal, objective, supervised
from hazards.tokens import TOKENS, WITH_PAD

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
