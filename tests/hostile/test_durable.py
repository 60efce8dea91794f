"""A finished run survives a power cut: all of it is on the disk before it is called finished."""

import os
from pathlib import Path

from tiny import tiny

from pipeline import compute_hessian


def synced(monkeypatch, folder, **settings):
    """Files and folders that were waited for before there was a word of success, and after."""
    before, after, fsync = set(), set(), os.fsync

    def recorded(file):
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        (after if (folder / "_SUCCESS").exists() else before).add(path)
        fsync(file)

    monkeypatch.setattr(os, "fsync", recorded)
    compute_hessian(tiny(), str(folder), executor="serial", chunk=4, **settings)
    return before, after


def test_all_is_on_the_disk(monkeypatch, tmp_path):
    before, after = synced(monkeypatch, tmp_path / "out")
    files = {path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.parent.name != "lease"}
    assert files - before == {tmp_path / "out" / "_SUCCESS"}
    assert {path.parent for path in files} <= before
    assert tmp_path in before
    assert tmp_path / "out" in after  # the name of the word itself


def test_where_that_is_not_asked_for(monkeypatch, tmp_path):
    before, after = synced(monkeypatch, tmp_path / "out", durable=False)
    assert not [path for path in before | after if "hessian.zarr" in str(path)]
