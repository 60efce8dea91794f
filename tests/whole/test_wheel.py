"""The package alone: built, installed beside nothing of its repository, and its first job run from there."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.full("builds the package and makes an environment")


def said(*words, cwd):
    """What a command prints; it sees no module but those of its own environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As `python -m build` makes it, with the tools that are here: by way of a source distribution."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pipeline", "jobs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    said(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(tmp_path_factory, wheel):
    """The folder of an environment's programs: the wheel installed, and what it asks for as it is here."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place)
    python = place / "bin" / "python"
    installing = ("--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    said(sys.executable, "-m", "pip", *installing, cwd=place)
    (packages,) = place.glob("lib/python*/site-packages")
    # A path that such a file names is searched, but not for files like it: an editable install stays out of sight.
    (packages / "here.pth").write_text("\n".join(site.getsitepackages()))
    return python.parent


def test_the_wheel_holds_the_package_whole(wheel):
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline").rglob("*") if path.is_file()}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("pipeline/")}
    assert inside == {name for name in there if "__pycache__" not in name}
    assert "pipeline/py.typed" in inside


def test_the_first_job_without_a_clone(programs, tmp_path):
    where = said(programs / "python", "-c", "import pipeline; print(pipeline.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(programs.parent)
    hessian = programs / "hessian"
    assert "digits_mlp: " in said(hessian, "init", cwd=tmp_path)
    said(hessian, "init", "digits_mlp", cwd=tmp_path)
    job = "digits_mlp.yaml", "--set", "problem_args.hidden=4", "--set", "executor=serial"
    assert "330 x 330" in said(hessian, "run", *job, cwd=tmp_path)
    assert said(hessian, "status", "output/digits_mlp", cwd=tmp_path).startswith("state: finished\n")
