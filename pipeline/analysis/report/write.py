"""Make the report of a Hessian, and put it into its output."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from pipeline.analysis.hessian import Hessian
from pipeline.analysis.report.matrix_parts import blocks_part, diagonal_part, entries_part
from pipeline.analysis.report.page import chosen_parts, drawn, put_page
from pipeline.analysis.report.parts import Page, Part, Table
from pipeline.analysis.report.proof_part import proof_part, read_whole_proof, verdict
from pipeline.analysis.report.run_parts import memory_part, time_part
from pipeline.analysis.report.spectrum_parts import ends_part, layers_part, spectrum_part
from pipeline.analysis.report.subject import Subject
from pipeline.errors import counted, human_bytes, human_seconds
from pipeline.progress import Reporter
from pipeline.storage.receipts import object_sizes

PARTS: Mapping[str, Callable[[Subject], Part]] = {
    "proof": proof_part,
    "blocks": blocks_part,
    "entries": entries_part,
    "spectrum": spectrum_part,
    "ends": ends_part,
    "layers": layers_part,
    "diagonal": diagonal_part,
    "time": time_part,
    "memory": memory_part,
}


def write_report(
    hessian: Hessian,
    *,
    without: Collection[str] = (),
    report: Reporter | None = None,
    lost: Mapping[str, int] | None = None,
) -> str:
    """Draw a finished Hessian, and put the page and its pictures into its output.

    Args:
        hessian: all of it, no view.
        without: parts to leave out, of `PARTS`.
        report: told about progress.
        lost: tiles that the last driver told to have lost, by what became of them.

    Returns:
        The URL of the page; `block_norms.png` and the other pictures lie beside it, as PNG and SVG.

    Raises:
        SpecError: there is no such part, or matplotlib or jinja2 is not installed.
        IncompleteError: a chunk is missing or damaged.
        OutputError: it cannot be read or written.
    """
    wanted = chosen_parts(PARTS, without)
    hessian.report = report = report or Reporter()
    report.say("reading the matrix")
    subject = Subject.of(hessian, dict(lost or {}), raster="entries" in wanted)
    return put_page(hessian.output, _page(subject, drawn(wanted, subject, report)))


def _page(subject: Subject, parts: list[Part]) -> Page:
    """Put the top of the page together."""
    H, manifest = subject.hessian, subject.hessian.manifest
    said, proven = verdict(read_whole_proof(H.output))
    facts = [
        ("parameters P", f"{H.shape[0]:,}"),
        ("samples", f"{manifest.fingerprint.samples:,}"),
        ("loss", f"{H.loss:.6g}"),
        ("gradient's norm", f"{np.linalg.norm(H.gradient):.3g}"),
    ]
    if H.has_diagonal:
        facts.append(("trace", f"{H.trace():.4g}"))
    if H.is_complete:
        facts.append(("Frobenius norm", f"{H.norm():.4g}"))
    if subject.seconds:
        facts.append(("time", human_seconds(sum(subject.seconds.values()))))
    facts.append(("stored", human_bytes(sum(object_sizes(H.output).values()))))
    entries = f"{H.shape[0]:,} x {H.shape[0]:,}"
    return Page(
        manifest.problem or "Hessian",
        f"The Hessian of a loss, {entries} entries in {manifest.store_dtype}, with respect to "
        f"{counted(len(H.parameters), 'parameter')} of a model, over {counted(manifest.fingerprint.samples, 'sample')}",
        facts,
        parts,
        said,
        proven,
        _about(subject),
    )


def _about(subject: Subject) -> Table:
    """Say the rest of what was computed, and of what."""
    manifest, of = subject.hessian.manifest, subject.hessian.manifest.fingerprint
    engines = sorted(set(manifest.engines.values()))
    rows = [
        ("at", subject.hessian.url),
        ("run", manifest.digest),
        ("loss is a", f"{of.reduction} over {of.weight:g}"),
        ("L2 term added", f"{of.l2:g}" if of.l2 else ""),
        ("blocks", manifest.blocks if isinstance(manifest.blocks, str) else counted(len(manifest.blocks), "pair")),
        ("computed in", manifest.dtype),
        ("stored", f"{manifest.store_dtype}, {manifest.symmetry}, {manifest.codec}, {' and '.join(manifest.formats)}"),
        ("engines", ", ".join(engines)),
        ("chunks", f"{manifest.plan.side} x {manifest.plan.side} of side {manifest.chunk}"),
        ("SHA-256 of the weights", of.weights),
        ("SHA-256 of the data", of.data),
        ("SHA-256 of the checkpoint", of.checkpoint or ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    return Table.of(("what", "value"), [row for row in rows if row[1]])
