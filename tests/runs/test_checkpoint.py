"""Weights from a checkpoint: what is taken, what is refused, and that nothing in it is run."""

import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import clouds
import numpy as np
import pytest
import safetensors.torch
import torch
from commands import command
from torch import nn

from pipeline import CheckpointError, FingerprintError, Problem, ProblemError, compute_hessian, load_checkpoint
from pipeline.planning.manifest import Fingerprint
from pipeline.storage.output import Output
from pipeline.storage.run_files import read_manifest

X, Y = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3


class Net(nn.Module):
    """With a buffer, and with one that no state dict has."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.head(self.body(x)) * self.scale


def problem(seed=0, wrap=lambda model: model):
    return Problem(wrap(Net(seed).eval()), nn.CrossEntropyLoss(), (X, Y))


def hessian(problem, **settings):
    return compute_hessian(problem, executor="serial", dtype=torch.float64, verify=False, **settings)


def trained():
    model = Net(7).eval()
    model.body[1].running_mean.fill_(0.3)
    return model.state_dict()


def torch_bytes(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def put(tmp_path, data):
    path = tmp_path / "file"  # a name that says nothing
    path.write_bytes(data)
    return str(path)


WRITERS = {
    "safetensors": safetensors.torch.save,
    "torch": torch_bytes,
    "torch, old": lambda state: torch_bytes(state, _use_new_zipfile_serialization=False),
    "DataParallel": lambda state: torch_bytes({f"module.{name}": t for name, t in state.items()}),
    "compiled": lambda state: torch_bytes({f"module._orig_mod.{name}": t for name, t in state.items()}),
    "compiled inside": lambda state: torch_bytes({n.replace("body.", "body._orig_mod."): t for n, t in state.items()}),
    "float64": lambda state: torch_bytes({n: t.double() if t.is_floating_point() else t for n, t in state.items()}),
    "unpersistent too": lambda state: safetensors.torch.save({**state, "scale": torch.tensor(2.0)}),
}


def holds(problem, state, prefix=""):
    """Whether a problem is at the weights of a state dict, bit for bit, in its own types."""
    values, own = problem.tensors(), problem.model.state_dict()
    return all(torch.equal(values[prefix + name], t.to(own[prefix + name].dtype)) for name, t in state.items())


def test_the_hessian_at_a_checkpoint(tmp_path):
    """It is that of a model which has loaded it; the model at hand stays as it is."""
    url = put(tmp_path, torch_bytes(trained()))
    model, own = Net(3).eval(), problem()
    model.load_state_dict(trained())
    before = {name: t.clone() for name, t in own.model.state_dict().items()}
    known = hessian(Problem(model, nn.CrossEntropyLoss(), (X, Y)))
    H = hessian(load_checkpoint(own, url))
    np.testing.assert_array_equal(H.to_numpy(), known.to_numpy())
    assert (H.loss, H.manifest.fingerprint.weights) == (known.loss, known.manifest.fingerprint.weights)
    assert all(torch.equal(t, before[name]) for name, t in own.model.state_dict().items())
    assert own.checkpoint is None


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_read(tmp_path, writer):
    url = put(tmp_path, WRITERS[writer](trained()))
    assert not holds(problem(), trained())
    found = load_checkpoint(problem(), url)
    assert holds(found, trained())
    assert found.checkpoint == hashlib.sha256(Path(url).read_bytes()).hexdigest()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_into_a_wrapped_model(tmp_path, wrap):
    """What only wraps it is taken off."""
    url = put(tmp_path, torch_bytes(trained()))
    found = load_checkpoint(problem(wrap=wrap), url)
    assert found.layout.names[0] == "body.0.weight"
    assert holds(found, trained())


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_widened(tmp_path, narrow):
    state = {name: t.to(narrow) if t.is_floating_point() else t for name, t in trained().items()}
    assert holds(load_checkpoint(problem(), put(tmp_path, torch_bytes(state))), state)


NESTED = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "nets": {"model": trained()}}
LIGHTNING = {"epoch": 3, "state_dict": {f"model.{n}": t for n, t in trained().items()} | {"metric": torch.ones(1)}}


@pytest.mark.parametrize(
    ("content", "key"), [(NESTED, "nets.model"), (LIGHTNING, "state_dict.model"), (LIGHTNING["state_dict"], "model")]
)
def test_nested(tmp_path, content, key):
    assert holds(load_checkpoint(problem(), put(tmp_path, torch_bytes(content)), key), trained())


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (NESTED, None, r"in it are `epoch`, `optimizer`, `nets`.*as by key: nets\.model"),
        (NESTED, "nets", r"at `nets` are `model`.*key: nets\.model"),
        (NESTED, "nets.modle", "`key` finds no `modle`; did you mean `model`"),
        (NESTED, "epoch", "at `epoch` is a int"),
        (NESTED, "epoch.model", "finds no `model`; expected one of a int"),
        (LIGHTNING, "state_dict", r"does not fit.*after `model\.`: give key, `model` at its end"),
        (
            LIGHTNING,
            "state_dict.modle",
            "`key` got 'state_dict.modle', but no name begins with `modle.`; did you mean `model`",
        ),
        ({"a": 1}, None, "it has no tensors by name"),
        (torch.ones(3), None, "in it is a Tensor"),
        ([], None, "in it is a list"),
    ],
)
def test_tensors_that_are_not_found(tmp_path, content, key, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(problem(), put(tmp_path, torch_bytes(content)), key)


def changed(**changes):
    state = trained()
    for name, value in changes.items():
        state[name.replace("_", ".")] = value
    return state


def without(*names):
    return {name: t for name, t in trained().items() if name not in names}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("head.bias"), "missing `head.bias`"),
        (without("body.1.running_mean", "head.bias"), "missing `body.1.running_mean`, `head.bias`"),
        (changed(tail_bias=torch.ones(1)), "not in the model `tail.bias`"),
        (changed(head_bias=torch.ones(4)), r"`head.bias` has shape \(4,\), expected \(3,\)"),
        (changed(head_bias=torch.ones(3).long()), "`head.bias` is torch.int64, expected torch.float32"),
        (changed(head_bias=torch.full((3,), 0.1).double() + 1e-9), "would be rounded to torch.float32"),
        (changed(head_bias=torch.ones(3, device="meta")), "holds no plain values"),
        ({f"layer{k}": torch.ones(1) for k in range(6)}, "`layer0`, `layer1`, `layer2`, `layer3` and 2 more"),
    ],
)
def test_weights_of_another_model(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(problem(), put(tmp_path, torch_bytes(state)))


def test_weights_that_are_not_finite(tmp_path):
    url = put(tmp_path, torch_bytes(changed(head_bias=torch.tensor([1, torch.nan, torch.inf]))))
    with pytest.raises(ProblemError, match=r"file: 2 of 3 entries of `head.bias` are NaN or infinite"):
        load_checkpoint(problem(), url)


class Tied(nn.Module):
    """One tensor in two places, one module in two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x):
        return self.again(self.b(self.a(x)))


