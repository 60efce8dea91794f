"""The jobs that come with the package."""

from pathlib import Path

import pytest
from commands import command, refused

from pipeline.runs.examples import list_examples
from pipeline.runs.problem_factory import build_problem
from pipeline.spec import load_job

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_they_are_listed_by_what_they_are(folder):
    code, shown, _ = command("init")
    assert code == 0
    assert "digits_mlp: The exact Hessian of a tanh network" in shown
    assert [line.split(": ")[0] for line in shown.splitlines()] == list(list_examples())
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", list_examples())
def test_a_copy_is_whole(folder, name):
    """The files are those of `jobs/`, and the factory needs nothing beside them."""
    code, shown, _ = command("init", name)
    assert code == 0
    spec, module, following = shown.splitlines()
    assert (spec, following) == (f"{name}.yaml", f"next: hessian run {name}.yaml")
    assert sorted(path.name for path in folder.iterdir()) == sorted([spec, module])
    for file in (spec, module):
        assert Path(file).read_bytes() == (JOBS / file).read_bytes()
    job = load_job(spec)
    assert build_problem(job.problem, job.problem_args | {"steps": 0}, folder).sample_count > 0


def test_what_is_there_stays(folder):
    """The same content is no reason to refuse: two jobs may be of one module."""
    assert command("init", "digits_mlp")[0] == 0
    assert command("init", "digits_cnn")[0] == 0
    own = Path("digits.py")
    own.write_text("# mine\n")
    assert "digits.py is there already, with another content" in refused("init", "digits_mlp")
    assert own.read_text() == "# mine\n"


def test_a_refusal_writes_nothing(folder):
    assert "there is no job `digits`; did you mean `digits_" in refused("init", "digits")
    (folder / "digits_mlp.yaml").mkdir()
    assert "digits_mlp.yaml" in refused("init", "digits_mlp")
    assert not (folder / "digits.py").exists()
