"""Mutations of every stored object and of specs: the right answer, or one line, within 1 GB and 10 s."""

import json

import pytest
from attempts import copied
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import of_bytes, of_json, of_spec
from tiny import sweep

MANY = pytest.mark.parametrize("examples", [1, pytest.param(100, marks=pytest.mark.long)])


def drawn(body, examples):
    """Draw examples; few are the same each time."""
    told = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    told(given(st.data())(body))()


def deeds(name):
    """What reads an object."""
    if name.startswith("receipts/"):
        return "prove", "summarize"
    return ("look", "hold") if name.startswith("lease/") else ("look", "prove")


@MANY
@pytest.mark.full("two hundred mutations")
def test_stored_objects(attempts, store, answer, tmp_path, examples):
    names = sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())

    def body(data):
        name = data.draw(st.sampled_from(names))
        whole = (store / name).read_bytes()
        mutate = of_json if whole[:1] == b"{" and data.draw(st.booleans()) else of_bytes
        folder = copied(store, tmp_path / "out")
        (folder / name).write_bytes(mutate(data, whole))
        for deed in deeds(name):
            came = attempts.make(deed, url=str(folder))
            assert came.kind != "fault", (name, came)
            assert deed != "look" or came.kind == "one line" or came.said == answer, (name, came)

    drawn(body, 140 * examples)


@MANY
def test_specs(attempts, tmp_path, examples):
    path = tmp_path / "job.yaml"

    def body(data):
        path.write_bytes(of_spec(data))
        assert attempts.make("spec", path=str(path)).kind != "fault"

    drawn(body, 40 * examples)


@MANY
@pytest.mark.full("a file each")
def test_tables(attempts, tmp_path, examples):
    """Of sweeps, in Parquet."""
    job = {"problem": "made.py:made", "problem_args": {}}
    sweep(tmp_path, job)
    path, whole = tmp_path / "sweep.parquet", (tmp_path / "sweep.parquet").read_bytes()
    came = attempts.make("table", url=str(tmp_path), job=job)
    assert came.kind == "answer", came

    def body(data):
        path.write_bytes(of_bytes(data, whole))
        came = attempts.make("table", url=str(tmp_path), job=json.loads(json.dumps(job)))
        assert came.kind != "fault", came

    drawn(body, 20 * examples)
