"""What a notebook shows of an object."""

from xml.etree import ElementTree

import torch
import zoo
from torch import nn

from pipeline import Problem
from pipeline.planning.notebook import MOST_ROWS, card
from pipeline.preflight.planner import make_plan
from pipeline.spec import Settings


def test_names_are_text():
    html = card("<b>", [("a & b", "\x1b[31m"), ("none", "")], "names", ("name",), [("<script>alert(1)</script>",)])
    texts = [text.strip() for text in ElementTree.fromstring(html).itertext() if text.strip()]
    assert texts == ["<b>", "a & b", "\\x1b[31m", "names", "name", "<script>alert(1)</script>"]


def test_long_tables_are_cut():
    html = card("t", [], "rows", ("k",), [(str(k),) for k in range(MOST_ROWS + 5)])
    assert f">{MOST_ROWS - 1}<" in html
    assert f">{MOST_ROWS}<" not in html
    assert "and 5 more" in html


def test_a_problem():
    model = nn.Sequential(nn.Linear(3, 2))
    html = Problem(model, nn.MSELoss(), (torch.randn(7, 3), torch.randn(7, 2)), l2=0.5)._repr_html_()
    tree = ElementTree.fromstring(html)
    assert {"Problem of Sequential", "P", "8", "samples", "7", "0.weight", "2 x 3", "0.5"} <= set(tree.itertext())


def test_a_plan():
    plan = make_plan(zoo.mlp().problem, Settings(executor="serial"), None)
    tree = ElementTree.fromstring(plan._repr_html_())
    assert {"59", *plan.manifest.engines.values(), *plan.manifest.layout.names} <= set(tree.itertext())
