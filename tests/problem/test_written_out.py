"""Operations written out: torch's value, its gradient where it has one, second derivatives that differences show."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, special
from torch.func import grad, vjp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from written_cases import CASES, DIRECT, GRAPH, LAST, ints, normal

from pipeline import Problem
from pipeline.problem.finite_differences import agreeing, fourth_order
from pipeline.problem.written_out import PLAIN, REMEDIES, WEIGHT_NORM, WrittenOut, needed

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce.. is in beta:UserWarning")


def scalar(value):
    """Bend a value, so that its derivatives meet others behind it."""
    return (normal(*value.shape, seed=3) * value + 0.5 * normal(*value.shape, seed=4) * value**2).sum()


def gradient(case, inputs, *, create_graph=False):
    own = [x.detach().clone().requires_grad_() for x in inputs]
    value = scalar(case.function(*own))
    return own, torch.autograd.grad(value, own, create_graph=create_graph, materialize_grads=True)


def along(parts, direction):
    return sum(float((part * d).sum()) for part, d in zip(parts, direction, strict=True))


def difference(function, case, direction):
    """Differentiate a number along a direction of the inputs, at steps that agree."""

    def line(t):
        return np.array([function([x + t * d for x, d in zip(case.inputs, direction, strict=True)])])

    found = agreeing(lambda step: [fourth_order(line, step)], lambda parts: [max(abs(float(parts[0][0])), 1e-2)])
    assert found.gap < 1e-4
    return pytest.approx(float(found.values[0][0]), rel=max(1e-6, 10 * found.gap), abs=1e-7)


def directions(case, seed):
    return [normal(*x.shape, seed=seed) for x in case.inputs]


@pytest.fixture(params=CASES, ids=str)
def known(request):
    return CASES[request.param]


def test_the_value_is_torchs(known):
    torchs = known.function(*known.inputs)
    with WrittenOut() as mode:
        found = known.function(*known.inputs)
    assert mode.replaced == {known.name}
    slack = 1e-7 if torchs.dim() > 1 and bool((found.diagonal() == 0).all()) else 0  # torch's rounding in cdist(a, a)
    torch.testing.assert_close(found, torchs, rtol=1e-12, atol=1e-13 + slack)


def test_the_gradient_is_the_values_and_its_own_torchs(known):
    direction = directions(known, 5)
    with WrittenOut():
        _, found = gradient(known, known.inputs)
        assert along(found, direction) == difference(lambda at: float(scalar(known.function(*at))), known, direction)
    if not known.name.startswith(("Bessel", "orthogonal")):
        for own, torchs in zip(found, gradient(known, known.inputs)[1], strict=True):
            # In torch hardsigmoid's slope is a sixth in single precision.
            slack = 1e-7 if known.name == "hardsigmoid" else 1e-9
            torch.testing.assert_close(own, torchs.to_dense(), rtol=slack, atol=1e-11)


def test_double_backward_is_the_gradients(known):
    row, column = directions(known, 5), directions(known, 6)
    with WrittenOut():
        own, slopes = gradient(known, known.inputs, create_graph=True)
        slope = sum((part * d).sum() for part, d in zip(slopes, row, strict=True))
        products = torch.autograd.grad(slope, own, materialize_grads=True) if slope.requires_grad else row[:0]
        assert along(products, column[: len(products)]) == difference(
            lambda at: along(gradient(known, at)[1], row), known, column
        )


def test_many_rows_are_pulled_back_at_once(known):
    def slopes(*inputs):
        return grad(lambda *own: scalar(known.function(*own)), argnums=tuple(range(len(inputs))))(*inputs)

    rows = tuple(torch.stack([a, b]) for a, b in zip(directions(known, 5), directions(known, 6), strict=True))
    with WrittenOut():
        pull_back = vjp(slopes, *known.inputs)[1]
        with torch.no_grad():
            together = vmap(pull_back)(rows)
        for k in (0, 1):
            alone = pull_back(tuple(row[k] for row in rows))
            for many, one in zip(together, alone, strict=True):
                torch.testing.assert_close(many[k], one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "function",
    {
        "cdist that counts": lambda x: torch.cdist(x, x, p=0),
        "cdist of nothing": lambda x: torch.cdist(x[:0], x),
        "embedding bag that renorms": lambda x: F.embedding_bag(ints(5, 3, 2), x.clone(), max_norm=0.1),
        "segment reduction of columns": lambda x: torch.segment_reduce(
            x, "sum", lengths=torch.ones(5, 3).long(), axis=1
        ),
        "cross-entropy": lambda x: F.linear_cross_entropy(x, x, ints(5, 5)),
        "masked select": lambda x: x.masked_select(x > 0),
        "index": lambda x: x.index_select(0, torch.tensor([2])),
        "pool": lambda x: F.max_pool2d(x[None, None], 2),
        "product": lambda x: x @ x.mT,
        "product into": lambda x: torch.mm(GRAPH, x[:4], out=torch.zeros(4, 3).double()),
        "sinc into": lambda x: torch.sinc(x, out=torch.zeros(5, 3).double()),
        "learnt sparse matrix": lambda x: x[:4].detach().to_sparse().requires_grad_() @ x[:3],
        "polynomial of many degrees": lambda x: special.hermite_polynomial_h(x, torch.arange(3.0)),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_not_known_is_torchs(function):
    x = normal(5, 3)
    with WrittenOut() as mode:
        found = function[1](x)
    assert not mode.replaced
    torch.testing.assert_close(found, function[1](x), rtol=0, atol=0)


def test_equal_rows_have_no_second_derivatives():
    """Of many points torch's are of 1 / rounding there."""
    x = normal(3, 2).repeat(10, 1).requires_grad_()
    with WrittenOut():
        distances = torch.cdist(x, x)
        assert distances[0, 3] == distances[4, 4] == 0
        (slope,) = torch.autograd.grad(distances.sum(), x, create_graph=True)
        (product,) = torch.autograd.grad(slope.sum(), x)
    direct = torch.cdist(x[:3], x[:3], compute_mode=DIRECT).sum()
    torch.testing.assert_close(slope[:3], 10 * torch.autograd.grad(direct, x)[0][:3])
    assert product.abs().max() < 1e-10  # a shift of all


