"""What a proof found, in full and in one line."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import counted

Entry = tuple[int, int, float, str, str]  # row, column, error, names of its block


@dataclass(frozen=True)
class Verification:
    """What was checked, and what was found.

    Attributes:
        ok: nothing is wrong.
        chunks: stored chunks read back against their checksums.
        faults: chunks that are missing, damaged, or not the mirror image of their partner; tiles that are not what was
            computed; Parquet files that are missing, damaged, of something else, or not what the chunk is; a manifest
            that is not of the problem.
        method: of the reference: "double backward", "differences", or None when there was no problem at hand.
        blocks: pairs of parameters compared.
        worst_block: the pair with the largest error; None where nothing failed and columns were compared together.
        block_error: that error, in units of the scales of its rows and columns.
        sampled_rows: rows compared entry by entry.
        worst_entry: row, column and error of the worst entry of these, and the names of its block.
        tolerance: that errors are held against.
        inconclusive: parameters at which differences of the gradient do not confirm double backward, where that
            computed H and is its own reference: nothing but that is open.
        files: Parquet files read back against their checksums and the chunks.
        seed: of the directions.
        unsteady: by how much the reference itself changes in the worst block as the weights move by their last bit, in
            the same units.
    """

    ok: bool
    chunks: int
    faults: list[str]
    method: str | None = None
    blocks: int = 0
    worst_block: tuple[str, str] | None = None
    block_error: float = 0.0
    sampled_rows: int = 0
    worst_entry: Entry | None = None
    tolerance: float | None = None
    inconclusive: list[str] = field(default_factory=list)
    files: int = 0
    seed: int = 0
    unsteady: float = 0.0

    @property
    def remedy(self) -> str:
        """What to do about numbers that are not those of the reference."""
        if self._is_unsteady:
            return "scale the data or the weights before these parameters, or leave them out with params"
        return "compute it again with engine=rows or dtype=float64, in another output"

    @property
    def _is_unsteady(self) -> bool:
        return self.tolerance is not None and self.unsteady > self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Return a plain mapping."""
        return asdict(self)

    def summary(self) -> str:
        """Return it in one line."""
        stored = counted(self.chunks, "chunk") + (f" and {counted(self.files, 'Parquet file')}" if self.files else "")
        if self.faults:
            return f"{len(self.faults)} of {stored} are at fault, the first: {self.faults[0]}"
        if self.method is None:
            return f"{stored} present, checksums right; numbers not checked (no problem given)"
        blocks, rows = counted(self.blocks, "block"), counted(self.sampled_rows, "row")
        found = (
            f"{stored}, {blocks} against {self.method}, {rows} entry "
            f"by entry: error {self.block_error:.1e} of the rows' and columns' scales, tolerance {self.tolerance:.0e}"
        )
        if self.inconclusive:
            found += f"; differences of the gradient say nothing (kinks?) at {', '.join(self.inconclusive[:3])}"
        if self.ok:
            return found
        why = f", where {self.method} changes by {self.unsteady:.0e} as the weights move by their last bit"
        return f"{found}; worst is {self._worst()}{why if self._is_unsteady else ''}"

    def _worst(self) -> str:
        entry = self.worst_entry
        if entry is not None and entry[2] >= self.block_error:
            return f"entry ({entry[0]}, {entry[1]}) of block H[{entry[3]}, {entry[4]}], off by {entry[2]:.1e}"
        a, b = self.worst_block or ("?", "?")
        return f"block H[{a}, {b}]"
