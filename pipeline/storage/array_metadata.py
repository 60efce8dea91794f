"""What a Zarr array of an output says of itself, held against the manifest: other readers know nothing else of it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter
from zarr.abc.codec import BytesBytesCodec

from pipeline.errors import OutputError
from pipeline.spec import brief
from pipeline.storage.output import METADATA_BYTES, Output
from pipeline.storage.records import parsed


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _GridSides(_Part):
    chunk_shape: tuple[int, ...]


class _Grid(_Part):
    name: Literal["regular"]
    configuration: _GridSides


class _Separator(_Part):
    separator: Literal["/"]


class _KeyEncoding(_Part):
    name: Literal["default"]
    configuration: _Separator


def _codec_name(value: object) -> object:
    """Name a codec; of what it is configured by, only the order of bytes matters to who decodes."""
    if not isinstance(value, dict):
        return value
    name, settings = value.get("name"), value.get("configuration")
    endian = settings.get("endian") if isinstance(settings, dict) else None
    return f"{name} {endian}" if name == "bytes" else name


class _ArrayMetadata(_Part):
    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: tuple[int, ...]
    data_type: str
    chunk_grid: _Grid
    chunk_key_encoding: _KeyEncoding
    codecs: tuple[Annotated[str, BeforeValidator(_codec_name)], ...]
    fill_value: Literal["NaN"]


_METADATA = TypeAdapter(_ArrayMetadata)


def require_array(
    output: Output,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    codecs: Sequence[BytesBytesCodec],
) -> None:
    """Refuse an array that is not the one that its manifest tells of.

    Args:
        output: that it lies in.
        name: of it.
        shape: it must have.
        chunks: their shape.
        dtype: of its entries.
        codecs: that bytes of chunks go through.

    Raises:
        OutputError: it is not there, or is another one.
    """
    data = output.get(f"{name}/zarr.json", METADATA_BYTES)
    if data is None:
        raise OutputError(f"output {output.url}: has no {name}")
    try:
        found = parsed(_METADATA, data)
    except ValueError as error:
        raise OutputError(f"output {output.url}: the metadata of {name} are damaged ({error})") from None
    names = "bytes little", *(codec.to_dict()["name"] for codec in codecs)
    facts: tuple[tuple[str, Any, Any], ...] = (
        ("shape", found.shape, shape),
        ("chunks", found.chunk_grid.configuration.chunk_shape, chunks),
        ("type", found.data_type, dtype),
        ("codecs", found.codecs, names),
    )
    for what, said, expected in facts:
        if said != expected:
            raise OutputError(
                f"output {output.url}: the metadata of {name} are not those of its manifest: {what} "
                f"{brief(str(said))}, expected {expected}"
            )
