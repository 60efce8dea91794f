"""Bad input at the command line: one clear line, exit status 2, and nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import write_job

FACTORIES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from pipeline import Problem

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])

def good(width=4):
    torch.manual_seed(0)
    return Problem(nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)), nn.CrossEntropyLoss(), (X, Y))

def wrong():
    return nn.Linear(2, 2)

def raises():
    raise FileNotFoundError("weights.pt is not there")

def nan_weights():
    model = nn.Linear(5, 3)
    nn.init.constant_(model.bias, float("nan"))
    return Problem(model, nn.CrossEntropyLoss(), (X, Y))

def nan_data():
    return Problem(nn.Linear(5, 3), nn.CrossEntropyLoss(), (X * float("nan"), Y))

def dropout():
    return Problem(nn.Sequential(nn.Linear(5, 3), nn.Dropout()), nn.CrossEntropyLoss(), (X, Y))

def shuffling():
    return Problem(nn.Linear(5, 3), nn.CrossEntropyLoss(), DataLoader(TensorDataset(X, Y), 2, shuffle=True))
"""

CASES = {
    "unknown key": (["--set", "chnk=3"], "unknown key `chnk`; did you mean `chunk`?"),
    "missing factory": (["--set", "problem=made.py:god"], "has no function `god`; did you mean `good`?"),
    "missing file": (["--set", "problem=mad.py:good"], "no file"),
    "missing module": (["--set", "problem=no.such:f"], "cannot import module `no.such`"),
    "wrong return": (["--set", "problem=made.py:wrong"], "returned Linear, expected a pipeline.Problem"),
    "factory fails": (["--set", "problem=made.py:raises"], "raised FileNotFoundError: weights.pt is not there"),
    "unknown argument": (["--set", "problem_args.depth=3"], "unexpected keyword argument 'depth'"),
    "pattern": (["--set", "params=['0.wieght']"], "matches no parameter; did you mean `0.weight`?"),
    "block": (["--set", "blocks=[['0.weight', '2.wait']]"], "no parameter `2.wait`"),
    "NaN in weights": (["--set", "problem=made.py:nan_weights"], "3 of 3 entries of `bias` are NaN"),
    "NaN in data": (["--set", "problem=made.py:nan_data"], "leaf [0]: 20 of 20 values are NaN"),
    "dropout": (["--set", "problem=made.py:dropout"], "drawn in `1` (Dropout)"),
    "shuffling": (["--set", "problem=made.py:shuffling"], "shuffles"),
    "output is a file": (["--output", "made.py/out"], "cannot write"),
    "output of something else": (["--output", "."], "holds something else"),
    "unknown protocol": (["--output", "nope://bucket"], "nope"),
    "memory output with Ray": (["--output", "memory://x", "--set", "executor=ray"], "use executor=serial"),
    "memory": (["--set", "memory=100MiB"], "tile r0-1_c0-1 (39 x 39) would need"),
    "chunk too large for memory": (["--set", "chunk=20000", "--set", "memory=1GiB"], "allowed are 1.07 GB"),
    "workers": (["--set", "workers=2"], "executor=serial"),
    "GPU": (["--set", "executor=ray", "--set", "gpus_per_worker=1"], "no CUDA device"),
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_job(tmp_path, FACTORIES)


def hessian(*arguments):
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "name",
    [
        name if k % 10 == 0 else pytest.param(name, marks=pytest.mark.full("a process each"))
        for k, name in enumerate(CASES)
    ],
)
def test_refused(job, name):
    arguments, message = CASES[name]
    found = hessian("run", "job.yaml", *arguments)
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2, found.stderr
    assert len(errors) == 1
    assert found.stderr.splitlines()[-1] == errors[0]
    assert message in errors[0]
    assert "Traceback" not in found.stderr
    assert not [path for path in Path("out").rglob("*") if path.is_file()]


def test_no_room_on_the_disk(job, monkeypatch):
    """The free space of a real, small disk is not to be had everywhere: here the system's answer is replaced."""
    from collections import namedtuple

    import zoo

    from pipeline import OutputError, compute_hessian

    monkeypatch.setattr("psutil.disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(OutputError, match=r"on the disk only 1\.00 kB are free; take symmetry=upper") as caught:
        compute_hessian(zoo.mlp().problem, str(job / "out"), executor="serial")
    assert caught.value.exit_code == 2
    assert not list((job / "out").rglob("*.*"))


def test_options_that_would_do_nothing():
    for arguments, message in (
        (("verify", "out", "--set", "dtype=float32"), "--set replaces keys of a job spec: give --job"),
        (("drain-on-notice", "--cloud", "aws", "--interval", "-1"), "'--interval': -1.0 is not in the range x>0"),
    ):
        found = hessian(*arguments)
        assert found.returncode == 2
        assert message in found.stderr


def test_missing_job():
    found = hessian("plan", "nowhere.yaml")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: nowhere.yaml: cannot read the job spec (No such file or directory)\n"


def test_plan_shows_what_preflight_found(job):
    found = hessian("plan", "job.yaml", "--preflight")
    assert found.returncode == 0
    for word in ["double backward", "off by", "(float64)", "math attention", "block (a, b) against (b, a)"]:
        assert word in found.stdout


@pytest.mark.full("a process each")
def test_plan_prints_all_and_starts_nothing(job):
    found = hessian("plan", "job.yaml", "--set", "executor=ray")
    assert found.returncode == 0
    for word in [
        "0.weight",
        "4 x 5",
        "factored",
        "chunks",
        "tiles",
        "FLOPs",
        "bytes out",
        "projected",
        "allowed",
        "predicted",
    ]:
        assert word in found.stdout
    assert not Path("out").exists()
    code = """
import sys
from pipeline.cli import cli
cli(["plan", "job.yaml"], standalone_mode=False)
sys.exit("ray" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.full("a process each")
def test_export(job):
    assert hessian("run", "job.yaml").returncode == 0
    assert hessian("export", "out", "--format", "parquet").stdout == f"{job / 'out' / 'hessian.parquet'}\n"
    assert hessian("export", "out", "--format", "npy", "H.npy").returncode == 0
    assert Path("H.npy").stat().st_size == 128 + 39 * 39 * 4
    assert "1 chunk and 1 Parquet file present" in hessian("verify", "out").stdout
    for arguments, message in [
        (["out", "--format", "npy", "s3://bucket/H.npy"], "written to a local disk"),
        (["out", "--format", "npy"], "needs a destination"),
        (["out", "--format", "csv"], "is not one of"),
        (["nowhere", "--format", "parquet"], "holds no Hessian"),
    ]:
        found = hessian("export", *arguments)
        assert (found.returncode, found.stdout) == (2, "")
        assert message in found.stderr.splitlines()[-1]


@pytest.mark.full("a process each")
def test_run_status_and_verify(job):
    assert hessian("status", "out").returncode == 2
    assert hessian("run", "job.yaml").returncode == 0
    again = hessian("run", "job.yaml")
    assert again.returncode == 0
    assert "finished already: nothing to do" in again.stderr
    assert "checksums right; numbers not checked" in hessian("verify", "out").stdout
    assert "against double backward" in hessian("verify", "out", "--job", "job.yaml").stdout
    chunk = Path("out/hessian.zarr/c/0/0")
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    broken = hessian("verify", "out")
    assert broken.returncode == 1
    assert "chunk c/0/0 cannot be decoded" in broken.stderr
