"""Stored objects that strangers have changed: the right answer, or one line, in bounded memory and time."""

import pytest
from attempts import copied, refusal
from stored import CORPUS

DEEDS = {
    "manifest": ("look",),
    "metadata": ("look",),
    "chunks": ("look", "prove"),
    "receipts": ("prove", "audit", "summarize"),
    "words": ("look", "hold"),
}


IN_DEFAULT = {"manifest", "chunks"}
TIERED = [kind if kind in IN_DEFAULT else pytest.param(kind, marks=pytest.mark.full("hundreds")) for kind in CORPUS]


@pytest.mark.parametrize("kind", TIERED)
def test_stored_objects(attempts, store, answer, tmp_path, kind):
    faults = {}
    for name, change in CORPUS[kind].items():
        folder = copied(store, tmp_path / "out")
        change(folder)
        for deed in DEEDS[kind]:
            came = attempts.make(deed, url=str(folder))
            if came.kind == "fault" or (came.kind == "answer" and deed == "look" and came.said != answer):
                faults[name, deed] = came
    assert not faults, "\n".join(f"{where}: {came}" for where, came in list(faults.items())[:20])


def test_what_a_line_says(attempts, store, tmp_path):
    """Where, what was got, and what was expected."""
    for name, deed, code, said in (
        ("manifest: chunk 0", "look", 2, "`chunk` got 0: Input should be greater than 0"),
        (
            "manifest.json: huge and sparse",
            "look",
            2,
            "manifest.json has 300,000,000 bytes, expected at most 33,554,432",
        ),
        ("manifest.json: a pipe", "look", 2, "manifest.json is a pipe, a device or a socket, expected a file"),
        ("manifest: 1e5 rows in chunks of one", "look", 2, "expected"),
        ("chunk: says 5 GB", "look", 1, "chunk c/0/1 cannot be decoded: cannot reshape 4,294,967,290 bytes"),
        ("chunk: an endless device", "look", 1, "chunk c/0/1 cannot be read"),
        ("hessian.zarr/zarr.json: shape [8, 9]", "look", 2, "not those of its manifest: shape (8, 9), expected (9, 9)"),
        ("gradient: ten entries", "look", 2, "gradient.zarr/c/0 has 84 bytes, expected at most 76"),
    ):
        folder = copied(store, tmp_path / "out")
        next(changes[name] for changes in CORPUS.values() if name in changes)(folder)
        line = refusal(attempts.make(deed, url=str(folder)), code)
        assert said in line, line
        assert str(folder) in line or line.startswith("chunk"), line
