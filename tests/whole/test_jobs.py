"""The jobs in the repository, run as a user runs them, against plain double backward."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import block_error, dense_hessian
from terminal import shown_on_a_terminal

from pipeline import open_hessian
from pipeline.runs.problem_factory import build_problem

JOBS = Path(__file__).parents[2] / "jobs"


def run(name, output, *extra):
    command = [sys.executable, "-m", "pipeline", "run", str(JOBS / f"{name}.yaml"), "--output", str(output), *extra]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def digits_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def prose_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


JOB = {
    "digits_mlp": ("digits.py:mlp", digits_loss),
    "digits_cnn": ("digits.py:cnn", digits_loss),
    "char_transformer": ("char_transformer.py:transformer", prose_loss),
}


WHOLE = [
    pytest.param(("digits_mlp", {"hidden": 8}), id="digits_mlp-narrow"),
    pytest.param(("digits_mlp", {}), id="digits_mlp", marks=pytest.mark.long),
    pytest.param(("char_transformer", {}), id="char_transformer", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=WHOLE)
def job(request):
    name, arguments = request.param
    factory, loss = JOB[name]
    problem = build_problem(factory, arguments, JOBS)
    given = [word for key, value in arguments.items() for word in ("--set", f"problem_args.{key}={value}")]
    return name, given, problem, dense_hessian(problem.model, loss, problem.batches[0])


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.full("once more"))])
def test_every_entry(job, dtype, tmp_path):
    name, given, _, truth = job
    shown = run(name, tmp_path / "out", "--set", f"dtype={dtype}", *given)
    assert "error" in shown.stdout
    H = open_hessian(str(tmp_path / "out"))
    found = H.to_numpy()
    relative = np.abs(found - truth).max() / np.abs(truth).max()
    error = block_error(found, truth, H.parameters, ulps=0)
    print(f"{name} {dtype}: max error {relative:.2e} of max|H|, block error {error:.2e}")
    if dtype == "float64":
        assert error < 1e-9
    assert relative < 1e-5


@pytest.mark.full("minutes of double backward")
@pytest.mark.parametrize(
    ("name", "some"),
    [("digits_mlp", 300), ("digits_cnn", 12), pytest.param("char_transformer", 100, marks=pytest.mark.long)],
)
def test_some_rows(name, some, tmp_path):
    """The matrix in full; rows spread over all layers are compared: double backward takes minutes for all."""
    run(name, tmp_path / "out", "--set", "dtype=float64", "--set", "verify=false")
    factory, loss = JOB[name]
    H, problem = open_hessian(str(tmp_path / "out")), build_problem(factory, {}, JOBS)
    rows = np.linspace(0, problem.layout.size - 1, some).astype(int)
    truth = dense_hessian(problem.model, loss, problem.batches[0], only=rows)
    assert np.abs(H[rows, :] - truth).max() < 1e-14 * np.abs(H.to_numpy()).max()


def test_progress_on_a_terminal(tmp_path):
    """A bar with counts, rate and time; rich draws it only where standard error is a terminal."""
    arguments = ["run", str(JOBS / "digits_mlp.yaml"), "--output", str(tmp_path / "out")]
    small = ["--set", "problem_args.hidden=4", "--set", "problem_args.steps=1", "--set", "executor=serial"]
    status, lines = shown_on_a_terminal([sys.executable, "-m", "pipeline", *arguments, *small])
    assert status == 0
    assert re.search(r"tiles \S* *(\d+)/\1 .*B/s \d:\d\d:\d\d \d:\d\d:\d\d", lines), lines


def test_double_precision_is_the_truth(job):
    """The oracle's own symmetry bounds its rounding."""
    _, _, problem, truth = job
    assert truth.shape == (problem.layout.size,) * 2
    assert block_error(truth.T, truth, problem.layout) < 1e-10
    assert torch.get_default_dtype() == torch.float32
