"""The chunked matrix: a Zarr v3 array, one object per chunk, each written whole by one writer."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.errors import ZarrUserWarning

from pipeline.errors import IncompleteError, OutputError, in_words
from pipeline.planning.manifest import Manifest
from pipeline.planning.tiling import Tile
from pipeline.storage.chunk_codec import ChunkCodec, Matrix, ending_checksum, zarr_codecs
from pipeline.storage.output import GRADIENT, MATRIX, Output
from pipeline.storage.read_ahead import ahead
from pipeline.storage.retries import patient


@dataclass(frozen=True)
class StoredObject:
    """An object that was put: its key in its folder, its size, and its checksum, which ends a Zarr chunk."""

    key: str
    bytes: int
    crc32c: int

    def to_json(self) -> dict[str, Any]:
        """Give a plain mapping."""
        return asdict(self)

    def differs_from(self, expected: "StoredObject") -> str:
        """Say in which way this object is not the one that a receipt lists."""
        if self.bytes != expected.bytes:
            return f"has {self.bytes:,} bytes, its receipt says {expected.bytes:,}"
        return "does not match the checksum in its receipt"


def chunk_key(i: int, j: int) -> str:
    """Give the key of a chunk below the array."""
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
        self._array = _open(output.zarr_store(MATRIX), output, MATRIX)

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
    def gradient(output: Output) -> npt.NDArray[np.float64]:
        """Read the gradient.

        Returns:
            dL / dtheta.  # shape: (P,)

        Raises:
            OutputError: it is missing or damaged.
        """
        array = _open(output.zarr_store(GRADIENT), output, GRADIENT)
        try:
            values = np.asarray(array[:])
        except (ValueError, RuntimeError) as error:
            raise OutputError(f"output {output.url}: {GRADIENT} cannot be decoded ({in_words(error)})") from None
        if np.isnan(values).any():
            raise OutputError(f"output {output.url}: the chunk of {GRADIENT} is missing")
        return values

    def write_chunk(self, i: int, j: int, values: Matrix, mirror: Matrix | None = None) -> list[StoredObject]:
        """Put a chunk, and its mirror image where the matrix is stored whole.

        Args:
            i: chunk row.
            j: chunk column, not below the diagonal.
            values: entries; a diagonal chunk must be symmetric.  # shape: (B, B), less at the ragged end
            mirror: their transpose, where the caller has it.

        Returns:
            What was put.
        """
        puts = [self._put(i, j, values)]
        if self.manifest.symmetry == "mirrored" and i != j:
            puts.append(self._put(j, i, np.ascontiguousarray(values.T) if mirror is None else mirror))
        return puts

    def read_chunk(self, i: int, j: int, expected: StoredObject | None = None) -> Matrix:
        """Read and check one stored chunk as it lies.

        Args:
            i: chunk row.
            j: chunk column.
            expected: what its receipt says of it.

        Returns:
            Its entries, without padding.  # shape: (B, B), less at the ragged end

        Raises:
            IncompleteError: it is missing, is not what was expected, does not match its checksum, or cannot be decoded.
        """
        key = chunk_key(i, j)
        data = self._output.get(f"{MATRIX}/{key}")
        if data is None:
            raise IncompleteError(f"chunk {key} is missing")
        if expected is not None and (found := StoredObject(key, len(data), ending_checksum(data))) != expected:
            raise IncompleteError(f"chunk {key} {found.differs_from(expected)}")
        try:
            values = self._codec.decode(data)
        except ValueError as error:
            raise IncompleteError(f"chunk {key} cannot be decoded: {error}") from None
        rows, cols = (len(self.manifest.plan.span(range(k, k + 1))) for k in (i, j))
        values = values[:rows, :cols]
        if np.isnan(values).any():
            raise IncompleteError(f"chunk {key} holds entries that are not numbers")
        return values

    def read_chunks(self, keys: Iterable[tuple[int, int]]) -> Iterator[Matrix | IncompleteError]:
        """Read and check chunks, several at a time and a few ahead of their use.

        Args:
            keys: chunk rows and columns.

        Returns:
            The entries of each, in the order asked for, or what is wrong with it.
        """
        return ahead(self._chunk_or_fault, keys)

    def _chunk_or_fault(self, key: tuple[int, int]) -> Matrix | IncompleteError:
        try:
            return self.read_chunk(*key)
        except IncompleteError as fault:
            return fault

    def read(self, rows: Any, cols: Any) -> Matrix:
        """Read entries as they lie in the store, mirrored or not; those not computed are NaN.

        Args:
            rows: slice or integer array.
            cols: slice or integer array.

        Returns:
            The entries.  # shape: (rows, cols)
        """
        if isinstance(rows, slice) and isinstance(cols, slice):
            return np.asarray(self._array[rows, cols])  # the same as below, with less to compute
        return np.asarray(self._array.oindex[rows, cols])

    def _put(self, i: int, j: int, values: Matrix) -> StoredObject:
        """Encode and put one object."""
        key, (body, checksum) = chunk_key(i, j), self._codec.encode(values)
        self._output.put(f"{MATRIX}/{key}", body, checksum)
        return StoredObject(key, len(body) + len(checksum), ending_checksum(checksum))


def stored_sizes(output: Output) -> dict[str, int]:
    """List the chunks that are there, by key, with their sizes in bytes."""
    return output.sizes(MATRIX)


def tile_keys(manifest: Manifest, tile: Tile, key: Callable[[int, int], str] = chunk_key) -> set[str]:
    """Give the keys of all objects of one format that a finished tile leaves, mirrors included."""
    chunks = manifest.plan.chunks(tile)
    keys = {key(i, j) for i, j in chunks}
    return keys | {key(j, i) for i, j in chunks} if manifest.symmetry == "mirrored" else keys


def _open(store: Store, output: Output, name: str) -> "zarr.Array[Any]":
    """Open an array that is there."""
    try:
        return zarr.open_array(store, mode="r")
    except FileNotFoundError:
        raise OutputError(f"output {output.url}: has no {name}") from None
    except ValueError as error:
        raise OutputError(f"output {output.url}: the metadata of {name} are damaged ({in_words(error)})") from None
