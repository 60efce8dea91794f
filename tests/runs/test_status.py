"""What `hessian status` says of a run, and its exit status."""

import io
import json
from contextlib import ExitStack

import pytest
import zoo
from commands import command, refused
from rich.console import Console

from pipeline import compute_hessian
from pipeline.console import tables
from pipeline.runs.lease import Lease
from pipeline.runs.status import status
from pipeline.storage.output import Output


def compute(url, **settings):
    return compute_hessian(zoo.mlp().problem, url, executor="serial", **settings)


def said(url):
    """State and exit status, as text and as JSON have them."""
    code, text, _ = command("status", url)
    same, shown, _ = command("status", url, "--json")
    words = dict(line.split(": ", 1) for line in text.splitlines())
    assert code == same
    assert words["state"] == json.loads(shown)["state"]
    assert "None" not in text
    return words["state"], code


def test_finished(tmp_path):
    compute(str(tmp_path))
    assert said(tmp_path) == ("finished", 0)


def test_nobody_asked_for_a_proof(tmp_path):
    compute(str(tmp_path), verify=False)
    assert said(tmp_path) == ("unproven", 1)


def test_a_proof_that_failed(tmp_path):
    compute(str(tmp_path))
    output = Output(str(tmp_path))
    output.put("verify.json", json.dumps({"ok": False}).encode())
    output.delete("_SUCCESS")
    assert said(tmp_path) == ("unproven", 1)


def test_running_and_interrupted(tmp_path):
    compute(str(tmp_path), tile=(1, 1), chunk=16)
    output = Output(str(tmp_path))
    for name in ("_SUCCESS", "verify.json", "receipts/r0-1_c0-1.json"):
        assert output.get(name) is not None
        output.delete(name)
    assert said(tmp_path) == ("interrupted", 75)
    with Lease(output, dict):
        assert said(tmp_path) == ("running", 75)
    assert said(tmp_path) == ("interrupted", 75)


def test_being_planned(tmp_path):
    with Lease(Output(str(tmp_path)), dict):
        assert said(tmp_path) == ("running", 75)


def test_absent(tmp_path):
    assert status(str(tmp_path)) == {"state": "absent"}
    assert "holds no Hessian" in refused("status", tmp_path)
    assert command("status", tmp_path, "--json")[:2] == (2, '{"state": "absent"}\n')


def test_no_box_of_eighty_columns_through_a_pipe(tmp_path):
    url = tmp_path / ("a" * 100)
    compute(str(url))
    text = command("status", url)[1]
    assert text.startswith("state: finished\nP: ")
    assert text.isascii()
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("terminal", [False, True])
def test_watched_until_nobody_is_at_work(tmp_path, monkeypatch, terminal):
    """One tile is missing, and a driver says how it goes; after the first answer it puts the tile there, and ends."""
    compute(str(tmp_path), tile=(1, 1), chunk=16)
    output, seen = Output(str(tmp_path)), io.StringIO()
    monkeypatch.setattr(tables, "open_console", lambda: Console(file=seen, force_terminal=terminal, width=90))
    missing = {name: output.get(name) for name in ("receipts/r0-1_c0-1.json", "verify.json", "_SUCCESS")}
    told = {"tiles": 10, "before": 0, "done": 9, "seconds": 18.0, "workers": 3, "errors": ["\x1b[31m<b>[bold]"]}
    with ExitStack() as held:
        held.enter_context(Lease(output, lambda: told))
        for name in missing:
            output.delete(name)

        def read():
            found = status(str(tmp_path))
            for name, data in missing.items():
                output.put(name, data)
            held.close()
            return found

        assert tables.watch_status(read, 0.001)["state"] == "finished"
    said = seen.getvalue()
    if terminal:
        assert all(text in said for text in ("running", "9 of 10", "10 of 10", "finished", "\\x1b[31m<b>[bold]"))
    else:
        first, *rest = said.splitlines()
        assert first.startswith("running: 9 of 10 tiles, ")
        assert first.endswith(", 3 workers, 2.0 s left")
        assert "state: finished" in rest


def test_watched_where_nobody_is_at_work(tmp_path):
    assert command("status", tmp_path, "--watch")[0] == 2
    compute(str(tmp_path))
    assert command("status", tmp_path, "--watch")[:2] == command("status", tmp_path)[:2]
    assert command("status", tmp_path, "--watch", "--json")[1].count("\n") == 1