def test_tied_weights(tmp_path):
    own = Problem(Tied(), nn.MSELoss(), (torch.randn(3, 4), torch.randn(3, 4)))
    other = Tied().state_dict()
    assert len(other) == 6
    values = load_checkpoint(own, put(tmp_path, torch_bytes(other))).tensors()
    assert sorted(values) == ["a.bias", "a.weight", "b.bias"]
    assert torch.equal(values["a.weight"], other["b.weight"])
    once = {name: other[name] for name in ("a.bias", "b.weight", "b.bias")}
    assert torch.equal(load_checkpoint(own, put(tmp_path, torch_bytes(once))).tensors()["a.weight"], other["a.weight"])
    with pytest.raises(CheckpointError, match=r"`b.weight` is tied to `a.weight` in the model, but has other values"):
        load_checkpoint(own, put(tmp_path, torch_bytes({**other, "b.weight": torch.ones(4, 4)})))


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_a_malicious_pickle_does_not_run(tmp_path, monkeypatch, old, forced):
    """Whatever the environment says."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "it ran"
    content = {**trained(), "more": Malicious(f"'{target}'")}
    data = torch_bytes(content, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=r"holds more than tensors.*posix.system.*none of which was run"):
        load_checkpoint(problem(), put(tmp_path, data))
    with pytest.raises(CheckpointError):
        load_checkpoint(problem(), put(tmp_path, pickle.dumps(content["more"])))
    assert not target.exists()
    torch.load(io.BytesIO(data), weights_only=False)  # it would have
    assert target.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_whole_models_and_programs_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="save the state dict alone"):
        load_checkpoint(problem(), put(tmp_path, torch_bytes(Net())))
    program = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), program)
    with pytest.raises(CheckpointError, match="cannot be read by torch"):
        load_checkpoint(problem(), put(tmp_path, program.getvalue()))


@pytest.mark.parametrize("writer", ["safetensors", "torch", "torch, old"])
def test_a_damaged_file(tmp_path, writer):
    data = WRITERS[writer](trained())
    for size in (0, 5, len(data) // 3, len(data) - 1):
        with pytest.raises(CheckpointError):
            load_checkpoint(problem(), put(tmp_path, data[:size]))
    with pytest.raises(CheckpointError, match="expected a safetensors file or one of"):
        load_checkpoint(problem(), put(tmp_path, b"<html>not found</html>"))


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_checkpoint(problem(), str(tmp_path / "nowhere.pt"))
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(problem(), str(tmp_path))


def test_another_checkpoint_is_another_run(tmp_path):
    """Even where the weights are nearly, or quite, the same."""
    output, url = str(tmp_path / "out"), put(tmp_path, torch_bytes(trained()))
    own = load_checkpoint(problem(), url)
    assert hessian(own, output=output).manifest.fingerprint.checkpoint == own.checkpoint
    hessian(own, output=output)  # finds it finished
    again = load_checkpoint(problem(), put(tmp_path, torch_bytes(trained(), _use_new_zipfile_serialization=False)))
    with pytest.raises(FingerprintError, match=r"checkpoint is '.*', stored '.*'"):
        hessian(again, output=output)
    plain = problem().at(own.tensors())
    with pytest.raises(FingerprintError, match="checkpoint is None, stored"):
        hessian(plain, output=output)


def test_manifests_without_a_checkpoint_are_what_they_were(tmp_path):
    """The digest of a manifest is in its receipts."""
    H = hessian(problem(), output=str(tmp_path))
    stored = json.loads((tmp_path / "manifest.json").read_text())
    assert set(stored["fingerprint"]) == set(Fingerprint.model_fields) - {"checkpoint"}
    assert read_manifest(Output(str(tmp_path))).digest == H.manifest.digest


def refused(*arguments):
    """The line that a command ends with, and status 2."""
    status, _, said = command(*arguments)
    assert status == 2
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def s3():
    yield from clouds.started(clouds.moto)


@pytest.mark.full("a job once more")
def test_a_job_with_a_checkpoint_in_a_bucket(tmp_path, monkeypatch, s3):
    """By the command: computed, found finished, verified; another content under the same name is refused."""
    (tmp_path / "made.py").write_text("from test_checkpoint import problem as factory\n")
    (tmp_path / "job.yaml").write_text(
        "problem: made.py:factory\ncheckpoint: s3://bucket/epoch3.pt\noutput: out\nexecutor: serial\n"
    )
    monkeypatch.chdir(tmp_path)
    bucket, key = Output(s3.url), ("--set", "checkpoint_key=model")
    assert refused("run", "job.yaml") == "error: checkpoint s3://bucket/epoch3.pt: there is no such file"
    bucket.put("epoch3.pt", torch_bytes({"model": trained()}))
    assert "checkpoint_key: model" in refused("run", "job.yaml")
    assert command("run", "job.yaml", *key)[0] == 0
    assert "nothing to do" in command("run", "job.yaml", *key)[2]
    assert "against double backward" in command("verify", "out", "--job", "job.yaml", *key)[1]
    bucket.put("epoch3.pt", torch_bytes({"model": trained(), "epoch": 4}))
    assert "holds the Hessian of another problem: checkpoint is" in refused("run", "job.yaml", *key)
    assert "without a `checkpoint`" in refused("run", "job.yaml", "--set", "checkpoint=null", *key)
    assert "no answer" in refused(
        "run",
        "job.yaml",
        *key,
        "--set",
        "output=s3://bucket/out",
        "--set",
        f"endpoint_url=http://127.0.0.1:{clouds.free_port()}",
    )
    assert "there is no such file" in refused("run", "job.yaml", *key, "--set", "checkpoint=s3://nowhere/epoch3.pt")
