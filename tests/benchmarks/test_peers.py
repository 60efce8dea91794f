"""The test problems of other curvature libraries, rebuilt: curvlinops, BackPACK and laplace.

Each matrix against plain double backward over all data as one batch. Targets are drawn to fit what a model puts out.
"""

import pytest
import torch
from oracle import block_error, dense_hessian
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

from pipeline import Problem, ProblemError, compute_hessian

pytestmark = pytest.mark.full("runs benchmarks at small sizes")

CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
FLOAT32 = 2.0**29  # float32's last bit in units of float64's


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Parallel(nn.Module):
    """The sum of branches."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class Keyword(nn.Module):
    """Takes its input by name."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def mlp(d, h, out, activation=nn.ReLU):
    return nn.Sequential(nn.Linear(d, h), activation(), nn.Linear(h, out))


def headed(sample, *layers, out=3):
    """Layers and a linear head as wide as what comes out of them for one sample."""
    body = nn.Sequential(*layers, nn.Flatten()).eval()
    with torch.no_grad():
        width = body(torch.rand(1, *sample)).shape[1]
    return nn.Sequential(*body, nn.Linear(width, out))


def call(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def target_of(loss, output):
    if isinstance(loss, CE):
        return torch.randint(output.shape[1], (len(output), *output.shape[2:]))
    return torch.randint(2, output.shape).float() if isinstance(loss, BCE) else torch.rand(output.shape)


def build(make_model, loss, *draws):
    """A model and its batches, one of each way to draw inputs."""
    torch.manual_seed(0)
    model, batches = make_model(), []
    for draw in draws:
        inputs = draw() if callable(draw) else torch.rand(draw)
        with torch.no_grad():
            batches.append((inputs, target_of(loss, call(model, inputs))))
    return model, loss, batches


def check(model, loss, batches, bars=(("float64", 1e-9, 16),)):
    problem = Problem(model, loss, batches)
    whole = tree_map(lambda *parts: torch.cat(parts), *batches)
    truth = dense_hessian(model, lambda m, b: loss(call(m, b[0]), b[1]), whole, problem.layout.names)
    for p in problem.layout:  # not vacuous
        assert truth[p.span.start : p.span.stop].any(), p.name
    for dtype, bar, ulps in bars:
        found = compute_hessian(problem, executor="serial", dtype=dtype, verify=False)
        assert block_error(found.to_numpy(), truth, problem.layout, ulps) < bar, dtype


def sequence(net):
    """Class scores in dimension 1, as cross-entropy wants them."""
    return nn.Sequential(net, Apply(lambda x: x.transpose(1, 2)))


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


CURVLINOPS = {
    **{f"cross-entropy, {r}": (lambda: mlp(10, 5, 3), CE(reduction=r), (3, 10), (4, 10)) for r in ("mean", "sum")},
    **{f"squared error, {r}": (lambda: mlp(8, 5, 3), MSE(reduction=r), (2, 8), (6, 8)) for r in ("mean", "sum")},
    **{f"binary, {r}": (lambda: mlp(10, 5, 2), BCE(reduction=r), (3, 10), (4, 10)) for r in ("mean", "sum")},
    "binary, one output": (lambda: mlp(10, 5, 1), BCE(), (3, 10), (4, 10)),
    **{
        f"sequences, cross-entropy, {r}": (
            lambda: sequence(mlp(10, 5, 3)), CE(reduction=r), (3, 5, 10), (4, 5, 10)
        ) for r in ("mean", "sum")
    },
    **{
        f"sequences, binary, {r}": (lambda: mlp(10, 5, 2), BCE(reduction=r), (3, 5, 10), (4, 5, 10))
        for r in ("mean", "sum")
    },
    **{
        f"sequences, squared error, {r}": (lambda: mlp(8, 5, 3), MSE(reduction=r), (2, 5, 8), (6, 5, 8))
        for r in ("mean", "sum")
    },
    **{
        f"dict, {type(loss).__name__}": (
            lambda out=out: Keyword(mlp(10, 5, out)), loss, *(lambda n=n: {"x": torch.rand(n, 10)} for n in (3, 4))
        ) for loss, out in ((CE(), 2), (BCE(), 1), (MSE(), 2))
    },
    "convolutions": (small_cnn, CE(), (5, 1, 14, 14), (3, 1, 14, 14)),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVLINOPS)
def test_curvlinops(name):
    check(*build(*CURVLINOPS[name]))


def loader(**options):
    return DataLoader(TensorDataset(torch.rand(12, 10), torch.randint(2, (12,))), **options)


class Permuted:
    """Batches whose samples come in another order on each pass."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for x, y in self.batches:
            order = torch.randperm(len(y))
            yield x[order], y[order]


def batch_norm():
    return nn.Sequential(nn.Linear(10, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def dropout():
    return nn.Sequential(nn.Linear(10, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2))


NOT_DETERMINISTIC = {
    "dropout": (dropout, lambda: loader(batch_size=3), "`1` .Dropout."),
    "batch norm, shuffled": (batch_norm, lambda: loader(batch_size=3, shuffle=True), "shuffles"),
    "batch norm": (batch_norm, lambda: loader(batch_size=3), "`1` .BatchNorm1d."),
    "drop_last": (lambda: mlp(10, 5, 2), lambda: loader(batch_size=5, drop_last=True), "drop_last"),
    "drop_last, shuffled": (
        lambda: mlp(10, 5, 2), lambda: loader(batch_size=5, drop_last=True, shuffle=True), "shuffles|drop_last"
    ),
    "permuted within batches": (
        lambda: mlp(10, 5, 2), lambda: Permuted(list(loader(batch_size=3))), "two passes gave different"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_DETERMINISTIC)
def test_curvlinops_not_deterministic(name):
    model, data, message = NOT_DETERMINISTIC[name]
    with pytest.raises(ProblemError, match=message):
        compute_hessian(Problem(model(), CE(), data()), executor="serial")


ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU)
POOL_OPTIONS = {
    "Max": ({"kernel_size": 2}, {"kernel_size": 2, "padding": 1, "ceil_mode": True},
            {"kernel_size": 3, "stride": 1, "dilation": 2}),
    "Avg": ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 4, "padding": 2, "count_include_pad": False}),
    "AdaptiveAvg": ({"output_size": 2}, {"output_size": 3}),
}  # fmt: skip
CONV_OPTIONS = (
    {"kernel_size": 2},
    {"kernel_size": 2, "bias": False},
    {"kernel_size": 2, "stride": 2, "padding": 2},
    {"kernel_size": 2, "stride": 4, "padding": 2, "dilation": 3},
    {"kernel_size": 2, "dilation": 2, "groups": 2},
)


def pooled(d, kind, options):
    pool = getattr(nn, f"{kind}Pool{d}d")(**options)
    return headed((1, *(6,) * d), getattr(nn, f"Conv{d}d")(1, 2, 2), nn.Tanh(), pool)


def convolved(d, kind, options):
    """The last pool keeps the head small."""
    conv = getattr(nn, f"{kind}{d}d")(2, 4, **options)
    return headed((2, *(5,) * d), conv, nn.ReLU(), getattr(nn, f"AdaptiveAvgPool{d}d")(2))


def fresh_statistics(model):
    """Running statistics that are not those of a new layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def tokens(high, *shape):
    return lambda: torch.randint(high, shape)


def first(x):
    return x[0]


def swapped(x):
    return x.transpose(0, 1)


def residual_cnn():
    inner = Parallel(nn.Identity(), nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)))
    branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Sigmoid(), inner)
    return headed((1, 5, 5), nn.Conv2d(1, 2, 2), nn.ReLU(), Parallel(nn.Identity(), branch), nn.MaxPool2d(3, 1))


