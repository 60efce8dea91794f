"""The outputs below a URL, and how far each is."""

import json

import clouds
import pytest
from commands import command, refused
from finished import stored, symmetric

from pipeline.runs.lease import Lease
from pipeline.runs.listing import list_outputs
from pipeline.runs.sweep_table import Sweep
from pipeline.storage.output import Output


def fill(url):
    """Lay outputs out below a URL: a finished one, one in a sweep, one that is being planned, and other things."""
    for name in ("one", "sweep/epoch1"):
        stored(symmetric([1.0, 2.0]), url=f"{url}/{name}").output.put("verify.json", b'{"ok": true}')
    Sweep({}).write(Output(f"{url}/sweep"))
    Output(f"{url}/other").put("notes/readme.txt", b"no output")


def test_found_with_their_states(tmp_path):
    fill(tmp_path)
    with Lease(Output(str(tmp_path / "begun")), dict), Lease(Output(str(tmp_path / "sweep")), dict):
        found = {row["url"].removeprefix(f"{tmp_path}/"): row["state"] for row in list_outputs(str(tmp_path))}
    assert found == {"begun": "running", "one": "finished", "sweep/epoch1": "finished"}
    assert [row["url"] for row in list_outputs(str(tmp_path / "one"))] == [str(tmp_path / "one")]


def test_the_command(tmp_path):
    fill(tmp_path)
    status, said, _ = command("list", tmp_path)
    assert status == 0
    assert "sweep/epoch1" in said
    rows = [json.loads(line) for line in command("list", tmp_path, "--json")[1].splitlines()]
    assert [(row["P"], row["done"], row["tiles"]) for row in rows] == [(2, 1, 1)] * 2
    assert "there is no Hessian there, nor below" in refused("list", tmp_path / "other")
    assert "there is no Hessian there, nor below" in refused("list", tmp_path / "nowhere")


@pytest.mark.full("starts an emulated bucket")
def test_in_a_bucket():
    for bucket in clouds.started(clouds.moto):
        url = f"{bucket.url}/listed"  # others may have left something beside it
        fill(url)
        found = [row["url"] for row in list_outputs(url)]
        assert found == [f"{url}/one", f"{url}/sweep/epoch1"]
