"""The section on how right a Hessian is, in words that one who doubts can check."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from pipeline.analysis.report.parts import Part, Table
from pipeline.analysis.report.subject import Subject
from pipeline.errors import counted
from pipeline.planning.manifest import Manifest
from pipeline.storage.output import MOST_BYTES, VERIFY, Output
from pipeline.storage.records import read_or_none

_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Proof:
    """What is said of a proof; see `results.verify.Verification`, which wrote it."""

    __pydantic_config__ = ConfigDict(strict=True)

    ok: bool
    chunks: _Count
    faults: tuple[str, ...] = ()
    method: str | None = None
    blocks: _Count = 0
    block_error: float = 0.0
    sampled_rows: _Count = 0
    worst_entry: tuple[int, int, float, str, str] | None = None
    tolerance: float | None = None
    inconclusive: tuple[str, ...] = ()
    files: _Count = 0


_PROOF = TypeAdapter(Proof)
UNPROVEN = "No proof lies beside this matrix, or none that can be read: `verify` was off, as it seems."


def read_whole_proof(output: Output) -> Proof | None:
    """Read a proof; None where there is none, or none that can be understood."""
    return read_or_none(output, VERIFY, _PROOF, MOST_BYTES)


def verdict(proof: Proof | None) -> tuple[str, bool]:
    """Say in a few words whether a Hessian is proven."""
    if proof is None:
        return "not verified: there is no proof", False
    if not proof.ok:
        return "the proof FAILED: do not use this matrix", False
    return f"verified against {proof.method or 'its checksums'}", True


def proof_part(subject: Subject) -> Part:
    """Say how right it is."""
    proof, manifest = read_whole_proof(subject.hessian.output), subject.hessian.manifest
    text = list(_of_proof(proof, manifest)) if proof else [UNPROVEN]
    again = f"To doubt it again: hessian verify {subject.hessian.url} --job JOB.yaml draws other directions each time."
    parameters = manifest.preflight.parameters.items()
    rows = (
        (name, found.engine, f"{found.gradient:.0e}", f"{found.differences:.0e}")
        for name, found in parameters
    )  # fmt: skip
    columns = ("parameter", "engine", "gradient against differences of the loss", "double backward against those of it")
    return Part("proof", "How right", [*text, _of_preflight(manifest), again], (), Table.of(columns, rows))


def _of_proof(proof: Proof, manifest: Manifest) -> Iterator[str]:
    """Say what was compared after the run."""
    mirrored = ", and is the exact mirror image of its partner" if manifest.symmetry == "mirrored" else ""
    files = f" So are {counted(proof.files, 'Parquet file')}, entry for entry." if proof.files else ""
    if proof.faults:
        yield f"{counted(len(proof.faults), 'fault')} in what is stored, the first: {proof.faults[0]}."
    else:
        yield (
            f"Stored as computed. Each of the {counted(proof.chunks, 'chunk')} was read back after the run: it has the "
            f"checksum that was taken before it was sent{mirrored}, and the products with two vectors that were taken "
            f"of its tile where that was computed.{files}"
        )
    if proof.method is None:
        yield "The numbers themselves were not compared: there was no problem at hand."
        return
    shares = "which shares no code with the engines that computed it"
    how = {"double backward": "plain double backward in float64 on the driver's CPU"}.get(
        proof.method, "central differences of the gradient in float64 on the driver's CPU"
    )
    end = "" if proof.ok else ", and that is TOO MUCH"
    yield (
        f"Right as stored. H was multiplied with random directions that nobody knew while it was computed, and the "
        f"products were compared, row by row, with {how}, {shares}. Over {counted(proof.blocks, 'block')} the largest "
        f"error is {proof.block_error:.1e} of the size of its row and column; up to {proof.tolerance or 0:.0e} is "
        f"let pass{end}."
    )
    if proof.worst_entry is not None:
        row, column, error, a, b = proof.worst_entry
        yield (
            f"{counted(proof.sampled_rows, 'row')} drawn at random were compared entry by entry: the worst entry, "
            f"({row:,}, {column:,}) in H[{a}, {b}], is off by {error:.1e} of the size of its row and column."
        )
    if proof.inconclusive:
        names = ", ".join(proof.inconclusive[:5])
        yield f"Differences of the gradient neither confirm nor contradict double backward at {names}: kinks, it seems."


def _of_preflight(manifest: Manifest) -> str:
    """Say what was compared before the run."""
    found = manifest.preflight.parameters.values()
    gradient, double = (max((getattr(f, name) for f in found), default=0.0) for name in ("gradient", "differences"))
    return (
        f"Before any tile, on {counted(manifest.preflight.samples, 'sample')}: the gradient agreed with differences "
        f"of the loss to {gradient:.0e}, and double backward with differences of the gradient to {double:.0e}, for "
        "each parameter. So H is the second derivative of the loss as it is evaluated, not only of what autograd "
        "takes it for. None of this sees an error below what is let pass, or a loss that is not the one you meant."
    )
