"""What a proof says in one line."""

import pytest

from pipeline.results.verification import Verification

CHECKED = {
    "method": "double backward",
    "blocks": 16,
    "sampled_rows": 4,
    "block_error": 2e-9,
    "tolerance": 1e-6,
    "worst_entry": (3, 5, 1e-9, "w", "b"),
}


@pytest.mark.parametrize(
    ("found", "parts"),
    [
        ({"faults": ["chunk c/0/1 is missing", "more"]}, ["2 of 4 chunks are at fault, the first: chunk c/0/1"]),
        ({}, ["4 chunks present", "numbers not checked"]),
        ({"files": 1}, ["4 chunks and 1 Parquet file present"]),
        (CHECKED, ["16 blocks against double backward", "4 rows entry by entry", "error 2.0e-09", "tolerance 1e-06"]),
        (CHECKED | {"inconclusive": ["a", "b", "c", "d"]}, ["say nothing (kinks?) at a, b, c"]),
    ],
)
def test_summary(found, parts):
    summary = Verification(ok="faults" not in found, chunks=4, **{"faults": [], **found}).summary()
    assert all(part in summary for part in parts)
    assert "worst" not in summary


@pytest.mark.parametrize(
    ("found", "worst"),
    [
        ({"worst_block": ("w", "b"), "block_error": 1e-2}, "worst is block H[w, b]"),
        (
            {"worst_entry": (3, 5, 1e-1, "w", "b"), "block_error": 1e-2},
            "worst is entry (3, 5) of block H[w, b], off by",
        ),
        ({"worst_entry": (3, 5, 1e-9, "w", "b"), "block_error": 1e-2}, "worst is block H[?, ?]"),
    ],
)
def test_the_worst_of_what_failed(found, worst):
    assert worst in Verification(ok=False, chunks=4, faults=[], **(CHECKED | found)).summary()
