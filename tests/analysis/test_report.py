"""The report of a finished Hessian: what it says is what there is, and names in it are text."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import zoo
from finished import RAGGED, RECEIPT, P, pair, store, stored, symmetric

from pipeline import IncompleteError, SpecError, compute_hessian, open_hessian
from pipeline.analysis.report.page import as_html
from pipeline.analysis.report.parts import MOST_ROWS, Page, Part, Table
from pipeline.analysis.report.proof_part import proof_part
from pipeline.analysis.report.run_parts import memory_part, time_part
from pipeline.analysis.report.spectrum_parts import ENDS, ends_part, layers_part, spectrum_part
from pipeline.analysis.report.subject import Subject
from pipeline.analysis.report.write import PARTS, write_report
from pipeline.progress import Reporter
from pipeline.storage.output import Output
from pipeline.storage.receipts import receipt_name

SETTINGS = {"executor": "serial", "dtype": "float64", "chunk": 16}
FAILED = "✗ the proof FAILED: do not use this matrix"
HOSTILE = {"<script>alert(1)</script>": (4, 5), "\x1b[31mred.weight": (6,), "a.{{ 7 * 7 }}": (3,), "b.$x^2$": (2,)}


class Read(HTMLParser):
    """The texts of a page, its tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())


class Said(Reporter):
    """Keeps the steps it is told of."""

    def __init__(self):
        self.steps = []

    def say(self, text):
        self.steps.append(text)


def subject_of(H, lost=None):
    return Subject.of(H, lost or {}, raster=False)


def column(part, name):
    """What a part's table has in a column."""
    k = list(part.table.columns).index(name)
    return [row[k] for row in part.table.rows]


def page_of(H, **options):
    return H.output.get(write_report(H, **options).removeprefix(f"{H.url}/")).decode()


def test_a_page_of_a_run(tmp_path):
    H = compute_hessian(zoo.mlp().problem, str(tmp_path), **SETTINGS)
    url = write_report(H)
    assert url == str(tmp_path / "report" / "index.html")
    page = Read((tmp_path / "report" / "index.html").read_text())
    assert {"59", "✓ verified against double backward", *(p.name for p in H.parameters)} <= set(page.texts)
    assert {a["id"] for tag, a in page.tags if tag == "section"} == {*PARTS}
    pictures = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"block_norms.png", "block_norms.svg", "entries.png", "spectrum.svg", "timeline.svg"} < pictures
    assert open_hessian(str(tmp_path)).shape == (59, 59)


def test_a_page_asks_for_nothing_and_tells_what_pictures_show():
    page = Read(page_of(pair().H))
    sources = [a[name] for _, a in page.tags for name in ("src", "href", "srcset", "action") if name in a]
    assert all(source.startswith(("data:", "#")) for source in sources)
    images = [a for tag, a in page.tags if tag == "img" and "hidden" not in a]
    assert len(images) == 8
    assert all(len(a["alt"]) > 20 for a in images)
    assert sum(tag == "details" for tag, _ in page.tags) >= len(images)


