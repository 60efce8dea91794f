"""The jobs in the repository, run as a user runs them, against plain double backward."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import block_error, dense_hessian

from pipeline import open_hessian
from pipeline.factory import build_problem

JOBS = Path(__file__).parents[1] / "jobs"


def run(name, output, *extra):
    command = [sys.executable, "-m", "pipeline", "run", str(JOBS / f"{name}.yaml"), "--output", str(output), *extra]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def digits_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def prose_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.fixture(scope="module", params=["digits_mlp:mlp", "char_transformer:transformer"])
def job(request):
    name, _, factory = request.param.partition(":")
    module = "digits.py" if factory == "mlp" else "char_transformer.py"
    problem = build_problem(f"{module}:{factory}", {}, JOBS)
    loss = digits_loss if factory == "mlp" else prose_loss
    return name, problem, dense_hessian(problem.model, loss, problem.batches[0])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_entry(job, dtype, tmp_path):
    name, _, truth = job
    shown = run(name, tmp_path / "out", "--set", f"dtype={dtype}")
    assert "block error" in shown.stdout
    H = open_hessian(str(tmp_path / "out"))
    found = H.to_numpy()
    relative = np.abs(found - truth).max() / np.abs(truth).max()
    error = block_error(found, truth, H.parameters)
    print(f"{name} {dtype}: max error {relative:.2e} of max|H|, block error {error:.2e}")
    if dtype == "float64":
        assert error < 1e-9
    assert relative < 1e-5


def test_cnn(tmp_path):
    shown = run("digits_cnn", tmp_path / "out", "--set", "problem_args.steps=3", "--set", "blocks=diagonal")
    assert "against double backward" in " ".join(shown.stdout.split())


def test_double_precision_is_the_truth(job):
    """The oracle's own symmetry bounds its rounding."""
    _, problem, truth = job
    assert truth.shape == (problem.layout.size,) * 2
    assert block_error(truth.T, truth, problem.layout) < 1e-10
    assert torch.get_default_dtype() == torch.float32
