"""YAML as people write it is read; beyond the bounds, or what is none, is one line."""

import pytest

from pipeline import SpecError
from pipeline.files.yaml_data import MOST_BYTES, MOST_DEPTH, MOST_DIGITS, MOST_NODES, load_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 2.5, null, true]", {"a": 1, "b": ["x", 2.5, None, True]}),
        ("base: &b {x: 1}\nother: {<<: *b, y: 2}", {"base": {"x": 1}, "other": {"x": 1, "y": 2}}),
        ("", None),
        ("[" * MOST_DEPTH + "]" * MOST_DEPTH, None),
    ],
)
def test_read(text, value):
    found = load_yaml(text, "spec")
    assert value is None or found == value


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [1", "line 1"),
        ("a: 1\n\tb: 2", "line 2, column 1"),
        (b"\xff\xfe\xff", "characters that YAML does not allow"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), f"deeper than {MOST_DEPTH} levels"),
        (f"[{'1,' * MOST_NODES}1]", "values, aliases written out"),
        (LAUGHS, "values, aliases written out"),
        ("a: &a [*a]", "an alias of what it lies in"),
        (f"a: {'9' * (MOST_DIGITS + 1)}", "a number of 101 characters"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        (f"a: !!python/name:os.system{'9' * 5000} 1", "999 ..."),
        ("a: !!int x", "no int"),
        ("{[1, 2]: 3}", "unhashable key"),
    ],
)
def test_refused(text, fault):
    with pytest.raises(SpecError) as caught:
        load_yaml(text, "job.yaml")
    assert str(caught.value).startswith("job.yaml: not valid YAML (")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("a: 1")
    assert read_yaml(path, "job spec") == {"a": 1}
    with pytest.raises(SpecError, match=r"cannot read the job spec \(No such file"):
        read_yaml(tmp_path / "other.yaml", "job spec")
    with pytest.raises(SpecError, match="the job spec is a folder"):
        read_yaml(tmp_path, "job spec")
    with pytest.raises(SpecError, match="cannot read the job spec"):
        read_yaml("a\0b", "job spec")
    path.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(SpecError, match="the job spec has"):
        read_yaml(path, "job spec")
