"""Specs, factories and checkpoints of strangers: read, or refused in one line, in bounded memory and time."""

import json
import os
from pathlib import Path

import pytest
import torch
from attempts import refusal
from specs import FACTORIES, REFUSED, SOURCES
from stored import ELSE
from weights import BYTES, SAVED, saved

from pipeline.errors import CheckpointError
from pipeline.problem.problem import Problem
from pipeline.runs.checkpoint import load_checkpoint


@pytest.mark.parametrize("name", REFUSED)
def test_specs(attempts, tmp_path, name):
    text, said = REFUSED[name]
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refusal(attempts.make("spec", path=str(path)), 2)
    assert said in line
    assert str(path) in line


def test_overrides(attempts, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("problem: made.py:f\n")
    for given in ("chunk=" + "9" * 5000, "blocks=" + "[" * 5000, "a=&a [*a]", "problem_args.d=2024-99-99", "x" * 10**5):
        assert "--set" in refusal(attempts.make("spec", path=str(path), set=[given]), 2)


@pytest.mark.parametrize("deed", ["spec", "schedule", "weights", "factory"])
def test_what_is_no_file(attempts, tmp_path, deed):
    for make in ELSE.values():
        path = tmp_path / "thing"
        make(path)
        refusal(attempts.make(deed, path=str(path)), 2)
        path.rmdir() if path.is_dir() else path.unlink()
    for path in ("", "a\0b", "x" * 300):
        refusal(attempts.make(deed, path=path), 2)


def test_factories(attempts, tmp_path):
    for name, text in SOURCES.items():
        (tmp_path / name).write_text(text)
    for reference, said in FACTORIES.items():
        (tmp_path / "job.yaml").write_text(f"problem: {json.dumps(reference)}\n")
        assert said in refusal(attempts.make("factory", path=str(tmp_path / "job.yaml")), 2)


@pytest.mark.parametrize("name", [*SAVED, *BYTES])
def test_checkpoints(attempts, tmp_path, name):
    make, said = SAVED.get(name) or BYTES[name]
    path = Path(tmp_path / "weights")
    path.write_bytes(saved(make()) if name in SAVED else make())
    assert said in refusal(attempts.make("weights", path=str(path)), 2)
    refusal(attempts.make("weights", path=str(path), key="a.b"), 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantiz", "ignore:TypedStorage")
def test_tensors_of_another_kind(tmp_path):
    model = torch.nn.Linear(2, 1)
    problem = Problem(model, torch.nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    for weight in (
        torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
        torch.ones(1, 2, device="meta"),
        torch.ones(1).expand(10**9),
        torch.quantize_per_tensor(torch.ones(1, 2), 0.1, 0, torch.qint8),
    ):
        path = tmp_path / "weights"
        torch.save({"weight": weight, "bias": torch.ones(1)}, path)
        with pytest.raises(CheckpointError, match=r"`weight` (holds no plain values|has shape)"):
            load_checkpoint(problem, os.fspath(path))
