"""Bytes of a chunk of the matrix, as Zarr encodes it.

Zarr writes through an event loop and several copies, in up to twice the CPU time of what is done here by the same
codecs (DESIGN.md has the figures). Whole chunks pass here; all else of the array is Zarr's.
"""

import math
import struct
from typing import Any, Literal

import crc32c as crc
import numpy as np
import numpy.typing as npt
from numcodecs import Blosc
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec

Matrix = npt.NDArray[Any]
Codec = Literal["none", "lz4", "zstd"]

_LEVELS = {"lz4": 5, "zstd": 3}
CRC_BYTES = 4
_BLOSC_HEADER = struct.Struct("<4x3I")  # bytes before compression, of a block, and after compression


def zarr_codecs(name: Codec) -> list[BytesBytesCodec]:
    """Name the codecs of a chunk to Zarr; the checksum comes last, so that it covers what lies in the store."""
    if name == "none":
        return [Crc32cCodec()]
    return [BloscCodec(cname=name, clevel=_LEVELS[name], shuffle="shuffle"), Crc32cCodec()]


class ChunkCodec:
    """Encodes and decodes chunks.

    Args:
        name: of the codec.
        chunk: side of a chunk, B.
        dtype: of the entries as they are stored.
    """

    def __init__(self, name: Codec, chunk: int, dtype: npt.DTypeLike) -> None:
        self._blosc = None if name == "none" else Blosc(name, _LEVELS[name], Blosc.SHUFFLE)
        self._shape, self._dtype = (chunk, chunk), np.dtype(dtype).newbyteorder("<")
        self._bytes = math.prod(self._shape) * self._dtype.itemsize

    @property
    def most_bytes(self) -> int:
        """Bytes that an encoded chunk can have: what does not become smaller is kept as it is, after a header."""
        return self._bytes + _BLOSC_HEADER.size + CRC_BYTES

    def encode(self, values: Matrix) -> tuple[memoryview, bytes]:
        """Return the bytes of a chunk.

        Args:
            values: its entries.  # shape: (B, B), less at the ragged end

        Returns:
            The chunk, filled up with NaN, and its CRC-32C, apart: what is not compressed is not copied.
        """
        values = np.ascontiguousarray(values, self._dtype)
        if values.shape != self._shape:
            whole = np.full(self._shape, np.nan, self._dtype)
            whole[: values.shape[0], : values.shape[1]] = values
            values = whole
        data: Any = self._blosc.encode(values) if self._blosc else values.reshape(-1).view(np.uint8)
        return memoryview(data), crc.crc32c(data).to_bytes(CRC_BYTES, "little")

    def decode(self, data: bytes, out: Matrix | None = None) -> Matrix:
        """Return the entries of a chunk.

        Args:
            data: as encoded.
            out: takes them where they are compressed: pages in use cost less than half of fresh ones.  # shape: (B, B)

        Returns:
            The entries, with what fills them up.  # shape: (B, B)

        Raises:
            ValueError: the bytes do not match their checksum, or are not those of such a chunk.
        """
        body = checked_body(data)
        if self._blosc:
            self._require_header(body)
            try:
                body = self._blosc.decode(body, out)
            except RuntimeError as error:  # of Blosc
                raise ValueError(str(error)) from None
        return np.frombuffer(body, self._dtype).reshape(self._shape)

    def _require_header(self, body: memoryview) -> None:
        """Believe no size of what would be made room for."""
        raw, _, stored = _BLOSC_HEADER.unpack_from(body) if len(body) >= _BLOSC_HEADER.size else (0, 0, -1)
        if stored != len(body):
            raise ValueError("error in the Blosc header: its size is another one")
        if raw != self._bytes:
            raise ValueError(f"cannot reshape {raw:,} bytes into {self._shape} of {self._dtype.name}")


def checked_body(data: bytes) -> memoryview:
    """Return what a checksum at its end is of.

    Args:
        data: with the checksum.

    Returns:
        The bytes without it.

    Raises:
        ValueError: they do not match it.
    """
    body = memoryview(data)[:-CRC_BYTES]
    if len(data) < CRC_BYTES or ending_checksum(data) != crc.crc32c(body):
        raise ValueError("does not match its checksum")
    return body


def ending_checksum(data: bytes) -> int:
    """Read the checksum that ends a chunk."""
    return int.from_bytes(data[-CRC_BYTES:], "little")
