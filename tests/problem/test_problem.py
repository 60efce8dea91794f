"""The contract of a Problem: what it takes, what it refuses, and that it changes nothing."""

import copy
import functools
import itertools
from collections import UserDict

import numpy as np
import pytest
import torch
import zoo
from oracle import block_error, dense_hessian
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

from pipeline import FingerprintError, HessianError, Problem, ProblemError, compute_hessian
from pipeline.problem.batches import digest
from pipeline.runs.api import run
from pipeline.spec import Settings, parse

X, Y = zoo.data()


def loss():
    return nn.CrossEntropyLoss()


def state(model):
    return (
        digest({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [(name, m.training) for name, m in model.named_modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("engine", ["jacrev", pytest.param("rows", marks=pytest.mark.full("all once more"))])
def test_nothing_is_changed(case, engine):
    before = state(case.problem.model)
    compute_hessian(case.problem, executor="serial", engine=engine)
    assert state(case.problem.model) == before


class Explodes(nn.Module):
    """Fails on a call chosen in advance."""

    def __init__(self, at):
        super().__init__()
        self.net, self.calls, self.at = nn.Linear(5, 3), itertools.count(1), at  # which nobody can set back
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if next(self.calls) == self.at:
            raise RuntimeError("boom")
        return self.net(x)


@pytest.mark.parametrize("at", [7, 8, 20, 40, 60])
def test_nothing_is_changed_after_an_error(at):
    model = Explodes(at)
    before = state(model)
    with pytest.raises((RuntimeError, HessianError), match="boom"):
        compute_hessian(Problem(model, loss(), (X, Y)), executor="serial", engine="rows", microbatch=1, chunk=4)
    assert state(model) == before


def mean_of_pairs(out, target):
    return ((out[0] - out[-1]) ** 2).sum() * len(out)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x):
        return self.net(x) + torch.randn(3)


class Augmented(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.randn(5), 1


def dropout():
    return nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))


def batch_norm():
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))


def with_nan():
    model = nn.Linear(5, 3)
    model.weight.data[0, 0] = float("nan")
    return model


def frozen():
    return nn.Linear(5, 3).requires_grad_(False)


def net():
    return nn.Linear(5, 3)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3, padding_idx=0), nn.Linear(3, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens).sum(1)))


