"""The small objects of an output as they are read back: data of a stranger, bounded and held against strict models."""

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import UnfitError
from pipeline.spec import one_fault
from pipeline.storage.output import Output

Record = TypeVar("Record")


def parsed(kind: TypeAdapter[Record], data: bytes) -> Record:
    """Read JSON by a strict model.

    Args:
        kind: of record.
        data: the JSON.

    Returns:
        The record.

    Raises:
        ValueError: it is none; the message is a clause.
    """
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        raise ValueError(one_fault(error)) from None


def read_or_none(output: Output, name: str, kind: TypeAdapter[Record], most_bytes: int) -> Record | None:
    """Read a record that a run can go on without.

    Args:
        output: that it lies in.
        name: of the object.
        kind: of record.
        most_bytes: that such an object can have.

    Returns:
        The record; None where there is none, or what lies there is none.

    Raises:
        OutputError: the output cannot be read.
    """
    try:
        data = output.get(name, most_bytes)
        return None if data is None else parsed(kind, data)
    except (UnfitError, ValueError):
        return None
