"""The code of the README and of the pages it leads to, run or checked; and the page on the question that started it."""

import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import chdir
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from ray.scripts.scripts import cli as ray_cli

from pipeline import cli
from pipeline.runs.schedule import ScheduleSpec
from pipeline.spec import JobSpec, parse

ROOT = Path(__file__).parents[2]
README, DESIGN = ROOT / "README.md", ROOT / "pipeline" / "DESIGN.md"
PAGES = [README, *sorted((ROOT / "jobs" / "examples").glob("*.md")), *sorted((ROOT / "jobs" / "clusters").glob("*.md"))]
SOURCES = [
    path.relative_to(ROOT).as_posix() for top in ("pipeline", "tests", "jobs") for path in (ROOT / top).rglob("*.py")
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def test_pages_have_no_code_that_nobody_checks():
    assert {language for page in PAGES for language, _ in BLOCK.findall(page.read_text())} == {"python", "yaml", "bash"}


@pytest.mark.parametrize(("page", "most"), [(README, 250), (DESIGN, 300)], ids=["README", "DESIGN"])
def test_lengths(page, most):
    assert len(page.read_text().splitlines()) <= most
    assert all(len(line) <= 120 or line.startswith("|") for line in page.read_text().splitlines())


@cache
def names_of(page, folder):
    """What the page's blocks leave, run one after the other in a folder, as a reader goes on."""
    names = {"__name__": page.stem}
    with chdir(folder):
        for text in blocks(page, "python"):
            exec(compile(text, page.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python(page, folder):
    if "to_laplace(" in page.read_text():
        pytest.importorskip("laplace")
    assert len(names_of(page, folder)) > 1


def test_first_block(tmp_path, monkeypatch, capsys):
    """Ten lines on a model of one's own."""
    monkeypatch.chdir(tmp_path)
    first = blocks(README, "python")[0]
    assert len([line for line in first.splitlines() if line.strip()]) == 10
    exec(compile(first, "README.md", "exec"), {})
    assert "(6, 8, 3)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_questions_in_sql(folder):
    names = names_of(ROOT / "jobs" / "examples" / "reading.md", folder)
    H = names["H"]
    np.testing.assert_array_equal(names["block"], H["0.weight", "2.bias"])
    np.testing.assert_allclose(names["product"], H @ H.gradient, rtol=0, atol=1e-14)
    full = H.to_numpy()
    values = np.sort(np.abs(full), axis=None)[::-1]
    assert [abs(value) for _, _, value in names["largest"]] == list(values[:10])
    assert all(full[row, col] == value for row, col, value in names["largest"])


def test_a_job_of_ones_own(tmp_path, monkeypatch):
    """The factory and the spec of the page, as the files that it names."""
    page = ROOT / "jobs" / "examples" / "your_model.md"
    (factory,), (spec,) = blocks(page, "python"), blocks(page, "yaml")
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(factory)
    Path("mine.yaml").write_text(spec)
    cli.cli.main(["run", "mine.yaml"], standalone_mode=False)
    assert (tmp_path / "output" / "mine" / "_SUCCESS").exists()


SPECS = [(page, text) for page in PAGES for text in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "text"), SPECS, ids=[page.stem for page, _ in SPECS])
def test_specs(page, text):
    """Jobs and schedules: every key is known, every value is allowed."""
    values = yaml.safe_load(text)
    assert parse(ScheduleSpec if "job" in values else JobSpec, values, page.name).output == values["output"]


COMMANDS = [
    line.split(" # ")[0].strip()
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
]


def understood(group, words):
    """Parse words as click does: names, arguments and options; the tests of each command run it."""
    context = group.make_context(group.name, list(words))
    name, command, left = group.resolve_command(context, list(words))
    return command.make_context(name, left, parent=context).params


def parts(line):
    """The commands of a line, as words without redirections."""
    words = shlex.split(line)
    while "&&" in words:
        yield words[: words.index("&&")]
        words = words[words.index("&&") + 1 :]
    yield words[: words.index(">")] if ">" in words else words


def unknown_extras(requirement):
    """Those that a requirement asks of this package, and that it does not have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(Requirement(f"a{requirement.removeprefix('.')}").extras) - project["optional-dependencies"].keys()


@pytest.mark.parametrize("line", list(dict.fromkeys(COMMANDS)))
def test_commands_are_understood(line):
    for tool, *words in parts(line):
        if tool == "hessian":
            assert understood(cli.cli, words)
        elif tool == "ray":
            given = understood(ray_cli, words)
            if "cmd" in given:
                (_, folder), inner = parts(given["cmd"])
                assert folder == "hessian"  # where cluster files put the repository
                assert understood(cli.cli, inner[1:])
        elif words[:3] == ["-m", "pip", "install"]:
            assert not any(unknown_extras(word) for word in words if word.startswith(".["))
        elif words[:2] != ["-m", "pytest"]:
            named = [word for word in words if word.startswith("jobs/")]
            assert tool in {"python3", "aws", "kubectl"}
            assert named
            assert all((ROOT / word).exists() for word in named)


def test_set_up_is_two_commands():
    """As .ci/run finds them."""
    found = re.findall(r"^python3 -m pip install .* && .*$", README.read_text(), flags=re.MULTILINE)
    assert [line.split(" && ")[1] for line in found] == ["hessian run jobs/digits_mlp.yaml", "python3 -m pytest"]


@pytest.mark.parametrize("page", [*PAGES, DESIGN], ids=lambda page: page.stem)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for target in re.findall(r"`((?:tests|jobs|pipeline)/[\w/.-]*)`", text):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`([\w/]+\.py)`", text):
        assert target == "mine.py" or any(f"/{source}".endswith(f"/{target}") for source in SOURCES), target


def test_every_page_is_reached():
    """From the README."""
    targets = {(README.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", README.read_text())}
    assert {page.resolve() for page in PAGES[1:]} <= targets


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