ignored = torch.where(torch.arange(7) < 2, -100, Y)
nan_data = torch.where(X[3, 2] != X, X, float("nan"))
REFUSED = {
    "no module": (lambda: Problem(lambda x: x, loss(), (X, Y)), "got function, expected a torch.nn.Module"),
    "no loss": (lambda: Problem(net(), None, (X, Y)), "either a loss or an objective"),
    "loss is no callable": (lambda: Problem(net(), "ce", (X, Y)), "expected a callable"),
    "reduction none": (lambda: Problem(net(), nn.CrossEntropyLoss(reduction="none"), (X, Y)), "reduction='none'"),
    "NaN in weights": (lambda: Problem(with_nan(), loss(), (X, Y)), "1 of 15 entries of `weight`"),
    "no data": (lambda: Problem(net(), loss(), []), "no batches"),
    "no samples": (lambda: Problem(net(), loss(), (X[:0], Y[:0])), "at least one sample"),
    "uneven leaves": (lambda: Problem(net(), loss(), (X, Y[:3])), "as many in every tensor"),
    "strings": (lambda: Problem(net(), loss(), (X, "abc")), "got str, expected a tensor"),
    "bare tensor": (lambda: Problem(net(), loss(), X), "expected a tuple"),
    "generator": (lambda: Problem(net(), loss(), (b for b in [(X, Y)])), "read only once"),
    "shuffling": (lambda: Problem(net(), loss(), DataLoader(TensorDataset(X, Y), 3, shuffle=True)), "shuffles"),
    "drop_last": (lambda: Problem(net(), loss(), DataLoader(TensorDataset(X, Y), 3, drop_last=True)), "drop_last"),
    "drop_last of a batch sampler": (
        lambda: Problem(
            net(), loss(), DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(SequentialSampler(X), 3, True))
        ),
        "drop_last",
    ),
    "augmentation": (lambda: Problem(net(), loss(), Augmented()), "two passes gave different"),
    "no such parameter": (lambda: Problem(net(), loss(), (X, Y), params=["wieght"]), "did you mean `weight`"),
    "nothing left": (lambda: Problem(net(), loss(), (X, Y), params=["bias", "!b*"]), "leave no parameter"),
    "all frozen": (lambda: Problem(frozen(), loss(), (X, Y)), "requires grad"),
    "batches that act together": (
        lambda: Problem(net(), loss(), [(X, Y), (X, Y)], separable=False),
        "pass all samples as one batch",
    ),
    "unknown reduction": (
        lambda: Problem(net(), lambda o, t: o.sum(), (X, Y), reduction="avg"),
        "reduction: got 'avg'",
    ),
    "unknown reduction of an objective": (
        lambda: Problem(net(), data=(X, Y), objective=lambda call, b: (call(b[0]).sum(), 1.0), reduction="avg"),
        "reduction: got 'avg'",
    ),
    "reduction said twice": (lambda: Problem(net(), loss(), (X, Y), reduction="sum"), "leave it out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once(name):
    make, message = REFUSED[name]
    with pytest.raises(ProblemError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def legacy_sum():
    return functools.partial(nn.functional.cross_entropy, size_average=False)


CHECKED = {
    "NaN in data": (lambda: Problem(net(), loss(), (nan_data, Y)), r"leaf \[0\]: 1 of \d+ values are NaN"),
    "a torch loss that is summed after all": (
        lambda: Problem(net(), legacy_sum(), (X, Y)),
        "torch gives .*: how it is reduced is not known here",
    ),
    "dropout": (lambda: Problem(dropout(), loss(), (X, Y)), "not deterministic.*`1` .Dropout."),
    "noise": (lambda: Problem(Noisy(), loss(), (X, Y)), "not deterministic.*random numbers"),
    "batch norm in train mode": (
        lambda: Problem(batch_norm(), loss(), (X, Y)),
        "act on each other in `1` .Batch",
    ),
    "samples that act together": (lambda: Problem(net(), mean_of_pairs, (X, Y)), "separable=False"),
    "a sum said to be a mean": (lambda: Problem(net(), lambda o, t: o.square().sum(), (X, Y)), "reduction='sum'"),
    "a mean said to be a sum": (
        lambda: Problem(net(), lambda o, t: o.square().mean(), (X, Y), reduction="sum"),
        "reduction='mean'",
    ),
    "padding that is in the data": (
        lambda: Problem(Lookup(), loss(), (torch.tensor([[0, 1], [2, 0], [1, 3]]), torch.tensor([0, 1, 2]))),
        "gradient with respect to `embed.weight`.*padding_idx",
    ),
    "ignored targets in a middle batch": (
        lambda: Problem(net(), lambda o, t: nn.functional.cross_entropy(o, t), [(X, Y), (X, ignored), (X, Y)]),
        "Return .sum, weight.",
    ),
    "wrong shape": (lambda: Problem(net(), loss(), (X[:, :3], Y)), "evaluating them raised RuntimeError: mat1"),
    "no gradient": (lambda: Problem(net(), lambda o, t: o.detach().mean(), (X, Y)), "differentiable"),
    "no scalar": (lambda: Problem(net(), lambda o, t: o, (X, Y)), r"shape \(\d, 3\), expected a scalar"),
    "weight with a gradient": (lambda: Problem(net(), lambda o, t: (o.sum(), o.sum().exp()), (X, Y)), "weight"),
    "all ignored": (lambda: Problem(net(), loss(), (X, torch.full((7,), -100))), "weights of all batches"),
    "infinite": (lambda: Problem(net(), lambda o, t: (o * 0).log().mean(), (X, Y)), "finite|deterministic"),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("name", CHECKED)
def test_refused_before_any_tile(name, tmp_path):
    make, message = CHECKED[name]
    with pytest.raises(ProblemError, match=message) as caught:
        compute_hessian(make(), str(tmp_path / "out"), executor="serial")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_another_problem_is_refused(tmp_path):
    def again(problem, **options):
        return compute_hessian(problem, str(tmp_path), executor="serial", **options)

    model = zoo.tanh_net()
    again(Problem(model, loss(), (X, Y)))
    again(Problem(model, loss(), (X, Y)))
    for other, message in [
        (Problem(model, loss(), (X + 1, Y)), "data differ"),
        (Problem(model, loss(), (X, Y), l2=0.1), "l2 is 0.1, stored 0.0"),
        (Problem(model, loss(), (X, Y), params="*.bias"), "parameters differ"),
        (Problem(model, nn.CrossEntropyLoss(label_smoothing=0.5), (X, Y)), "the loss is"),
        (Problem(copy.deepcopy(model).double(), loss(), (X, Y)), "dtype is 'float64'"),
    ]:
        with pytest.raises(FingerprintError, match=message):
            again(other)
    for options in [
        {"symmetry": "upper"},
        {"dtype": "float64"},
        {"engine": "rows"},
        {"chunk": 32},
        {"blocks": "diagonal"},
    ]:
        with pytest.raises(FingerprintError, match=next(iter(options))):
            again(Problem(model, loss(), (X, Y)), **options)
    with torch.no_grad():
        model[0].weight[0, 0] += 0.5
    with pytest.raises(FingerprintError, match=r"weights `0\.weight` differ by up to 0\.5"):
        again(Problem(model, loss(), (X, Y)))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has no such loss yet")
def test_a_mean_that_is_not_known_here():
    """Of the targets that are not ignored: known of cross-entropy, not of this one."""
    torch.manual_seed(0)
    mean = nn.LinearCrossEntropyLoss(3, 3)
    compute_hessian(Problem(net(), mean, (X, Y)), executor="serial")
    with pytest.raises(ProblemError, match=r"torch gives .*returns .sum, weight."):
        compute_hessian(Problem(net(), mean, (X, ignored)), executor="serial")


def test_a_minimum_is_known_again(tmp_path, monkeypatch):
    """The gradient there is what rounding leaves of it: in other parts, something else."""
    torch.manual_seed(1)
    X, Y = torch.randn(90, 5, dtype=torch.float64), torch.randn(90, 1, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.linalg.lstsq(X, Y).solution.T.contiguous()
    problem, options = Problem(model, nn.MSELoss(), (X, Y)), {"executor": "serial", "engine": "jacrev"}
    compute_hessian(problem, str(tmp_path), **options)
    monkeypatch.setattr("pipeline.results.fingerprint_check.reference_samples", lambda _: 7)
    again = compute_hessian(problem, str(tmp_path), **options, check=True)
    assert np.abs(again.gradient).max() < 1e-14
    for other in (nn.L1Loss(), lambda out, y: (out - y).square().mean() + 1e-7 * (out - out.detach()).mean()):
        with pytest.raises(FingerprintError, match=r"the loss is|the gradient differs"):
            compute_hessian(Problem(model, other, (X, Y)), str(tmp_path), **options, check=True)


def test_last_bits_of_a_retraining_are_tolerated(tmp_path):
    """The stored weights count, so that old and new tiles fit together, and the model at hand is not touched."""
    model = zoo.tanh_net()
    settings = parse(Settings, {"executor": "serial"}, "test")
    first = run(Problem(model, loss(), (X, Y)), settings, str(tmp_path), name="a factory").hessian
    (tmp_path / "_SUCCESS").unlink()
    (tmp_path / "receipts" / "r0-1_c0-1.json").unlink()
    before = first.to_numpy()
    with torch.no_grad():
        model[0].weight[0, 0] *= 1 + 3e-7
    moved = state(model)
    again = run(Problem(model, loss(), (X, Y)), settings, str(tmp_path), name="a factory").hessian
    assert (again.to_numpy() == before).all()
    assert state(model) == moved
    with pytest.raises(FingerprintError, match=r"weights `0\.weight`"):  # given by the caller: exactly these
        compute_hessian(Problem(model, loss(), (X, Y)), str(tmp_path), executor="serial")


def test_batches_that_are_mappings():
    """As tokenizers and their collators give them: all of it goes to the model, and to the loss."""

    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5, 3)

        def forward(self, features, labels):
            return {"logits": self.net(features), "kept": labels}

    batches = [UserDict(features=X[:4], labels=Y[:4]), UserDict(features=X[4:], labels=Y[4:])]
    problem = Problem(Scored(), lambda out, batch: nn.functional.cross_entropy(out["logits"], batch["labels"]), batches)
    H = compute_hessian(problem, executor="serial", dtype="float64")
    plain = compute_hessian(Problem(problem.model.net, loss(), (X, Y)), executor="serial", dtype="float64")
    assert abs(H.to_numpy() - plain.to_numpy()).max() < 1e-15


class InSingle(nn.Module):
    """A root mean square in single precision, whatever the input's type: common in language models."""

    def __init__(self):
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.rand(5)), nn.Linear(5, 3)

    def forward(self, x):
        single = x.float()
        return self.head(self.gain * (single * (single.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_single_precision_that_is_written_into_a_model(dtype):
    """Where double precision is evaluated it is taken for that."""
    model = nn.Sequential(nn.Linear(5, 5), InSingle())
    H = compute_hessian(Problem(model, loss(), (X, Y)), executor="serial", dtype=dtype)

    def whole(m, batch):  # the same without casts
        h, (_, last) = m[0](batch[0]), m
        return loss()(last.head(last.gain * (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())), batch[1])

    limit = 1e-12 if dtype == "float64" else 1e-5
    assert block_error(H.to_numpy(), dense_hessian(model, whole, (X, Y)), H.parameters) < limit


def test_the_verdict_is_kept():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    problem = Problem(model, loss(), (X, Y), separable=False)
    verdict = compute_hessian(problem, executor="serial").manifest.preflight
    assert set(verdict.engines) == set(problem.layout.names)
    assert set(verdict.engines.values()) == {"rows"}  # torch.func cannot update running statistics
    assert all("raised" in found.tried["jacrev"] for found in verdict.parameters.values())
    assert "buffer 1.running_mean restored" in verdict.contexts
    assert max(found.gradient for found in verdict.parameters.values()) < 1e-6


def test_no_parameter_is_computed_that_was_not_asked_for():
    H = compute_hessian(Problem(zoo.tanh_net(), loss(), (X, Y)), params=["4.*"], executor="serial")
    assert H.parameters.names == ("4.weight", "4.bias")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # which torch.func.hessian calls
def test_nested_transforms_in_an_objective():
    """The Laplacian of the output, squared: any dispatch mode around it crashes the process."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.linspace(-1, 1, 12)[:, None]

    def squared(call, batch):
        bent = torch.func.vmap(torch.func.hessian(lambda point: call(point[None])[0, 0]))(batch[0])
        return bent.sum() ** 2, torch.ones((), dtype=bent.dtype)

    problem = Problem(model, data=(x,), objective=squared, separable=False)
    H = compute_hessian(problem, executor="serial", dtype="float64").to_numpy()
    whole = lambda m, batch: squared(m, batch)[0]
    truth = dense_hessian(model, whole, (x,), problem.layout.names, 0.0)
    np.testing.assert_allclose(H, truth, rtol=0, atol=1e-10 * abs(truth).max())
