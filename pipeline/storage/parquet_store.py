"""The matrix as Parquet, for readers that know tables and not arrays: one file per chunk, in Hive folders.

A file has a line for each row of its chunk: `row`, the flat index, and `values`, the entries in the chunk's columns.
Its schema metadata say where the chunk lies: `first_row` and `first_col` (flat indices), `P`, and `chunk`, the side B.
"""

import io
from collections.abc import Mapping

import crc32c as crc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import IncompleteError, UnfitError, in_words
from pipeline.planning.manifest import Manifest
from pipeline.storage.chunk_codec import Matrix
from pipeline.storage.output import PARQUET, Output
from pipeline.storage.zarr_store import StoredObject

FIXED_BYTES = 2**20  # at most, of a file: all but what its entries and rows take


def file_key(i: int, j: int) -> str:
    """Return the key of a chunk's file below the folder; DuckDB would read padded numbers as text."""
    return f"row_chunk={i}/col_chunk={j}/chunk.parquet"


def encode(manifest: Manifest, i: int, j: int, values: Matrix) -> bytes:
    """Write a chunk as a file.

    Args:
        manifest: chunk grid, stored type and codec.
        i: chunk row.
        j: chunk column.
        values: entries.  # shape: (B, B), less at the ragged end

    Returns:
        The file, the same bytes for the same entries.
    """
    rows, cols = values.shape
    # Lists of fixed size would break pyarrow.dataset and polars where the last chunk is ragged.
    offsets = _array(np.arange(rows + 1, dtype=np.int32) * cols)
    lists = pa.ListArray.from_arrays(offsets, _array(values.reshape(-1)), type=_list_type(manifest))
    numbers = _array(np.arange(rows, dtype=np.int64) + i * manifest.chunk)
    table = pa.Table.from_arrays([numbers, lists], schema=_schema(manifest, i, j))
    file = io.BytesIO()  # pyarrow's own buffer doubles as it grows
    pq.write_table(
        table,
        file,
        compression=manifest.codec,
        use_dictionary=False,
        use_byte_stream_split=["values.list.element"],
        write_page_checksum=True,
        write_statistics=["row"],  # lets readers skip files by row; of entries they would only cost time
    )
    return file.getvalue()


def decode(manifest: Manifest, i: int, j: int, data: bytes) -> Matrix:
    """Read what `encode` wrote, checking every page against its checksum.

    Args:
        manifest: of the run.
        i: chunk row.
        j: chunk column.
        data: the file.

    Returns:
        The entries.  # shape: (B, B), less at the ragged end

    Raises:
        IncompleteError: a page is damaged, or it is not the file of that chunk.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IncompleteError(f"cannot be decoded ({in_words(error)})") from None
    rows, cols = (manifest.plan.span(range(k, k + 1)) for k in (i, j))
    if not table.schema.equals(_schema(manifest, i, j), check_metadata=True):
        raise IncompleteError(f"has columns or metadata other than those of chunk ({i}, {j})")
    numbers, lists = (table[name].combine_chunks() for name in ("row", "values"))
    whole = (_vector(lists.value_lengths()) == len(cols)).all()
    if not (whole and np.array_equal(_vector(numbers), np.arange(rows.start, rows.stop))):
        raise IncompleteError(f"does not hold rows {rows.start} to {rows.stop} with {len(cols)} values each")
    return _vector(lists.flatten()).reshape(len(rows), len(cols))


class ParquetFiles:
    """The Parquet files of an output, or of an export elsewhere.

    Args:
        output: where.
        manifest: chunk grid, stored type, codec and symmetry.
        folder: of the files, relative to the output.
        keep: files that are there, with their sizes; one that is what would be put is left as it is.
    """

    def __init__(
        self, output: Output, manifest: Manifest, folder: str = PARQUET, keep: Mapping[str, int] | None = None
    ) -> None:
        self._output, self._manifest, self._folder, self._keep = output, manifest, folder, keep or {}

    @staticmethod
    def key(i: int, j: int) -> str:
        """Return the key of a chunk's file below the folder."""
        return file_key(i, j)

    def write_chunk(self, i: int, j: int, values: Matrix) -> StoredObject:
        """Encode and put the file of one chunk; its mirror image is another.

        Args:
            i: chunk row.
            j: chunk column.
            values: entries.  # shape: (B, B), less at the ragged end

        Returns:
            What lies there now.
        """
        key, data = file_key(i, j), encode(self._manifest, i, j, values)
        if self._keep.get(key) != len(data) or self._output.get(self._name(key), len(data)) != data:
            self._output.put(self._name(key), data)
        return StoredObject(key, len(data), crc.crc32c(data))

    def read_chunk(self, i: int, j: int, expected: StoredObject) -> Matrix:
        """Read and check the file of a stored chunk.

        Args:
            i: chunk row.
            j: chunk column.
            expected: what its receipt says; the checksum of the whole file, since that of a page covers neither the
                page's header nor the file's footer.

        Returns:
            Its entries.  # shape: (B, B), less at the ragged end

        Raises:
            IncompleteError: it is missing, does not match its checksum, or is not the file of that chunk.
        """
        name = self._name(file_key(i, j))
        try:
            data = self._output.get(name, _most_bytes(self._manifest))
        except UnfitError as error:
            raise IncompleteError(f"{name} cannot be read: {error}") from None
        if data is None:
            raise IncompleteError(f"{name} is missing")
        if crc.crc32c(data) != expected.crc32c:
            raise IncompleteError(f"{name} does not match its checksum")
        try:
            return decode(self._manifest, i, j, data)
        except IncompleteError as error:
            raise IncompleteError(f"{name} {error}") from None

    def _name(self, key: str) -> str:
        return f"{self._folder}/{key}" if self._folder else key


def _array(values: Matrix) -> pa.Array:
    """Hand a vector to Arrow as it lies; `pa.array` would import pandas where there is one, for 47 MiB."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _vector(array: pa.Array) -> Matrix:
    """Take a vector from Arrow as it lies; `to_numpy` would import pandas too."""
    return np.from_dlpack(array)


def _most_bytes(manifest: Manifest) -> int:
    """Return the bytes that a chunk's file can have: what does not become smaller is kept with little on top."""
    return FIXED_BYTES + 9 * manifest.chunk**2 * np.dtype(manifest.store_dtype).itemsize // 8 + 16 * manifest.chunk


def _list_type(manifest: Manifest) -> pa.ListType:
    return pa.list_(pa.field("element", pa.from_numpy_dtype(manifest.store_dtype), nullable=False))


def _schema(manifest: Manifest, i: int, j: int) -> pa.Schema:
    """Return columns and metadata of a chunk's file."""
    place = {
        "first_row": i * manifest.chunk,
        "first_col": j * manifest.chunk,
        "P": manifest.layout.size,
        "chunk": manifest.chunk,
    }
    columns = [pa.field("row", pa.int64(), nullable=False), pa.field("values", _list_type(manifest), nullable=False)]
    return pa.schema(columns, metadata={name: str(value) for name, value in place.items()})
