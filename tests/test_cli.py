"""The command's own surface: help, version, what is said before torch is imported, and what is said at Ctrl-C."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import command, refused, write_job

import pipeline
from pipeline import cli
from pipeline.analysis.hessian import open_hessian

FACTORIES = """
import torch
from torch import nn
from pipeline import Problem

def good(width=4, *between):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), *between, nn.Linear(width, 3))
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])))

def hostile():
    torch.manual_seed(0)
    model = nn.Module()
    for name in ("<script>alert(1)</script>", "\x1b[31mred", "[bold]b[/bold]"):
        model.register_parameter(name, nn.Parameter(torch.randn(3)))
    model.forward = lambda x: sum(torch.tanh(x @ p) for p in model.parameters())
    return Problem(model, nn.MSELoss(), (torch.randn(9, 3), torch.randn(9)), params=["*"])

def dropout():
    return good(4, nn.Dropout())
"""
IMPORTED = """
import sys
from pipeline.cli import main
try:
    main()
except SystemExit as end:
    print(end.code, sorted({"torch", "ray"} & sys.modules.keys()))
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_job(tmp_path, FACTORIES)


def test_version():
    assert pipeline.__version__ == version("hessian-pipeline")
    assert command("--version")[1] == f"hessian, version {pipeline.__version__}\n"


@pytest.mark.parametrize("name", [None, *cli.cli.commands])
def test_help_is_whole(name):
    words = [name] if name else []
    code, short, _ = command(*words, "-h")
    assert (code, short) == (0, command(*words, "--help")[1])
    assert "..." not in re.sub(r"\[OPTIONS\].*|cpu \.\.\.", "", short)
    assert name is not None or all(other in short for other in cli.cli.commands)


def test_completion_lists_public_names_alone():
    code = "import pipeline.runs.api, pipeline; print(*dir(pipeline))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown == sorted([*pipeline.__all__, "__version__"])


@pytest.mark.parametrize(
    "words", [["plan"], ["run"], ["verify", "out", "--job"], ["run-due"]], ids=lambda words: words[0]
)
def test_a_typo_is_said_before_torch_is_imported(job, words):
    (job / "wrong.yaml").write_text("problm: made.py:good\n")
    found = subprocess.run([sys.executable, "-c", IMPORTED, *words, "wrong.yaml"], capture_output=True, text=True)
    assert found.stdout == "2 []\n"
    assert "unknown key `problm`" in found.stderr


def test_endpoint_url(job):
    said = refused("run", "job.yaml", "--endpoint-url", "http://127.0.0.1:1")
    assert "endpoint_url got http://127.0.0.1:1 for output out" in said


def test_a_plan_that_does_not_fit_is_shown_all_the_same(job, monkeypatch):
    """The free space of a real, small disk is not to be had everywhere: here the system's answer is replaced."""
    monkeypatch.setattr("psutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    code, shown, said = command("plan", "job.yaml")
    assert code == 2
    assert "memory per worker" in shown
    # What is taken already is not among the remedies.
    assert "only 1.00 kB are free; take symmetry=upper, fewer blocks or another output" in said


def test_overwrite(job):
    """Another problem is refused, and takes the place of what is there when asked to; of nothing else."""
    other = "--set", "problem_args.width=3"
    assert command("run", "job.yaml", "--set", "formats=[zarr, parquet]")[0] == 0
    assert "holds the Hessian of another problem" in command("run", "job.yaml", *other)[2]
    assert "leave one of them out" in command("run", "job.yaml", "--check", "--overwrite")[2]
    code, _, said = command("run", "job.yaml", "--overwrite", *other)
    assert code == 0, said
    assert open_hessian("out").shape == (30, 30)
    assert not (job / "out" / "hessian.parquet").exists()
    assert command("verify", "out", "--job", "job.yaml", *other)[0] == 0
    (job / "out" / "thesis.tex").write_text("mine")
    assert "holds something else (thesis.tex)" in command("run", "job.yaml", "--overwrite")[2]
    assert open_hessian("out").shape == (30, 30)
    assert "holds something else" in refused_last("run", "job.yaml", "--overwrite", "--output", ".")


def refused_last(*arguments):
    code, _, said = command(*arguments)
    assert code == 2
    return said.splitlines()[-1]


def test_a_bad_problem_does_not_cost_what_is_there(job):
    assert command("run", "job.yaml")[0] == 0
    assert command("run", "job.yaml", "--overwrite", "--set", "problem=made.py:dropout")[0] == 2
    assert open_hessian("out").shape == (39, 39)


@pytest.mark.parametrize(("after", "kept"), [(0, ""), (2, "2 of 6 tiles done, which are kept, ")])
def test_an_interruption_says_what_is_kept(job, monkeypatch, after, kept):
    from pipeline.progress.bar import ConsoleReporter

    seen = []

    def interrupted(self, tile_bytes):
        seen.append(tile_bytes)
        if len(seen) == after:
            raise KeyboardInterrupt

    def planning(self, text):
        if after == 0 and text.startswith("planning"):
            raise KeyboardInterrupt

    monkeypatch.setattr(ConsoleReporter, "advance", interrupted)
    monkeypatch.setattr(ConsoleReporter, "say", planning)
    code, _, said = command("run", "job.yaml", "--set", "chunk=8", "--set", "tile=[2, 2]")
    assert code == 75
    assert said.splitlines()[-1] == f"interrupted: {kept}run the same command again{(after and ' to go on') or ''}"


@pytest.mark.parametrize("terminal", [True, False])
def test_values_are_a_table_on_a_terminal_alone(monkeypatch, capsys, terminal):
    from pipeline.console import tables

    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    tables.show_values([("tiles", 3081), ("none", None), ("finished", True), ("at", "x")])
    shown = capsys.readouterr().out
    assert "none" not in shown
    assert ("│" in shown) == terminal
    assert terminal or shown == "tiles: 3,081\nfinished: True\nat: x\n"


def test_hostile_names_are_text(job):
    """In what is printed while a job is planned and run, and of what is there."""
    made = ("--set", "problem=made.py:hostile")
    runs = [command("plan", "job.yaml", "--preflight", *made), command("run", "job.yaml", *made)]
    runs += [command("spectrum", "out", "--params", "[*"), command("compare", "out", "out"), command("report", "out")]
    assert [status for status, _, _ in runs] == [0] * len(runs), runs
    said = "".join(out + told for _, out, told in runs)
    assert "\x1b" not in said
    assert all(name in said for name in ("<script>alert(1)</script>", "\\x1b[31mred", "[bold]b[/bold]"))
    assert b"\x1b" not in (Path("out") / "report" / "index.html").read_bytes()
