"""Who is told of a run that Python calls: whoever sits at a terminal or a notebook, and nobody else."""

import io
import subprocess
import sys

import pytest
from rich.console import Console
from terminal import shown_on_a_terminal

from pipeline.progress import Reporter
from pipeline.progress.bar import ConsoleReporter, for_a_person

CALL = """
import torch
from torch import nn
from pipeline import Problem, compute_hessian
compute_hessian(Problem(nn.Linear(3, 2), nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2))){})
"""


def test_a_terminal_is_told():
    status, shown = shown_on_a_terminal([sys.executable, "-c", CALL.format("")])
    assert status == 0, shown
    steps = [shown.find(step) for step in ("planning", "tiles", "1/1", "verifying")]
    assert -1 not in steps, shown
    assert steps == sorted(steps), shown


@pytest.mark.full("a process each")
def test_nobody_is_told_who_does_not_want_to_be():
    assert shown_on_a_terminal([sys.executable, "-c", CALL.format(", progress=False")]) == (0, "")


@pytest.mark.full("a process each")
def test_a_pipe_is_not_told():
    done = subprocess.run([sys.executable, "-c", CALL.format("")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("place", "wanted", "told"), [("terminal", True, True), ("notebook", True, True),
                                                       ("pipe", True, False), ("terminal", False, False)])  # fmt: skip
def test_where(monkeypatch, place, wanted, told):
    looks = {"force_terminal": place == "terminal", "force_jupyter": place == "notebook"}
    monkeypatch.setattr("pipeline.progress.bar.Console", lambda stderr: Console(file=io.StringIO(), **looks))
    assert type(for_a_person(wanted=wanted)) is (ConsoleReporter if told else Reporter)
