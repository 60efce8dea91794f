"""The recorded table of faults, and what README says of it."""

import json
from pathlib import Path

from fault_table import RESULTS, markdown, summary

README = Path(__file__).parents[2] / "README.md"


def test_readme_says_what_was_recorded():
    found = json.loads((RESULTS / "faults.json").read_text())
    assert found["survived"] == found["tried"] == len(found["rows"])
    assert (RESULTS / "faults.md").read_text() == markdown(found["rows"])
    assert f"{found['survived']} of {found['tried']} trials survived" in README.read_text()
    assert summary(found["rows"]) in README.read_text()


def test_a_trial_that_failed_is_seen():
    rows = json.loads((RESULTS / "faults.json").read_text())["rows"]
    broken = {"test": rows[0]["test"], "survived": False}
    assert "NO" not in markdown(rows)
    assert f"{len(rows) - 1} of {len(rows)} trials survived" in markdown([broken, *rows[1:]])
    assert "| NO |" in summary([broken, *rows[1:]])
