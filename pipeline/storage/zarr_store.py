"""The chunked matrix: a Zarr v3 array, one object per chunk, each written whole by one writer."""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import zarr
from pydantic import ConfigDict, Field, NonNegativeInt
from zarr.errors import ZarrUserWarning

from pipeline.errors import IncompleteError, OutputError, UnfitError
from pipeline.planning.manifest import Manifest
from pipeline.storage.array_metadata import require_array
from pipeline.storage.chunk_codec import CRC_BYTES, ChunkCodec, Matrix, checked_body, ending_checksum, zarr_codecs
from pipeline.storage.output import GRADIENT, MATRIX, Output
from pipeline.storage.read_ahead import ahead
from pipeline.storage.retries import patient

Index = slice | npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredObject:
    """An object that was put: its key in its folder, its size, and its checksum, which ends a Zarr chunk."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    key: str
    bytes: NonNegativeInt
    crc32c: Annotated[int, Field(ge=0, lt=2**32)]

    def differs_from(self, expected: "StoredObject") -> str:
        """Return in which way this object is not the one that a receipt lists."""
        if self.bytes != expected.bytes:
            return f"has {self.bytes:,} bytes, its receipt says {expected.bytes:,}"
        return "does not match the checksum in its receipt"


def chunk_key(i: int, j: int) -> str:
    """Return the key of a chunk below the array."""
    return f"c/{i}/{j}"


class MatrixStore:
    """The array of an output.

    Args:
        output: where.
        manifest: chunk grid, types and symmetry.
    """

    def __init__(self, output: Output, manifest: Manifest) -> None:
        self.manifest, self.chunk = manifest, manifest.chunk
        self._output, self._codec = output, ChunkCodec(manifest.codec, manifest.chunk, manifest.store_dtype)
        size, side = manifest.layout.size, manifest.chunk
        codecs = zarr_codecs(manifest.codec)
        require_array(output, MATRIX, (size, size), (side, side), manifest.store_dtype, codecs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel by name, as the output does: what is open belongs to the process that opened it."""
        return type(self), (self._output, self.manifest)

    @staticmethod
    @patient
    def create(output: Output, manifest: Manifest, gradient: npt.NDArray[np.float64]) -> None:
        """Write the metadata of the matrix, and the gradient; once, before any worker starts.

        Args:
            output: where.
            manifest: parameter table, chunk grid, types and symmetry.
            gradient: dL / dtheta.  # shape: (P,)
        """
        size = manifest.layout.size
        about: dict[str, Any] = {
            "parameters": manifest.parameters,
            "loss": manifest.fingerprint.loss,
            "symmetry": manifest.symmetry,
        }
        zarr.create_array(
            output.zarr_store(MATRIX),
            shape=(size, size),
            chunks=(manifest.chunk, manifest.chunk),
            dtype=manifest.store_dtype,
            compressors=zarr_codecs(manifest.codec),
            fill_value=float("nan"),
            dimension_names=("row", "col"),
            attributes=about,
            overwrite=True,
        )
        array = zarr.create_array(
            output.zarr_store(GRADIENT),
            shape=(size,),
            chunks=(max(size, 1),),
            dtype="float64",
            compressors=zarr_codecs("none"),
            fill_value=float("nan"),
            dimension_names=("row",),
            attributes={"loss": manifest.fingerprint.loss},
            overwrite=True,
        )
        array[:] = gradient
        # The folder is a group of both, known without a listing: xarray opens it as a data set.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)  # of objects beside the arrays, and of the young format
            group = output.zarr_store()
            zarr.open_group(group, mode="a")
            zarr.consolidate_metadata(group)

    @staticmethod
    def gradient(output: Output, manifest: Manifest) -> npt.NDArray[np.float64]:
        """Read the gradient.

        Args:
            output: where.
            manifest: of the run.

        Returns:
            dL / dtheta.  # shape: (P,)

        Raises:
            OutputError: it is missing or damaged.
        """
        size = manifest.layout.size
        require_array(output, GRADIENT, (size,), (max(size, 1),), "float64", zarr_codecs("none"))
        if not size:
            return np.zeros(0)
        data = output.get(f"{GRADIENT}/c/0", 8 * size + CRC_BYTES)
        if data is None:
            raise OutputError(f"output {output.url}: the chunk of {GRADIENT} is missing")
        try:
            values = np.frombuffer(checked_body(data), "<f8").reshape(size)
        except ValueError as error:
            raise OutputError(f"output {output.url}: {GRADIENT} cannot be decoded ({error})") from None
        if np.isnan(values).any():
            raise OutputError(f"output {output.url}: {GRADIENT} holds entries that are not numbers")
        return values.astype(np.float64)

    @staticmethod
    def key(i: int, j: int) -> str:
        """Return the key of a chunk below the array."""
        return chunk_key(i, j)

    def write_chunk(self, i: int, j: int, values: Matrix) -> StoredObject:
        """Encode and put one chunk; its mirror image is another.

        Args:
            i: chunk row.
            j: chunk column.
            values: entries.  # shape: (B, B), less at the ragged end

        Returns:
            What was put.
        """
        key, (body, checksum) = chunk_key(i, j), self._codec.encode(values)
        self._output.put(f"{MATRIX}/{key}", body, checksum)
        return StoredObject(key, len(body) + len(checksum), ending_checksum(checksum))

    def read_chunk(self, i: int, j: int, expected: StoredObject | None = None, out: Matrix | None = None) -> Matrix:
        """Read and check one stored chunk as it lies.

        Args:
            i: chunk row.
            j: chunk column.
            expected: what its receipt says of it.
            out: room for a whole chunk, which the entries may lie in.  # shape: (B, B)

        Returns:
            Its entries, without padding.  # shape: (B, B), less at the ragged end

        Raises:
            IncompleteError: it is missing, is not what was expected, does not match its checksum, or cannot be decoded.
        """
        key, data = chunk_key(i, j), self._get(i, j)
        if data is None:
            raise IncompleteError(f"chunk {key} is missing")
        return self._decoded(i, j, data, expected, out)

    def _get(self, i: int, j: int) -> bytes | None:
        try:
            return self._output.get(f"{MATRIX}/{chunk_key(i, j)}", self._codec.most_bytes)
        except UnfitError as error:
            raise IncompleteError(f"chunk {chunk_key(i, j)} cannot be read: {error}") from None

    def _decoded(
        self, i: int, j: int, data: bytes, expected: StoredObject | None = None, out: Matrix | None = None
    ) -> Matrix:
        """Check the bytes of a chunk, and give its entries without padding."""
        key = chunk_key(i, j)
        if expected is not None and (found := StoredObject(key, len(data), ending_checksum(data))) != expected:
            raise IncompleteError(f"chunk {key} {found.differs_from(expected)}")
        try:
            values = self._codec.decode(data, out)
        except ValueError as error:
            raise IncompleteError(f"chunk {key} cannot be decoded: {error}") from None
        rows, cols = (len(self.manifest.plan.span(range(k, k + 1))) for k in (i, j))
        values = values[:rows, :cols]
        if np.isnan(values.min()):  # as it is where any is; half the time of asking each
            raise IncompleteError(f"chunk {key} holds entries that are not numbers")
        return values

    def chunk_or_fault(self, key: tuple[int, int], out: Matrix | None = None) -> Matrix | IncompleteError:
        """Read and check a chunk, see `read_chunk`; gives its entries, or what is wrong with it."""
        try:
            return self.read_chunk(*key, out=out)
        except IncompleteError as fault:
            return fault

    def read(self, rows: Index, cols: Index) -> Matrix:
        """Read entries as they lie in the store, mirrored or not; those not computed are NaN.

        Args:
            rows: slice or integer array.
            cols: slice or integer array.

        Returns:
            The entries.  # shape: (rows, cols)

        Raises:
            IncompleteError: a chunk is damaged.
        """
        size = self.manifest.layout.size
        of_rows, of_cols = (np.arange(size)[index] if isinstance(index, slice) else index for index in (rows, cols))
        values = np.full((len(of_rows), len(of_cols)), np.nan, self.manifest.store_dtype)
        in_rows, in_cols = (_by_chunk(index, self.chunk) for index in (of_rows, of_cols))
        keys = [(i, j) for i in in_rows for j in in_cols]
        for (i, j), chunk in zip(keys, ahead(self._chunk_or_none, keys), strict=True):
            if chunk is not None:
                (to_rows, from_rows), (to_cols, from_cols) = in_rows[i], in_cols[j]
                values[_crossing(to_rows, to_cols)] = chunk[_crossing(from_rows, from_cols)]
        return values

    def _chunk_or_none(self, key: tuple[int, int]) -> Matrix | None:
        data = self._get(*key)
        return None if data is None else self._decoded(*key, data)


def stored_sizes(output: Output) -> dict[str, int]:
    """List the chunks that are there, by key, with their sizes in bytes."""
    return output.sizes(MATRIX)


def compact(index: npt.NDArray[np.int64]) -> Index:
    """Return a slice where indices are consecutive: entries are copied without an index array."""
    if len(index) and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _by_chunk(index: npt.NDArray[np.int64], side: int) -> dict[int, tuple[Index, Index]]:
    """Return, for each chunk that indices meet, where in them they do, and where in the chunk that is."""
    chunks = index // side
    places = ((int(k), np.flatnonzero(chunks == k)) for k in np.unique(chunks))
    return {k: (compact(here), compact(index[here] - k * side)) for k, here in places}


def _crossing(rows: Index, cols: Index) -> Any:
    """Index rows and columns orthogonally; slices are the fastest."""
    if isinstance(rows, slice) or isinstance(cols, slice):
        return rows, cols
    return np.ix_(rows, cols)
