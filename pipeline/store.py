"""The chunked matrix: a Zarr v3 array, one object per chunk, each written whole by one writer."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.errors import ZarrUserWarning
from zarr.storage import WrapperStore

from pipeline.ahead import ahead
from pipeline.errors import IncompleteError, OutputError, in_words
from pipeline.manifest import Manifest
from pipeline.output import GRADIENT, MATRIX, Output
from pipeline.patience import patient
from pipeline.remote import explained
from pipeline.tiling import Tile

Matrix = npt.NDArray[Any]


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


class _RecordingStore(WrapperStore[Store]):
    """Notes what was put under each key, and holds what is read against what is expected there."""

    def __init__(self, store: Store, url: str) -> None:
        super().__init__(store)
        self._url = url
        self.puts: dict[str, StoredObject] = {}
        self.expected: dict[str, StoredObject] = {}

    def _with_store(self, store: Store) -> "_RecordingStore":
        other = type(self)(store, self._url)
        other.puts, other.expected = self.puts, self.expected
        return other

    async def set(self, key: str, value: Buffer) -> None:
        with explained(self._url, f"cannot write {key}"):
            await super().set(key, value)
        self.puts[key] = _described(key, value)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        expected = self.expected.pop(key, None)
        if value is not None and expected is not None and _described(key, value) != expected:
            raise IncompleteError(f"chunk {key} {_described(key, value).differs_from(expected)}")
        return value


def _described(key: str, value: Buffer) -> StoredObject:
    tail = value[max(len(value) - 4, 0) :].to_bytes()
    return StoredObject(key, len(value), int.from_bytes(tail, "little"))


def chunk_key(i: int, j: int) -> str:
    """Give the key of a chunk below the array."""
    return f"c/{i}/{j}"


class MatrixStore:
    """The array of an output.

    Args:
        output: where.
        manifest: chunk grid, types and symmetry.
        write: whether chunks are going to be written.
    """

    def __init__(self, output: Output, manifest: Manifest, *, write: bool = False) -> None:
        self.manifest, self.chunk = manifest, manifest.chunk
        self._output, self._write = output, write
        self._store = _RecordingStore(output.zarr_store(MATRIX), output.url)
        self._array = _open(self._store, output, MATRIX, write=write)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel by name, as the output does: what is open belongs to the process that opened it."""
        return partial(type(self), write=self._write), (self._output, self.manifest)

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
            compressors=_codecs(manifest.codec),
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
            compressors=_codecs("none"),
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

    def write_chunk(self, i: int, j: int, values: Matrix) -> list[StoredObject]:
        """Put a chunk, and its mirror image where the matrix is stored whole.

        Args:
            i: chunk row.
            j: chunk column, not below the diagonal.
            values: entries; a diagonal chunk must be symmetric.  # shape: (B, B), less at the ragged end

        Returns:
            What was put.
        """
        puts = [self._put(i, j, values)]
        if self.manifest.symmetry == "mirrored" and i != j:
            puts.append(self._put(j, i, np.ascontiguousarray(values.T)))
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
        if expected is not None:
            self._store.expected[chunk_key(i, j)] = expected
        rows, cols = (slice(k * self.chunk, (k + 1) * self.chunk) for k in (i, j))
        try:
            values = self._read(rows, cols)
        except OutputError:
            raise  # the store does not answer: no fault of the chunk
        except (ValueError, RuntimeError, OSError) as error:
            raise IncompleteError(f"chunk {chunk_key(i, j)} cannot be decoded: {error}") from None
        if np.isnan(values).any():
            raise IncompleteError(f"chunk {chunk_key(i, j)} is missing")
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
        return self._read(rows, cols)

    def _read(self, rows: Any, cols: Any) -> Matrix:
        if isinstance(rows, slice) and isinstance(cols, slice):
            return np.asarray(self._array[rows, cols])  # the same as below, with less to compute
        return np.asarray(self._array.oindex[rows, cols])

    def _put(self, i: int, j: int, values: Matrix) -> StoredObject:
        """Encode and put one object."""
        rows, cols = (slice(k * self.chunk, k * self.chunk + n) for k, n in zip((i, j), values.shape, strict=True))
        self._array[rows, cols] = values
        return self._store.puts.pop(chunk_key(i, j))


def stored_sizes(output: Output) -> dict[str, int]:
    """List the chunks that are there, by key, with their sizes in bytes."""
    return output.sizes(MATRIX)


def tile_keys(manifest: Manifest, tile: Tile, key: Callable[[int, int], str] = chunk_key) -> set[str]:
    """Give the keys of all objects of one format that a finished tile leaves, mirrors included."""
    chunks = manifest.plan.chunks(tile)
    keys = {key(i, j) for i, j in chunks}
    return keys | {key(j, i) for i, j in chunks} if manifest.symmetry == "mirrored" else keys


def _codecs(name: Literal["none", "lz4", "zstd"]) -> list[BytesBytesCodec]:
    """Give the codecs of a chunk; the checksum comes last, so that it covers what lies in the store."""
    if name == "none":
        return [Crc32cCodec()]
    return [BloscCodec(cname=name, clevel=5 if name == "lz4" else 3, shuffle="shuffle"), Crc32cCodec()]


def _open(store: Store, output: Output, name: str, *, write: bool = False) -> "zarr.Array[Any]":
    """Open an array that is there; empty chunks are written, so that a missing object is always a fault."""
    try:
        return zarr.open_array(store, mode="r+" if write else "r", config={"write_empty_chunks": True})
    except FileNotFoundError:
        raise OutputError(f"output {output.url}: has no {name}") from None
    except ValueError as error:
        raise OutputError(f"output {output.url}: the metadata of {name} are damaged ({in_words(error)})") from None
