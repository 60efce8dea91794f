"""Pages on what runs left: on a Hessian, on a sweep, on several held against each other."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from commands import command, refused
from finished import RAGGED, P, stored, symmetric

from pipeline.analysis.summary import summarize
from pipeline.runs.reports import compared, report_on, short_names
from pipeline.runs.sweep_table import Row, Sweep, moment
from pipeline.storage.output import Output


def texts(page):
    found = []
    parser = HTMLParser()
    parser.handle_data = lambda text: found.append(text.strip())
    parser.feed(page)
    return found


@pytest.fixture
def sweep(tmp_path):
    """Three checkpoints of which the last two are kept; the steps in their names ascend."""
    table, kept = Sweep({"problem": "<made>.py:good"}), []
    for step in (5, 50, 200):
        full = symmetric(np.linspace(-1, step, P))
        H = stored(full, RAGGED, tmp_path / "sweep" / f"step{step}")
        kept.append(H)
        found = summarize(H)
        blocks = [{"row": a, "col": b, "norm": norm} for (a, b), norm in found.blocks.items()]
        table.rows[str(step)] = Row(
            f"s3://bucket/step{step}.pt", str(step), H.url if step > 5 else None, P, 10, found.loss, 1.0, found.trace,
            found.norm, blocks, moment(1.0), 2.0,
        )  # fmt: skip
    table.write(Output(str(tmp_path / "sweep")))
    return tmp_path / "sweep", kept


def test_a_sweep_over_its_steps(sweep):
    folder, kept = sweep
    status, said, _ = command("report", folder)
    assert (status, said.strip()) == (0, str(folder / "report" / "index.html"))
    shown = texts((folder / "report" / "index.html").read_text())
    assert "<made>.py:good" in shown
    assert {f"step{step}" for step in (5, 50, 200)} <= set(shown)
    assert f"{kept[2].trace():.4g}" in shown
    rows = shown[shown.index("top 1") :]
    assert {"50", "200", "-1"} <= set(rows)  # the ends of the spectra of those that are kept
    assert (folder / "report" / "eigenvalues.svg").exists()


def test_a_sweep_of_which_nothing_is_kept(sweep):
    folder, _ = sweep
    for step in (50, 200):
        Output(str(folder / f"step{step}")).remove()
    report_on(str(folder))
    assert "No Hessian is kept, or none is complete." in texts((folder / "report" / "index.html").read_text())


def test_compared(sweep):
    folder, (first, second, third) = sweep
    status, said, _ = command("compare", first.url, second.url, third.url, "--page", folder / "pages")
    assert status == 0
    assert said.strip().endswith("compare.html")
    relative = np.linalg.norm(first.to_numpy() - third.to_numpy()) / first.norm()
    assert f"{relative:.3g}" in said
    shown = texts((folder / "pages" / "compare" / "compare.html").read_text())
    assert {"step5", "step50", "step200", "2 Hessians held against step5."} <= set(shown)
    as_json = json.loads(command("compare", first.url, third.url, "--json")[1])
    assert as_json["hessians"][1]["distance"] == pytest.approx(relative * first.norm())
    assert compared([first.url, third.url])[1] is None


def test_compared_with_nothing(sweep):
    assert "got 1 Hessian, expected two or more" in refused("compare", sweep[1][0].url)


def test_parts_left_out(sweep):
    folder, (first, *_) = sweep
    assert command("report", first.url, "--without", "spectrum, ends,entries")[0] == 0
    there = {path.stem for path in (folder / "step5" / "report").iterdir()}
    assert there == {"index", "block_norms", "layers", "diagonal", "timeline", "memory"}
    assert "did you mean `entries`?" in refused("report", first.url, "--without", "entry")
    assert "expected one of" in refused("report", folder, "--without", "zzz")


def test_nothing_there(tmp_path):
    assert "holds no Hessian" in refused("report", tmp_path)


def test_short_names():
    assert short_names(["s3://b/a/x", "s3://b/c/x"]) == {"s3://b/a/x": "a/x", "s3://b/c/x": "c/x"}
    assert short_names(["/runs/epoch1", "/runs/epoch2"]) == {"/runs/epoch1": "epoch1", "/runs/epoch2": "epoch2"}
    assert short_names(["/runs/one"]) == {"/runs/one": "one"}
    assert short_names(["/runs/one", "/runs/one"]) == {"/runs/one": "one"}
