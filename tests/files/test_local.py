"""Files that are whole or not there, and what is no file."""

import os
import stat

import pytest

from pipeline.errors import UnfitError
from pipeline.files.local import PARTIAL, create_file, read_regular, remove_partial, replace_file, settle


def test_reads_within_bounds(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(UnfitError, match="has 5 bytes, expected at most 4"):
        read_regular(path, 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "y", 5)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it: opened as a file it would be waited for
    with pytest.raises(UnfitError, match="is a pipe"):
        read_regular(tmp_path / "pipe", 5)
    with pytest.raises(UnfitError, match="is a folder"):
        read_regular(tmp_path, 5)
    with pytest.raises(UnfitError, match="device"):
        read_regular("/dev/zero", 5)


@pytest.mark.parametrize("lasting", [False, True])
def test_replaces_in_one_step(tmp_path, lasting):
    path = tmp_path / "new" / "x"
    replace_file(path, [b"12", memoryview(b"345")], lasting=lasting)
    replace_file(path, [b"6"], lasting=lasting)
    assert path.read_bytes() == b"6"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_ISREG(path.stat().st_mode)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"whole")
    seen = []

    def parts():
        yield b"half"
        seen.extend(each.name for each in tmp_path.iterdir() if each != path)
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 (as it was raised)
        replace_file(path, parts(), lasting=False)
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
    (partial,) = seen
    assert partial.startswith(".")  # readers of the folder pass it over
    assert partial.endswith(PARTIAL)


def test_creates_once(tmp_path):
    path = tmp_path / "new" / "x"
    create_file(path, b"first")
    with pytest.raises(FileExistsError):
        create_file(path, b"second")
    assert path.read_bytes() == b"first"


def test_what_is_gone_is_settled(tmp_path):
    settle(tmp_path / "gone")
    settle(tmp_path)


def test_what_killed_writers_left_is_removed(tmp_path):
    kept = ["c/0/1", "lease/.3.0123.partial", "c/0/.hidden", "0123.partial"]
    for name in (*kept, ".manifest.json.0123.partial", "c/0/.1.0123.partial", "c/lease/.1.0123.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100, 100))
    remove_partial(tmp_path, "lease", before=100)
    assert len(list(tmp_path.rglob("*.partial"))) == 5
    remove_partial(tmp_path, "lease", before=101)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
