"""Small objects that others may have written: strict models, or nothing."""

from dataclasses import dataclass

import pytest
from pydantic import ConfigDict, TypeAdapter

from pipeline.storage.output import Output
from pipeline.storage.records import parsed, read_or_none


@dataclass(frozen=True)
class Note:
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    count: int
    name: str = ""


KIND = TypeAdapter(Note)


def test_parsed():
    assert parsed(KIND, b'{"count": 3}') == Note(3)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"count": "3"}', b'{"count": 3, "more": 1}', b'{"name": "x"}', b"\xff\xfe"]
)
def test_what_is_no_record(data):
    with pytest.raises(ValueError, match=r"\S") as caught:
        parsed(KIND, data)
    assert "\n" not in str(caught.value)
    output = Output.private()
    output.put("note", data)
    assert read_or_none(output, "note", KIND, 100) is None


def test_read_or_none():
    output = Output.private()
    assert read_or_none(output, "note", KIND, 100) is None
    output.put("note", b'{"count": 3}')
    assert read_or_none(output, "note", KIND, 100) == Note(3)
    assert read_or_none(output, "note", KIND, 5) is None  # larger than such a record can be