def test_layers_of_torch_meet_the_table():
    x = normal(6, 4)
    bag, tail = nn.EmbeddingBag(5, 4).double(), nn.AdaptiveLogSoftmaxWithLoss(4, 8, [3, 5], div_value=2).double()
    images = x[None, None].repeat(1, 2, 1, 1).contiguous(memory_format=LAST)
    layers = {
        "embedding bag": lambda: bag(ints(5, 3, 2)),
        "index without a dimension": lambda: tail(x, torch.tensor([0, 1, 6, 7, 2, 3])),
        "CTC loss": lambda: nn.CTCLoss()(x.log_softmax(-1), torch.tensor([1, 2]), torch.tensor(6), torch.tensor(2)),
        "multi-margin loss": lambda: nn.MultiMarginLoss()(x, ints(4, 6)),
        "multi-label margin loss": lambda: nn.MultiLabelMarginLoss()(x, ints(4, 6, 4)),
        "hardsigmoid": lambda: nn.Hardsigmoid()(x),
        "channels-last max pooling": lambda: (nn.MaxPool2d(2)(images), nn.AdaptiveMaxPool2d(2)(images)),
        "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3).double())(x),
        "cdist": lambda: nn.TripletMarginWithDistanceLoss(distance_function=torch.cdist)(x, x.sin(), x.cos()),
    }
    for name, evaluate in layers.items():
        assert needed(evaluate) == [f"{name} written out"]
    assert needed(lambda: [evaluate() for evaluate in layers.values()]) == [
        f"{name} written out" for name in sorted(layers)
    ]
    assert needed(lambda: nn.Linear(4, 3).double()(x)) == []


def test_adaptive_softmax_is_pulled_back_at_once():
    """One sample beyond a cutoff has an index without a dimension."""
    tail = nn.AdaptiveLogSoftmaxWithLoss(4, 8, [3, 5], div_value=2).double()

    def slopes(weight):
        def loss(weight):
            return torch.func.functional_call(tail, {"head.weight": weight}, (weight, torch.tensor([0, 6, 1, 2, 1])))[1]

        return grad(loss)(weight)

    with WrittenOut():
        rows = vmap(vjp(slopes, normal(5, 4))[1])(torch.eye(20, dtype=torch.float64).reshape(20, 5, 4))[0]
    torch.testing.assert_close(rows.reshape(20, 20), rows.reshape(20, 20).mT)


