"""Pictures: files that can be read anywhere, labels that are text, colours that say what was not computed."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.analysis.pictures.canvas import grouped, new_figure, short, take
from pipeline.analysis.pictures.maps import LEVELS, draw_map, painted, scale_of

HOSTILE = ["<script>alert(1)</script>.weight", "a.$x^2$", "\x1b[31mred\x1b[0m", "鍵.値", "--><b>", "&lt;"]
DRAWN = {"svg", "style", "defs", "g", "path", "use", "clipPath", "rect", "image"}


def picture(names, values=None):
    n = len(names)
    values = np.arange(1.0, n * n + 1).reshape(n, n) if values is None else values
    with new_figure(4, 3) as figure:
        draw_map(figure.add_subplot(), values, names, range(n + 1), "size")
        return take(figure, "map", "a map")


def test_names_are_text_in_files_that_are_well_formed():
    made = picture(HOSTILE)
    tree = ElementTree.fromstring(made.svg)
    kinds = {e.tag.split("}")[-1] for e in tree.iter()}
    assert kinds <= DRAWN | {"metadata", "RDF", "Work", "type", "format"}
    assert b"\x1b" not in made.svg
    assert b"<!--" not in made.svg
    assert Image.open(io.BytesIO(made.png)).format == "PNG"


def test_ink_is_the_readers():
    svg = picture(["a", "b"]).svg.decode()
    assert "currentColor" in svg
    assert "#1b1b1e" not in svg.replace("svg{color:#1b1b1e}", "")
    assert "prefers-color-scheme:dark" in svg


def test_the_same_picture_is_the_same_file():
    assert picture(["a", "b"]).svg == picture(["a", "b"]).svg


def test_labels():
    assert grouped(["a.weight", "a.bias", "b.0.weight", "scale", "shift"]) == [
        "a.weight",
        "· bias",
        "b.0.weight",
        "scale",
        "shift",
    ]
    assert short("x" * 40) == "x" * 14 + "…" + "x" * 14
    assert short("\x1b[31m") == "\\x1b[31m"


def test_colours_tell_sizes_apart_and_leave_out_what_was_not_computed():
    values = np.array([[1e-3, np.nan], [0.0, 1.0]])
    image = Image.open(io.BytesIO(painted(values)))
    assert image.size == (2, 2)
    seen = np.asarray(image)
    assert seen[0, 1] == LEVELS
    assert image.convert("RGBA").getpixel((1, 0))[3] == 0
    assert seen[1, 1] == LEVELS - 1
    assert seen[1, 0] == seen[0, 0] == 0  # zero is below the scale, in its lowest colour


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.ones((2, 2)), np.full((2, 2), np.nan)])
def test_nothing_to_tell_apart(values):
    assert scale_of(values) == (None, False)
    assert picture(["a", "b"], values).png
    assert painted(values)


def test_a_scale_ends_where_rounding_is():
    scale, is_clipped = scale_of(np.array([[1e-30, 1.0], [1.0, 2.0]]))
    assert is_clipped
    assert scale.vmin == pytest.approx(2e-8)
