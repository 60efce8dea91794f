"""The README's code, and the page on the question that started it, run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline import cli
from pipeline.schedule import ScheduleSpec
from pipeline.spec import JobSpec, parse

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python(tmp_path, monkeypatch, capsys):
    """Block after block, as a reader goes on."""
    monkeypatch.chdir(tmp_path)
    names, first, uses, last = {}, *blocks("python")
    exec(compile(first, "README.md", "exec"), names)
    assert "(6, 8, 3)" in capsys.readouterr().out
    exec(compile(uses, "README.md", "exec"), names)
    assert "Inertia" in capsys.readouterr().out
    H, w = names["H"], np.linalg.eigvalsh(names["H"])
    np.testing.assert_allclose(names["w"], w, atol=1e-12)
    damped = np.asarray(H) + (1 - min(w[0], 0)) * np.eye(len(H))
    step = np.concatenate([part.ravel() for part in names["step"].values()])
    np.testing.assert_allclose(damped @ step, -H.gradient, atol=1e-12)
    exec(compile(last, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("True True")
    full = names["H"].to_numpy()
    values = np.sort(np.abs(full), axis=None)[::-1]
    assert [abs(value) for _, _, value in names["largest"]] == list(values[:10])
    assert all(full[row, col] == value for row, col, value in names["largest"])


@pytest.mark.parametrize("text", blocks("yaml"), ids=range(len(blocks("yaml"))))
def test_specs(text):
    assert parse(JobSpec, yaml.safe_load(text), "README").symmetry == "upper"


def test_schedules():
    (text,) = blocks("text")
    assert parse(ScheduleSpec, yaml.safe_load(text), "README").keep == 5


COMMANDS = [
    line.split(" # ")[0]
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("hessian ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    """Their names, arguments and options; the tests of each run it."""
    words = shlex.split(line)[1:]
    context = cli.cli.make_context("hessian", words)
    name, command, left = cli.cli.resolve_command(context, words)
    assert command.make_context(name, left, parent=context).params


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_why_none():
    sys.path.insert(0, str(ROOT / "jobs" / "examples"))
    try:
        import why_none
    finally:
        sys.path.pop(0)
    assert why_none.slicing_the_flat_vector() is None
    difference = why_none.ten_lines_of_torch() - why_none.this_package()
    assert float(difference.abs().max()) < 1e-14
    assert not torch.equal(why_none.this_package(), torch.zeros_like(difference))


def test_cluster_file_is_valid():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))


def test_module_and_command_are_one():
    found = subprocess.run([sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, check=True)
    assert all(command in found.stdout for command in ("plan", "run", "verify", "export", "status"))
