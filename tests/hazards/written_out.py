"""Operations of torch without a double backward, or with a wrong one, that plain operations can stand for."""

import torch
import torch.nn.functional as F
from torch import nn

from hazards.base import Fn, adding, labels, normal, supervised

add = adding("no double backward")
X, Y, TARGETS = normal(7, 4), labels(7), normal(7, 2, seed=3)
TOKENS, WEIGHTS = labels(7, 4, classes=6), torch.tensor([0.5, 1.0, 2.0])


def net(out=3):
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, out))


def bag(mode, **options):
    embed = nn.EmbeddingBag(6, 3, mode=mode, **options)
    return Fn(lambda m, t: m.head(torch.tanh(m.embed(t))), embed=embed, head=nn.Linear(3, 3))


def weighted_bag(m, t, w):
    return m.head(torch.tanh(m.embed(t, per_sample_weights=w)))


def bag_of_offsets(m, t):
    """The bags one after the other, as text classifiers pass them."""
    return m.head(torch.tanh(m.embed(t.flatten(), torch.arange(len(t)).to(t) * t.shape[1])))


def functional_bag(m, t):
    return m.head(torch.tanh(F.embedding_bag(t, m.table, mode="mean")))


def prototypes(distance):
    """Distances to points that are learnt."""
    return lambda: Fn(
        lambda m, x: -distance(m.net(x), m.points), net=nn.Linear(4, 2), points=nn.Parameter(normal(3, 2, seed=5))
    )


def pairwise(m, x):
    """Distances between a set's members."""
    return torch.stack([torch.pdist(torch.tanh(m.net(points))) for points in x.view(-1, 4, 1)])


def sampled(m, x):
    """A spatial transformer: an image is read where the model says."""
    grid = torch.tanh(m.net(x)).view(-1, 1, 2, 2)
    return m.head(F.grid_sample(x.view(-1, 1, 2, 2), grid, align_corners=False).flatten(1))


def squared_distances(a, b):
    return torch.cdist(a, b).square()


DISTANCES = {
    "cdist": torch.cdist,
    "cdist by matrix products": lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
    "cdist without them": lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"),
    "cdist of order one": lambda a, b: torch.cdist(a, b, p=1.0),
    "cdist of order three": lambda a, b: torch.cdist(a, b, p=3.0),
    "cdist squared": squared_distances,
    "cdist in a kernel": lambda a, b: (-torch.cdist(a[None], b[None])[0]).exp(),
}
for name_, distance_ in DISTANCES.items():
    add(
        f"written out: {name_}",
        lambda d=distance_: supervised(prototypes(d)(), nn.CrossEntropyLoss(), X, Y),
        r"cdist" if "order" in name_ else r"use_mm_for_euclid_dist",
    )
for mode_ in ("sum", "mean", "max"):
    add(
        f"written out: embedding bag, {mode_}",
        lambda mode=mode_: supervised(bag(mode), nn.CrossEntropyLoss(), TOKENS, Y),
        "EmbeddingBag|embed" if mode_ == "max" else "",
    )
for options_ in ({"sparse": True}, {"include_last_offset": False}):
    add(
        f"written out: embedding bag, {options_}",
        lambda options=options_: supervised(bag("sum", **options), nn.CrossEntropyLoss(), TOKENS, Y),
    )
add(
    "written out: embedding bag with weights of samples",
    lambda: supervised(
        Fn(weighted_bag, embed=nn.EmbeddingBag(6, 3, mode="sum"), head=nn.Linear(3, 3)),
        nn.CrossEntropyLoss(),
        (TOKENS, normal(7, 4, seed=6)),
        Y,
    ),
)
add(
    "written out: embedding bag by offsets",
    lambda: supervised(
        Fn(bag_of_offsets, embed=nn.EmbeddingBag(6, 3), head=nn.Linear(3, 3)), F.cross_entropy, TOKENS, Y
    ),
)
add(
    "written out: embedding bag as a function",
    lambda: supervised(
        Fn(functional_bag, table=nn.Parameter(normal(6, 3)), head=nn.Linear(3, 3)), F.cross_entropy, TOKENS, Y
    ),
)
MARGINS = {
    "module": lambda: nn.MultiMarginLoss(margin=0.7),
    "squared and weighted": lambda: nn.MultiMarginLoss(p=2, weight=WEIGHTS),
    "function": lambda: F.multi_margin_loss,
    "in a closure": lambda: lambda o, y: F.multi_margin_loss(o, y, p=2) + 0.1 * o.square().mean(),
    "a sum": lambda: nn.MultiMarginLoss(reduction="sum"),
}
for name_, loss_ in MARGINS.items():
    add(f"written out: multi-margin, {name_}", lambda loss=loss_: supervised(net(), loss(), X, Y))
add(
    "written out: multi-label margin",
    lambda: supervised(net(), nn.MultiLabelMarginLoss(), X, torch.tensor([[0, 2, -1], [1, -1, -1]] * 3 + [[2, 1, 0]])),
    r"multi_?label_?margin",
)
add(
    "written out: pdist",
    lambda: supervised(Fn(pairwise, net=nn.Linear(1, 2)), nn.MSELoss(), X, normal(7, 6, seed=4)),
    "pdist",
)
add(
    "written out: grid sample",
    lambda: supervised(Fn(sampled, net=nn.Linear(4, 4), head=nn.Linear(2, 2)), nn.MSELoss(), X, TARGETS),
    r"grid_sampl",
)
