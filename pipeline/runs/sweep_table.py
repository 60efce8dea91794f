"""The table of a sweep: a row for each checkpoint whose Hessian was computed, in Parquet, written whole each time."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import MemoryRefusedError, OutputError, SpecError, human_bytes, in_words
from pipeline.planning.memory import available_bytes
from pipeline.spec import one_fault
from pipeline.storage.output import Output
from pipeline.storage.records import parsed
from pipeline.urls import redacted_values

TABLE = "sweep.parquet"
MOST_BYTES = 2**29  # of it: 10,000 checkpoints of a network of 100 parameters
_NOTES = b"hessian"  # in the file's metadata: the job, and what was seen of checkpoints
_VALUE_BYTES = 200  # of a value at most, as an object and in the file's pages
_SCHEMA = pa.schema(
    [
        ("checkpoint", pa.string()),
        ("sha256", pa.string()),
        ("output", pa.string()),
        ("parameters", pa.int64()),
        ("samples", pa.int64()),
        ("loss", pa.float64()),
        ("gradient_norm", pa.float64()),
        ("trace", pa.float64()),
        ("norm", pa.float64()),
        ("blocks", pa.list_(pa.struct([("row", pa.string()), ("col", pa.string()), ("norm", pa.float64())]))),
        ("finished", pa.timestamp("ms", tz="UTC")),
        ("worker_seconds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Row:
    """A checkpoint whose Hessian was computed.

    Attributes:
        checkpoint: its URL.
        sha256: of its content.
        output: of its Hessian; None once that was removed.
        parameters: P.
        samples: N.
        loss: L.
        gradient_norm: |dL / dtheta|.
        trace: of H; None where not all of the diagonal was computed.
        norm: Frobenius norm of H; None where not all of H was computed.
        blocks: Frobenius norms of blocks: row and column parameter, and `norm`.
        finished: when.
        worker_seconds: of computing and writing all tiles, over all workers.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    checkpoint: str
    sha256: str
    output: str | None
    parameters: int
    samples: int
    loss: float
    gradient_norm: float
    trace: float | None
    norm: float | None
    blocks: list[dict[str, Any]]
    finished: datetime
    worker_seconds: float


class _Notes(BaseModel):
    """What the file says beside its rows."""

    model_config = ConfigDict(strict=True)

    job: dict[str, Any]
    seen: dict[str, tuple[str, str]]


_ROWS, _NOTES_KIND = TypeAdapter(list[Row]), TypeAdapter(_Notes)


@dataclass
class Sweep:
    """The table in memory.

    Attributes:
        job: what the Hessians are of, apart from the checkpoint.
        rows: by the checkpoint's SHA-256.
        seen: SHA-256 of each checkpoint by URL, with what its store said of the file when that was computed.
    """

    job: Mapping[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    seen: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, output: Output, job: Mapping[str, Any]) -> "Sweep":
        """Take the table from a folder.

        Args:
            output: the folder.
            job: what the Hessians are to be of.

        Returns:
            The table; an empty one where there is none.

        Raises:
            OutputError: it is damaged.
            SpecError: it is of another job.
        """
        data = output.get(TABLE, MOST_BYTES)
        if data is None:
            return cls(job)
        try:
            rows, notes = _read(data)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise OutputError(
                f"output {output.url}: {TABLE} cannot be read ({in_words(error)}); without it, it is made anew from "
                "the outputs that are kept"
            ) from None
        before = redacted_values(notes.job)  # tables from before secrets were hidden
        others = [key for key in {**before, **job} if before.get(key) != job.get(key)]
        if others:
            key = others[0]
            raise SpecError(
                f"output {output.url}: its {TABLE} is of another job: `{key}` was {before.get(key)!r}, got "
                f"{job.get(key)!r}; take another output"
            )
        return cls(job, {row.sha256: row for row in rows}, dict(notes.seen))

    def write(self, output: Output) -> None:
        """Put the table into a folder."""
        rows = [asdict(row) for row in self.in_order()]
        notes = json.dumps({"job": self.job, "seen": self.seen}).encode()
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA.with_metadata({_NOTES: notes})), buffer)
        output.put(TABLE, buffer.getvalue())

    def in_order(self) -> list[Row]:
        """Return the rows in the order of their checkpoints' names."""
        return sorted(self.rows.values(), key=lambda row: natural(row.checkpoint))


def _read(data: bytes) -> tuple[list[Row], _Notes]:
    """Read the file, whose sizes are not believed."""
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    if not file.schema_arrow.equals(_SCHEMA):
        raise ValueError("has other columns")
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    values = sum(group.column(k).num_values for group in groups for k in range(group.num_columns))
    needed, free = _VALUE_BYTES * max(values, file.metadata.num_rows), available_bytes()
    if needed > free:
        raise MemoryRefusedError(f"{TABLE}: reading it needs {human_bytes(needed)}, {human_bytes(free)} are free")
    notes = parsed(_NOTES_KIND, (file.schema_arrow.metadata or {}).get(_NOTES, b""))
    try:
        return _ROWS.validate_python(file.read(use_threads=False).to_pylist()), notes
    except ValidationError as error:
        raise ValueError(one_fault(error)) from None


def natural(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Return what names are sorted by, so that epoch2 comes before epoch10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts], name


def moment(seconds: float) -> datetime:
    """Return a time since the epoch, to the millisecond that the table keeps."""
    return datetime.fromtimestamp(round(seconds, 3), UTC)
