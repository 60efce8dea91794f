"""What is said of a lease's holder, as far as its lease can be understood."""

import json

import pytest

from pipeline.runs.holder import LEASE_SECONDS, Held, Holder, is_fresh, read_holder
from pipeline.storage.output import Output

KNOWN = {"token": "t", "since": 0.0, "host": "h", "pid": 7, "state": {"tiles": 4, "done": 1, "lost": {"hung": 2}}}


def read(data):
    output = Output.private()
    output.put("lease/1.json", data)
    return read_holder(output, "lease/1.json")


def test_read():
    found = read(json.dumps(KNOWN | {"of a later version": True}).encode())
    assert (found.host, found.process, found.moment) == ("h", "process 7", "1970-01-01 00:00:00 UTC")
    assert (found.state.tiles, found.state.done, found.state.lost) == (4, 1, {"hung": 2})


def test_of_one_that_says_nothing():
    found = read(b"{}")
    assert (found.host, found.process, found.moment) == ("somebody", "process ?", "nobody knows when")


@pytest.mark.parametrize(
    "wrong", [{"pid": -1}, {"pid": "7"}, {"since": 1e18}, {"since": float("nan")}, {"state": {"tiles": -1}}, []]
)
def test_what_cannot_be_understood(wrong):
    assert read(json.dumps(KNOWN | wrong if isinstance(wrong, dict) else wrong).encode()) is None
    assert read_holder(Output.private(), "lease/1.json") is None


@pytest.mark.parametrize(
    ("silent", "fresh"),
    [
        (None, False),
        (0.0, True),
        (LEASE_SECONDS - 1, True),
        (LEASE_SECONDS, False),
        (-1.0, True),
        (-LEASE_SECONDS, False),
    ],
)
def test_signs_of_life(silent, fresh):
    assert is_fresh(silent) is fresh
    assert Held(Holder(), silent).is_live is fresh
    assert not Held(Holder(released=True), silent).is_live
