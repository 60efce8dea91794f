"""Calls of every operation that is written out, each with inputs at which it is smooth."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn, special

from pipeline.problem.plain_special import POLYNOMIALS, SLOPES

LAST = torch.channels_last
INF = float("inf")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ints(top, *shape):
    return torch.randint(top, shape, generator=torch.Generator().manual_seed(1))


@dataclass
class Case:
    name: str  # of what is replaced
    function: object
    inputs: list


CASES = {}


def add(label, name, function, *inputs):
    CASES[label] = Case(name, function, list(inputs))


for dim in (0, 1, -1):
    g = {0: (4, 1), 1: (1, 3), -1: ()}[dim]
    add(f"weight norm {dim}", "weight norm", lambda v, g, d=dim: torch._weight_norm(v, g, d), normal(4, 3), normal(*g))

DIRECT, PRODUCTS = "donot_use_mm_for_euclid_dist", "use_mm_for_euclid_dist"
for p in (0.5, 1, 1.5, 2.0, 3, INF):
    add(f"cdist {p}", "cdist", lambda a, b, p=p: torch.cdist(a, b, p), normal(2, 4, 3), normal(5, 3, seed=1))
    add(f"cdist self {p}", "cdist", lambda a, p=p: torch.cdist(a, a, p=p), normal(4, 3))
    add(f"pdist {p}", "pdist", lambda a, p=p: F.pdist(a, p), normal(4, 3))
add("cdist direct", "cdist", lambda a: torch.cdist(a, a, compute_mode=DIRECT), normal(27, 2))
add("cdist by products", "cdist", lambda a, b: torch.cdist(a, b, 2, PRODUCTS), normal(2, 3, 3), normal(2, 4, 3, seed=1))
add("cdist of many", "cdist", lambda a, b: torch.cdist(a, b), normal(27, 2), normal(2, 2, seed=1))
add("pdist of equal rows", "pdist", lambda a: F.pdist(torch.cat([a, a])), normal(2, 3))

TOKENS, STARTS, WEIGHTS = torch.tensor([0, 4, 1, 1, 3, 2, 1]), torch.tensor([0, 2, 2, 5]), normal(7, seed=2)
for mode in ("sum", "mean", "max"):
    for label, options in {
        "": {},
        "last offset": {"include_last_offset": True},
        "padded": {"padding_idx": 1},
        "padded from behind": {"padding_idx": -1},
        "sparse": {"sparse": mode != "max"},
    }.items():
        bag = lambda w, o=options, m=mode: F.embedding_bag(TOKENS, w, STARTS, mode=m, **o)
        add(f"embedding bag {mode} {label}", "embedding bag", bag, normal(5, 2))
    table = lambda w, m=mode: F.embedding_bag(ints(5, 3, 4), w, mode=m, padding_idx=2)
    add(f"embedding bag {mode} of a table", "embedding bag", table, normal(5, 2))
weighted = lambda w, q: F.embedding_bag(TOKENS, w, STARTS, mode="sum", per_sample_weights=q, padding_idx=4)
add("embedding bag weighted", "embedding bag", weighted, normal(5, 2), WEIGHTS)
weighted = lambda w, q: F.embedding_bag(ints(5, 3, 4), w, mode="sum", per_sample_weights=q)
add("embedding bag weighted table", "embedding bag", weighted, normal(5, 2), normal(3, 4))

for reduction in ("none", "mean", "sum"):
    for label, options in {"": {}, "squared": {"p": 2, "margin": 0.7, "weight": normal(4).exp()}}.items():
        margin = lambda x, o=options, r=reduction: F.multi_margin_loss(x, ints(4, 3), reduction=r, **o)
        add(f"multi-margin {label} {reduction}", "multi-margin loss", margin, normal(3, 4))
    labels = torch.tensor([[2, 0, -1, 1], [-1, 3, 3, 3], [3, 1, 0, 2], [1, 1, -1, -1]])
    margin = lambda x, r=reduction, y=labels: F.multilabel_margin_loss(x, y, reduction=r)
    add(f"multi-label margin {reduction}", "multi-label margin loss", margin, normal(4, 4))
add("multi-margin of one", "multi-margin loss", lambda x: F.multi_margin_loss(x, torch.tensor(1)), normal(4))
one = lambda x: F.multilabel_margin_loss(x, torch.tensor([1, 0, -1, -1]))
add("multi-label margin of one", "multi-label margin loss", one, normal(4))


def ctc(targets, steps, sizes, **options):
    return lambda x: F.ctc_loss(x.log_softmax(-1), targets, steps, sizes, **options)


LABELS = torch.tensor([[1, 1, 3], [2, 0, -5], [3, 2, 2], [1, 1, 1]])
SIZES, JOINED = (3, 1, 2, 0), torch.tensor([1, 1, 3, 2, 3, 2])
for reduction in ("none", "mean", "sum"):
    lengths = torch.tensor([6, 5, 3, 4]), torch.tensor(SIZES)
    add(f"CTC {reduction}", "CTC loss", ctc(LABELS, *lengths, reduction=reduction), normal(6, 4, 4))
add("CTC joined targets", "CTC loss", ctc(JOINED, (6, 5, 3, 4), SIZES), normal(6, 4, 4))
add("CTC other blank", "CTC loss", ctc(LABELS[:1, :2] - 1, (4,), (2,), blank=3), normal(4, 1, 4))
add("CTC of one", "CTC loss", ctc(LABELS[0], torch.tensor(5), torch.tensor(3)), normal(6, 4))
impossible = ctc(LABELS, (6, 5, 1, 0), SIZES, reduction="none", zero_infinity=True)
add("CTC impossible, as zero", "CTC loss", impossible, normal(6, 4, 4))

add("hardsigmoid", "hardsigmoid", F.hardsigmoid, 4 * normal(6))
add("hardsigmoid in place", "hardsigmoid", lambda x: nn.Hardsigmoid(inplace=True)(x.sin() * 4), normal(6))
for reduce in ("sum", "mean", "prod", "max", "min"):
    for label, options in {
        "lengths": {"lengths": torch.tensor([2, 1, 3])},
        "offsets": {"offsets": torch.tensor([0, 2, 2, 6]), "initial": 0.3},
    }.items():
        segments = lambda x, r=reduce, o=options: torch.segment_reduce(x, r, **o)
        add(f"segment {reduce} by {label}", "segment reduction", segments, normal(6, 2))
chunked = lambda x, w, b: F.linear_cross_entropy(
    x, w, ints(5, 4), linear_bias=b, options=nn.LinearCrossEntropyOptions(batch_chunk_size=2)
)
add("chunked cross-entropy", "chunked cross-entropy", chunked, normal(4, 3), normal(5, 3), normal(5))

NEAR_ZERO = torch.tensor([0.0, 1e-5, 0.03, 0.032, -0.7, 3.3], dtype=torch.float64)
for owner in (torch, special, torch.Tensor):
    add(f"sinc of {owner.__name__}", "sinc", owner.sinc, NEAR_ZERO)
for name in SLOPES:
    add(name, "Bessel function", getattr(special, name), 0.3 + normal(5).abs())
for name in ("modified_bessel_i0", "modified_bessel_i1", "bessel_j0", "bessel_j1", "spherical_bessel_j0"):
    add(f"{name} around 0", "Bessel function", getattr(special, name), torch.cat([normal(5), torch.zeros(1)]))
for name in POLYNOMIALS:
    for n in (0, 5):
        polynomial = lambda x, name=name, n=n: getattr(special, name)(x, n) * x
        add(f"{name} {n}", "orthogonal polynomial", polynomial, normal(5).sigmoid())

add("masked select", "broadcast masked select", lambda x: x.masked_select(ints(2, 3) > 0), normal(2, 3))
add("masked select widely", "broadcast masked select", lambda x: torch.masked_select(x, ints(2, 2, 3) > 0), normal(3))
AT = torch.tensor(2)
add("index_select", "index without a dimension", lambda x: x.index_select(0, AT), normal(5, 2))
add("index_add", "index without a dimension", lambda x, y: x.index_add(0, AT, source=y, alpha=2), normal(5), normal(1))
for reduce in ("prod", "mean", "amax"):
    reduced = lambda x, y, r=reduce: torch.index_reduce(x, 0, AT, y, r)
    add(f"index_reduce {reduce}", "index without a dimension", reduced, normal(5, 2), normal(1, 2, seed=1))
copied = lambda x, y: torch.zeros(5, dtype=x.dtype).add(x).index_copy_(0, AT, y)
add("index_copy_ of a number", "index without a dimension", copied, normal(5), torch.tensor(0.3, dtype=torch.float64))
for label, pool in {
    "2d": lambda x: F.max_pool2d(x, 2),
    "2d indices": lambda x: nn.MaxPool2d(2, return_indices=True)(x)[0],
    "2d adaptive": lambda x: F.adaptive_max_pool2d(x, 2),
    "2d of torch": lambda x: torch.max_pool2d(x, 2),
}.items():
    last = lambda x, pool=pool: pool(x.contiguous(memory_format=LAST))
    add(f"channels-last pool {label}", "channels-last max pooling", last, normal(2, 3, 4, 4))
pool = lambda x: F.max_pool3d(x.contiguous(memory_format=torch.channels_last_3d), 2)
add("channels-last pool 3d", "channels-last max pooling", pool, normal(1, 2, 4, 4, 4))

GRAPH = (normal(4, 4) * (ints(2, 4, 4) > 0)).to_sparse()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "in beta state"
    ROWS = GRAPH.to_sparse_csr()
for label, graph in {"coo": GRAPH, "csr": ROWS}.items():
    for way, product in {
        "@": lambda x, a=graph: a @ x,
        "@ vector": lambda x, a=graph: a @ x[:, 0],
        "mm": lambda x, a=graph: torch.mm(a, x),
        "sparse.mm": lambda x, a=graph: torch.sparse.mm(a, x),
        "dense @": lambda x, a=graph: x.mT @ a,
        "addmm": lambda x, a=graph: torch.addmm(x, a, x, beta=0.5, alpha=2),
        "sparse.addmm": lambda x, a=graph: torch.sparse.addmm(x, a, x, alpha=2),
    }.items():
        add(f"{label} {way}", "product with a sparse matrix", product, normal(4, 3))