def hessian_of_layer(call):
    """The Hessian of a layer with weight norm, by double backward on its own parameters."""
    layer = parametrizations.weight_norm(nn.Linear(3, 2)).double()
    with torch.no_grad():
        for k, p in enumerate(layer.parameters()):
            p.copy_(normal(*p.shape, seed=k))
    own = list(layer.parameters())
    with WrittenOut({WEIGHT_NORM}):
        slopes = torch.autograd.grad(call(layer).square().sum(), own, create_graph=True)
        entries = torch.cat([slope.reshape(-1) for slope in slopes])
        return torch.stack(
            [torch.cat([h.reshape(-1) for h in torch.autograd.grad(e, own, retain_graph=True)]) for e in entries]
        )


def test_a_checkpointed_pass_does_again_what_it_did():
    """It runs inside the backward pass, which is one operation of torch, inside of which a mode is off."""
    x = normal(4, 3)
    found = hessian_of_layer(lambda layer: checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False))
    torch.testing.assert_close(found, hessian_of_layer(lambda layer: layer(x).tanh()))
    torch.testing.assert_close(found, found.mT)


def test_backward_sees_what_is_called_inside():
    x = normal(3).requires_grad_()
    with WrittenOut() as mode:
        y = (2 * x).sum()
        x.register_hook(lambda slope: special.bessel_j0(slope))
        y.backward()
    assert mode.replaced == {"Bessel function"}


def test_only_what_is_named_is_written_out():
    x = normal(4, 3)
    with WrittenOut({"cdist"}) as mode:
        F.hardsigmoid(torch.cdist(x, x))
    assert mode.replaced == {"cdist"}
    for layer, expected in ((parametrizations.weight_norm(nn.Linear(3, 2)), {WEIGHT_NORM}), (nn.Linear(3, 2), set())):
        assert Problem(layer, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2))).written_out == expected


def test_the_table_names_operations_of_torch():
    assert {case.name for case in CASES.values()} == {plain.name for plain in PLAIN.values()}
    assert all(callable(function) for function in PLAIN)


@pytest.mark.parametrize(
    ("fragment", "evaluate"),
    {
        "igamma": lambda x: torch.igamma(x, x.detach()),
        "zeta": lambda x: special.zeta(x, x.detach()),
        "_cdist_backward": lambda x: torch.cdist(x[None], x[None]),
        "_embedding_bag": lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x[:, None]),
        "linalg_ldl_factor": lambda x: torch.linalg.ldl_factor(torch.diag(x))[0],
        "_standard_gamma": lambda x: torch._standard_gamma(x),
        "_ctc_loss_backward": lambda x: torch.ctc_loss(x.reshape(3, 1).repeat(1, 2), torch.ones(1).long(), (3,), (1,)),
        "_segment_reduce_backward": lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([3])),
        "hardsigmoid_backward": F.hardsigmoid,
    }.items(),
)
def test_errors_of_torch_have_a_remedy(fragment, evaluate):
    assert fragment in REMEDIES
    x = (normal(3).abs() + 1.5).requires_grad_()
    with pytest.raises((RuntimeError, NotImplementedError), match=fragment):  # noqa: PT012 - by torch's version
        (slope,) = torch.autograd.grad(evaluate(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(slope.sum(), x)


@pytest.mark.parametrize(
    ("fragment", "evaluate"),
    {
        "SparseCoo": lambda x: torch.sparse_coo_tensor(torch.tensor([[0, 1, 2]]), x, check_invariants=True),
        "MaxUnpool": lambda x: F.max_unpool2d(x.reshape(1, 1, 1, 3), torch.tensor([[[[0, 0, 3]]]]), 2),
    }.items(),
)
def test_nodes_of_the_graph_have_a_remedy(fragment, evaluate):
    assert fragment in REMEDIES
    assert fragment in evaluate(normal(3).requires_grad_()).grad_fn.name()
