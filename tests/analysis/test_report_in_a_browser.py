"""Pages in a browser: nothing on the console, no request, pictures with content, at any width, light and dark."""

import json
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from commands import command
from finished import stored, symmetric
from torch import nn

from pipeline import Problem, compute_hessian
from pipeline.analysis.report.write import write_report

pytestmark = [
    pytest.mark.full("starts a browser"),
    pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]

JOBS = Path(__file__).parents[2] / "jobs"
MOST_BYTES = 3_000_000  # of a page
LOOKS = [(1400, False), (1400, True), (360, False), (360, True)]
WIDTH = "document.documentElement.scrollWidth"
LIGHTNESS = "getComputedStyle(document.body).backgroundColor"
ZOOM = """
(async () => {
  const zoom = document.querySelector(".zoom"), canvas = zoom.querySelector("canvas");
  const [rows, columns] = zoom.querySelectorAll("select");
  const colours = () => {
    const copy = document.createElement("canvas"), pen = copy.getContext("2d"); // reading slows a canvas down, for good
    [copy.width, copy.height] = [canvas.width, canvas.height];
    pen.drawImage(canvas, 0, 0);
    const d = pen.getImageData(0, 0, copy.width, copy.height).data;
    return new Set(new Uint32Array(d.buffer)).size;
  };
  zoom.open = true;
  await zoom.querySelector("img").decode();
  await new Promise(requestAnimationFrame);
  const whole = colours(), box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new MouseEvent("click", {clientX: box.left + 1, clientY: box.bottom - 1}));
  const told = zoom.querySelector(".told").textContent;
  return [zoom.hidden, whole, rows.selectedIndex, columns.selectedIndex, told, colours()];
})()
"""


def seen(page, pictures, **options):
    """What is common to all pages."""
    found = browser.look(page, **options)
    assert found.said == []
    assert found.asked == [Path(page).as_uri()]
    assert len(found.pictures) == pictures
    assert all(p["colours"] > 20 and p["width"] > 300 and p["shown"] > 200 for p in found.pictures), found.pictures
    return found


def done(*words):
    """Run a command to its end."""
    status, said, told = command(*words)
    assert status == 0, told
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    small = ("--set", "problem_args.hidden=16", "--set", "executor=serial")
    done("run", JOBS / "digits_mlp.yaml", "--output", out, *small)
    return Path(done("report", out))


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_report(digits, width, dark):
    found = seen(digits, 8, width=width, dark=dark, scripts=(WIDTH, LIGHTNESS, ZOOM))
    across, paper, (hidden, whole, row, column, told, colours) = found.results
    assert across <= width  # nothing but tables and pictures is scrolled sideways
    assert paper == ("rgb(21, 21, 24)" if dark else "rgb(255, 255, 255)")
    assert (hidden, row, column) == (False, 6, 1)  # at the lower left: the last bias and the first weight
    assert "rows: 4.bias (10, " in told
    assert whole > 20
    assert colours > 5
    assert digits.stat().st_size < MOST_BYTES


def test_a_hostile_name_is_text(tmp_path):
    model = nn.Module()
    for name in ("<script>alert(1)</script>", "\x1b[31mred", "' onerror='alert(2)"):
        model.register_parameter(name, nn.Parameter(torch.ones(3)))
    model.forward = lambda x: sum(((x @ p) ** 2 for p in model.parameters()), torch.zeros(len(x)))
    problem = Problem(model, nn.MSELoss(), (torch.randn(9, 3), torch.randn(9)))
    url = write_report(compute_hessian(problem, str(tmp_path), executor="serial", dtype="float64"))
    script = "[document.body.innerText, document.scripts.length]"
    text, scripts = seen(Path(url), 8, scripts=(script,)).results[0]
    assert scripts == 1
    details = "document.querySelectorAll('details').forEach(d => d.open = true); document.body.innerText"
    text = browser.look(url, scripts=(details,)).results[0]
    assert all(name in text for name in ("<script>alert(1)</script>", "\\x1b[31mred", "' onerror='alert(2)"))


def test_a_sweep_and_a_comparison(tmp_path):
    sys.path.insert(0, str(JOBS))
    try:
        import digits_epochs
    finally:
        sys.path.pop(0)
    digits_epochs.train(tmp_path / "checkpoints", 4, hidden=4)
    schedule = {
        "job": str(JOBS / "digits_mlp.yaml"),
        "overrides": ["problem_args.hidden=4", "problem_args.steps=0", "executor=serial", "verify=false"],
        "checkpoints": str(tmp_path / "checkpoints" / "*"),
        "output": str(tmp_path / "hessians"),
    }
    (tmp_path / "schedule.yaml").write_text(json.dumps(schedule))
    done("run-due", tmp_path / "schedule.yaml")
    sweep = Path(done("report", tmp_path / "hessians"))
    first, *_, last = sorted(str(path.parent) for path in (tmp_path / "hessians").glob("*/manifest.json"))
    pages = {sweep: 4, Path(done("compare", first, last, "--page", tmp_path / "pages")): 4}
    for page, pictures in pages.items():
        for width, dark in LOOKS:
            found = seen(page, pictures, width=width, dark=dark, scripts=(WIDTH,))
            assert found.results[0] <= width
        assert page.stat().st_size < MOST_BYTES


INK = """
(async () => {
  const image = document.querySelector("img[alt]");
  await image.decode();
  const c = document.createElement("canvas"), p = c.getContext("2d");
  c.width = image.naturalWidth; c.height = image.naturalHeight;
  p.drawImage(image, 0, 0);
  const d = p.getImageData(0, 0, c.width, c.height).data;
  let sum = 0, count = 0; // of the strip at the left, where there is nothing but names
  for (let y = 0; y < c.height; y++) for (let x = 0; x < 40; x++) {
    const k = 4 * (y * c.width + x);
    if (d[k + 3] > 200) { sum += d[k]; count += 1; }
  }
  return sum / count;
})()
"""
SEEN = """
[...document.querySelectorAll("table")].every(t => t.checkVisibility({contentVisibilityAuto: true})) &&
  !document.querySelector("nav").checkVisibility()
"""


@pytest.fixture
def small(tmp_path):
    return write_report(stored(symmetric(np.linspace(-1, 2, 40)), url=tmp_path))


def test_ink_is_the_readers(small):
    light, dark = (browser.look(small, dark=dark, scripts=(INK,)).results[0] for dark in (False, True))
    assert light < 100 < 180 < dark


def test_on_paper_all_is_dark_on_white_and_tables_are_there(small):
    paper, tables = browser.look(small, dark=True, media="print", scripts=(LIGHTNESS, SEEN)).results
    assert paper == "rgb(255, 255, 255)"
    assert tables
    assert not browser.look(small, scripts=(SEEN,)).results[0]  # on a screen they are folded
