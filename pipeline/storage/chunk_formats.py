"""The formats that a matrix is stored in, behind one protocol: a chunk becomes an object of each, written whole."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from pipeline.planning.manifest import Manifest
from pipeline.spec import FormatName
from pipeline.storage.chunk_codec import Matrix
from pipeline.storage.output import Output
from pipeline.storage.parquet_store import ParquetFiles
from pipeline.storage.zarr_store import MatrixStore, StoredObject


class ChunkFormat(Protocol):
    """One way to store chunks.

    Args:
        output: where.
        manifest: chunk grid, types and codec.
    """

    def __init__(self, output: Output, manifest: Manifest) -> None: ...

    @staticmethod
    def key(i: int, j: int) -> str:
        """Return the key of a chunk's object in the format's folder."""

    def write_chunk(self, i: int, j: int, values: Matrix) -> StoredObject:
        """Put one chunk, and nothing else.

        Args:
            i: chunk row.
            j: chunk column.
            values: entries, C-contiguous.  # shape: (B, B), less at the ragged end

        Returns:
            What lies there now.
        """

    def read_chunk(self, i: int, j: int, expected: StoredObject) -> Matrix:
        """Read and check one chunk.

        Args:
            i: chunk row.
            j: chunk column.
            expected: what its receipt says of it.

        Returns:
            Its entries, without padding.  # shape: (B, B), less at the ragged end

        Raises:
            IncompleteError: it is missing, is not what was expected, or cannot be decoded.
        """


FORMATS: dict[FormatName, type[ChunkFormat]] = {"zarr": MatrixStore, "parquet": ParquetFiles}


def formats_of(output: Output, manifest: Manifest) -> dict[FormatName, ChunkFormat]:
    """Open the formats that a run stores in, by name."""
    return {name: FORMATS[name](output, manifest) for name in manifest.formats}


def store_chunk(
    formats: Iterable[ChunkFormat], manifest: Manifest, i: int, j: int, values: Matrix, mirror: Matrix | None = None
) -> list[StoredObject]:
    """Put a chunk in all formats, and its mirror image where the matrix is stored whole.

    Args:
        formats: to put it in.
        manifest: of the run.
        i: chunk row.
        j: chunk column, not below the diagonal.
        values: entries; a diagonal chunk must be symmetric.  # shape: (B, B), less at the ragged end
        mirror: their transpose, where the caller has it.

    Returns:
        What was put.
    """
    puts, formats = [], list(formats)
    for place in manifest.images(i, j):
        if place != (i, j):
            values = np.ascontiguousarray(values.T) if mirror is None else mirror
        puts += [each.write_chunk(*place, values) for each in formats]
    return puts