def test_names_are_text():
    html = page_of(stored(symmetric(np.linspace(-1, 2, 31)), HOSTILE))
    page = Read(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "\x1b" not in html
    assert {"<script>alert(1)</script>", "\\x1b[31mred.weight", "a.{{ 7 * 7 }}", "b.$x^2$"} <= set(page.texts)


def test_parts_left_out():
    said = Said()
    html = page_of(pair().H, without=["spectrum", "entries"], report=said)
    assert {a["id"] for tag, a in Read(html).tags if tag == "section"} == {*PARTS} - {"spectrum", "entries"}
    assert said.steps[-1] == "part 7 of 7: memory"
    with pytest.raises(SpecError, match="got a part `spectra` to leave out; did you mean `spectrum`"):
        write_report(pair().H, without=["spectra"])


def test_proof_in_words(tmp_path):
    H = compute_hessian(zoo.mlp().problem, str(tmp_path), **SETTINGS)
    proof = json.loads((tmp_path / "verify.json").read_text())
    text = " ".join(proof_part(subject_of(H)).text)
    assert f"Each of the {proof['chunks']} chunks was read back" in text
    assert f"the largest error is {proof['block_error']:.1e} of the size" in text
    assert f"({proof['worst_entry'][0]}, {proof['worst_entry'][1]})" in text


MORE = pytest.mark.full("a page each")


@pytest.mark.parametrize(
    ("proof", "banner"),
    [
        (None, "✗ not verified: there is no proof"),
        pytest.param(b"\xff{", "✗ not verified: there is no proof", marks=MORE),
        pytest.param(b'{"ok": "yes", "chunks": 3}', "✗ not verified: there is no proof", marks=MORE),
        pytest.param(
            b'{"ok": false, "chunks": 3, "method": "double backward", "block_error": Infinity}', FAILED, marks=MORE
        ),
        pytest.param(b'{"ok": false, "chunks": 3, "faults": ["c/0/0 is \\u001b[31m<b>"]}', FAILED, marks=MORE),
    ],
)
def test_what_is_not_proven_is_said_so(proof, banner):
    H = pair().H
    if proof is not None:
        H.output.put("verify.json", proof)
    page = Read(page_of(H))
    assert banner in page.texts
    assert "good" not in " ".join(a.get("class") or "" for _, a in page.tags)


def test_spectrum_in_words_and_numbers():
    H, full = pair(np.concatenate([np.zeros(5), np.linspace(-2, -1, 10), np.linspace(1, 9, P - 15)]))
    part = spectrum_part(subject_of(H))
    assert f"{P - 15} positive, 10 negative, 5 zero within rounding" in part.text[0]
    assert f"Rank {P - 5}" in part.text[0]
    assert sum(float(count) for count in column(part, "eigenvalues")) == P
    w = np.linalg.eigvalsh(full)
    drawn = [float(x) for x in column(ends_part(subject_of(H)), "eigenvalue")]
    np.testing.assert_allclose(drawn, np.concatenate([w[-5:][::-1], w[:5][::-1]]), rtol=1e-3)


def test_a_spectrum_too_large_is_an_estimate(monkeypatch):
    H, full = pair()
    monkeypatch.setattr("pipeline.analysis.report.subject.WHOLE_UP_TO", P - 1)
    part = spectrum_part(subject_of(H))
    below, error = re.search(r"About (\d+) of 51 eigenvalues are below zero, give or take (\d+)", part.text[0]).groups()
    assert abs(int(below) - int((np.linalg.eigvalsh(full) < 0).sum())) <= int(error) + 1


def test_vectors_live_where_the_matrix_is():
    full = np.zeros((P, P))
    H, _ = pair()
    place = H.parameters["1.weight"].place
    full[place, place] = symmetric(np.linspace(-3, 3, 26))
    part = ends_part(subject_of(stored(full, RAGGED)))
    assert "100% of its square in layer 1." in part.text[0]
    assert set(column(part, "lives in")) == {"1 100%"}


def test_layers():
    H, full = pair()
    part = layers_part(subject_of(H))
    assert column(part, "parameter") == ["0.weight", "0.bias", "1.weight", "1.bias"]
    places = [H.parameters[name].place for name in column(part, "parameter")]
    known = [np.linalg.eigvalsh(full[place, place]) for place in places]
    np.testing.assert_allclose([float(x) for x in column(part, "largest")], [max(w[-1], 0) for w in known], rtol=1e-3)
    assert column(part, "negative") == [str((w < 0).sum()) for w in known]


def test_layers_that_are_large(monkeypatch):
    """Of them the outermost eigenvalues are found, and not counted."""
    H, full = pair()
    monkeypatch.setattr("pipeline.analysis.report.subject.WHOLE_UP_TO", 25)
    part = layers_part(subject_of(H))
    assert f"The {ENDS} outermost alone, as the block is large: 1.weight." in part.text[0]
    assert column(part, "parameter") == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [name == "not counted" for name in column(part, "negative")] == [False, False, True, False]
    place = H.parameters["1.weight"].place
    w = np.linalg.eigvalsh(full[place, place])
    found = [float(column(part, end)[2]) for end in ("least", "largest")]
    np.testing.assert_allclose(found, w[[0, -1]], rtol=1e-3)


@MORE
def test_of_some_blocks_alone():
    full = symmetric(np.linspace(-1, 2, P))
    page = Read(page_of(store(lambda rows, cols: full[rows, cols], RAGGED, chunk=1, blocks="diagonal")))
    assert page.texts.count("The run did not compute all of H.") == 2  # of spectrum, and top and bottom
    assert "Layer by layer in numbers" in page.texts


def test_time_tells_what_was_lost_and_memory_what_was_held():
    H = pair().H
    tiles = H.manifest.plan.tiles()
    for k, tile in enumerate(tiles):
        receipt = replace(
            RECEIPT, tile=tile.id, run=H.manifest.digest, pid=7 + k % 2, attempt=1 + 2 * (k == 3), finished=10.0 + k,
            peak_memory_bytes=(300 + k) * 10**6,
        )  # fmt: skip
        H.output.put(receipt_name(tile.id), receipt.to_bytes())
    subject = subject_of(H, {"memory": 2})
    part = time_part(subject)
    assert part.text[-1].startswith("Lost and computed again: 1 tile, 2 tries in all; what became of")
    assert "2 (memory)" in part.text[-1]
    assert [sum(int(x) for x in column(part, name)) for name in ("tiles", "repeated")] == [len(tiles), 1]
    assert f"No worker held more than {299 + len(tiles)} MB." in memory_part(subject).text[0]


def test_planned_memory_and_time_are_kept(tmp_path):
    H = compute_hessian(zoo.mlp().problem, str(tmp_path), **SETTINGS)
    forecast = json.loads((tmp_path / "forecast.json").read_text())
    assert forecast["memory_bytes"] <= forecast["allowed_bytes"]
    subject = subject_of(H)
    assert "were planned and" in memory_part(subject).text[0]
    assert list(subject.seconds) == ["planning", "tiles", "verifying"]
    Output(str(tmp_path)).put("forecast.json", b'{"memory_bytes": -1}')
    assert "planned" not in memory_part(subject_of(H)).text[0]


def test_long_tables_are_cut():
    part = Part("id", "Title", table=Table.of(("n",), ([k] for k in range(MOST_ROWS + 3))))
    assert "And 3 more rows." in Read(as_html(Page("t", "s", (), [part]))).texts


def test_damage_is_refused(tmp_path):
    full = symmetric(np.linspace(-1, 2, P))
    H = stored(full, RAGGED, tmp_path / "out")
    (tmp_path / "out" / "hessian.zarr" / "c" / "0" / "1").write_bytes(b"x" * 100)
    with pytest.raises(IncompleteError):
        write_report(H)


@pytest.mark.parametrize("missing", ["matplotlib.figure", "jinja2"])
def test_without_what_draws(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SpecError, match=r"is not installed: python3 -m pip install matplotlib jinja2"):
        write_report(pair().H)