def residual_batch_norm():
    branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU())
    shortcut = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))
    return fresh_statistics(headed((2, 4, 4), Parallel(branch, shortcut), nn.ReLU(), nn.AdaptiveAvgPool2d(2)))


def batch_norms():
    norms = [nn.BatchNorm3d(3) for _ in range(3)]
    return fresh_statistics(nn.Sequential(norms[0], nn.Linear(2, 3), norms[1], nn.ReLU(), norms[2], nn.Flatten()))


class Characters(nn.Module):
    """Embedding, two recurrent layers with dropout between them, a head; frozen biases."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.head, self.dropout = nn.Embedding(4, 2), nn.Linear(2, 4), nn.Dropout(0.2)
        self.rnn = kind(2, 2, num_layers=2, dropout=0.4, batch_first=True)
        for bias in (self.rnn.bias_ih_l0, self.rnn.bias_ih_l1):
            nn.init.zeros_(bias).requires_grad_(False)

    def forward(self, x):
        return self.head(self.dropout(self.rnn(self.dropout(self.embed(x)))[0])).transpose(1, 2)


class Added(nn.Module):
    """One branch used twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        x = self.linear(x)
        return torch.relu(self.left(x) + self.right(x)).add(self.right(x))


class Reused(nn.Module):
    """One activation module in three places."""

    def __init__(self):
        super().__init__()
        self.relu, self.one, self.two = nn.ReLU(), nn.Linear(3, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.relu(self.two(self.relu(self.one(self.relu(x)))))


BACKPACK = {
    **{
        f"{a.__name__}, {type(loss).__name__}": (lambda a=a: mlp(5, 4, 3, a), loss, (6, 5))
        for a in ACTIVATIONS for loss in (CE(), MSE(reduction="sum"))
    },
    **{
        f"{kind}Pool{d}d {i}": (lambda a=(d, kind, o): pooled(*a), CE(), (3, 1, *(6,) * d))
        for kind, options in POOL_OPTIONS.items() for i, o in enumerate(options) for d in (1, 2, 3)
    },
    **{
        f"{kind}{d}d {i}": (lambda a=(d, kind, o): convolved(*a), CE(reduction="sum"), (3, 2, *(5,) * d))
        for kind in ("Conv", "ConvTranspose") for i, o in enumerate(CONV_OPTIONS) for d in (1, 2, 3)
    },
    "linear": (lambda: nn.Linear(10, 5), CE(), (3, 10)),
    "two linear": (lambda: nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 5)), CE(), (3, 10)),
    "linear, more dimensions": (lambda: mlp(4, 3, 2, nn.Sigmoid), MSE(), (3, 2, 2, 4)),
    "scores of images": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Sigmoid(), nn.Conv2d(3, 4, 1)), CE(), (3, 2, 4, 4)
    ),
    "flatten": (
        lambda: headed((2, 2, 4), nn.Linear(4, 3), nn.Flatten(2), nn.Linear(6, 3), nn.Tanh()), MSE(), (3, 2, 2, 4)
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4)), CE(), tokens(5, 6)),
    "embedding, more dimensions": (lambda: nn.Sequential(nn.Embedding(3, 2), nn.Flatten()), CE(), tokens(3, 3, 2, 2)),
    "batch norm 1d": (lambda: fresh_statistics(headed((3, 4), nn.BatchNorm1d(3), nn.Tanh())), MSE(), (2, 3, 4)),
    "batch norm 2d": (lambda: fresh_statistics(headed((2, 4, 3), nn.BatchNorm2d(2), nn.Tanh())), MSE(), (3, 2, 4, 3)),
    "batch norm 3d": (batch_norms, MSE(), (3, 3, 4, 1, 2)),
    "RNN": (
        lambda: nn.Sequential(Apply(swapped), nn.RNN(4, 3), Apply(first), Apply(swapped), nn.Flatten()),
        MSE(), (4, 5, 4),
    ),
    "RNN, scores in time": (
        lambda: sequence(nn.Sequential(nn.RNN(4, 3, batch_first=True), Apply(first), nn.Linear(3, 3))), CE(), (4, 5, 4)
    ),
    "RNN, ReLU": (
        lambda: nn.Sequential(nn.RNN(4, 3, nonlinearity="relu", batch_first=True), Apply(first), nn.Flatten()),
        MSE(), (4, 3, 4),
    ),
    "LSTM": (
        lambda: nn.Sequential(nn.LSTM(4, 3, batch_first=True), Apply(first), nn.Flatten()), CE(), (4, 3, 4)
    ),
    "characters, RNN": (lambda: Characters(nn.RNN).eval(), CE(), tokens(4, 3, 4)),
    "characters, LSTM": (lambda: Characters(nn.LSTM).eval(), CE(), tokens(4, 3, 4)),
    "slicing": (
        lambda: headed((4, 5), nn.Linear(5, 4), nn.Tanh(), Apply(lambda x: x[:, 1:3, ::2])),
        CE(reduction="sum"), (3, 4, 5),
    ),
    "identity": (lambda: nn.Sequential(nn.Identity(), mlp(5, 4, 3), nn.Identity()), CE(), (3, 5)),
    "scale": (
        lambda: nn.Sequential(Apply(lambda x: x * 2.5), nn.Linear(4, 3), nn.Tanh(), Apply(lambda x: x.multiply(0.5))),
        MSE(), (2, 4),
    ),
    "pad": (
        lambda: headed((1, 3, 3), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(1, 2, 2), nn.ReLU()), CE(), (3, 1, 3, 3)
    ),
    "permute": (
        lambda: nn.Sequential(nn.Linear(3, 2), Apply(lambda x: x.permute(0, 2, 1)), nn.Linear(5, 2), nn.Tanh()),
        CE(), (3, 5, 3),
    ),
    "in-place activation": (lambda: mlp(3, 4, 2, lambda: nn.ReLU(inplace=True)), MSE(), (4, 3)),
    "reused activation": (Reused, MSE(), (5, 3)),
    "added branches": (Added, MSE(), (5, 3)),
    "residual": (
        lambda: nn.Sequential(
            nn.Linear(6, 4), nn.ReLU(), Parallel(nn.Identity(), nn.Linear(4, 4)), nn.Sigmoid(), nn.Linear(4, 3)
        ),
        CE(), (3, 6),
    ),
    "residual convolutions": (residual_cnn, CE(), (4, 1, 5, 5)),
    "residual, batch norm": (residual_batch_norm, MSE(reduction="sum"), (3, 2, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if k % 3 == 0 else pytest.param(name, marks=pytest.mark.long) for k, name in enumerate(BACKPACK)]
)
def test_backpack(name):
    check(*build(*BACKPACK[name]), bars=(("float64", 1e-9, 16), ("float32", 1e-5, FLOAT32)))


def laplace_cnn():
    return nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 2))


LAPLACE = {
    **{
        f"{name}, {loss.reduction}": (lambda: mlp(3, 20, 2, nn.Tanh), loss, lambda: torch.randn(10, 3))
        for name, losses in (
            ("classification", (CE(), CE(reduction="sum"))), ("regression", (MSE(), MSE(reduction="sum")))
        ) for loss in losses
    },
    "convolutions, classification": (laplace_cnn, CE(reduction="sum"), lambda: torch.randn(10, 3, 5, 5)),
    "convolutions, regression": (laplace_cnn, MSE(reduction="sum"), lambda: torch.randn(10, 3, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAPLACE)
def test_laplace(name):
    check(*build(*LAPLACE[name]))
