"""The sections on the run: where its time and its memory went."""

from collections import defaultdict

from pipeline.analysis.pictures.canvas import new_figure, take
from pipeline.analysis.pictures.runs import Span, draw_memory, draw_timeline
from pipeline.analysis.report.parts import Part, Table
from pipeline.analysis.report.subject import Subject
from pipeline.errors import counted, human_bytes, human_seconds, printable
from pipeline.storage.receipts import Receipt

GONE = "No receipt of a tile can be read."


def time_part(subject: Subject) -> Part:
    """Draw the tiles by worker over time."""
    workers = _by_worker(subject.receipts)
    if not workers:
        return Part("time", "Time", (GONE,))
    begins = {r.tile: r.finished - r.write_seconds - r.compute_seconds for r in subject.receipts}
    start, end = min(begins.values()), max(r.finished for r in subject.receipts)
    spans = [
        Span(k, begins[r.tile] - start, r.compute_seconds, r.write_seconds, r.attempt > 1)
        for k, receipts in enumerate(workers.values())
        for r in receipts
    ]
    with new_figure(9, min(1.6 + 0.3 * len(workers), 12)) as figure:
        draw_timeline(figure.add_subplot(), spans, list(workers))
        picture = take(
            figure,
            "timeline",
            f"Timeline of {counted(len(spans), 'tile')} on {counted(len(workers), 'worker')} over "
            f"{human_seconds(end - start)}.",
        )
    rows = (
        (name, len(found), human_seconds(sum(r.compute_seconds for r in found)),
         human_seconds(sum(r.write_seconds for r in found)), sum(r.attempt > 1 for r in found),
         found[-1].device, max(r.halvings for r in found))
        for name, found in workers.items()
    )  # fmt: skip
    columns = ("worker", "tiles", "computing", "writing", "repeated", "device", "sizes halved")
    return Part("time", "Time", _said(subject, end - start), (picture,), Table.of(columns, rows))


def _said(subject: Subject, span: float) -> list[str]:
    """Say where time went, and what was lost."""
    tiles, seconds = subject.receipts, subject.seconds
    work = sum(r.compute_seconds + r.write_seconds for r in tiles)
    text = [f"{counted(len(tiles), 'tile')} took {human_seconds(work)} of workers' time, over {human_seconds(span)}."]
    if subject.forecast:
        text[0] += f" {human_seconds(subject.forecast.tile_seconds)} were predicted for the tiles."
    if seconds:
        told = ", ".join(f"{human_seconds(value)} {name}" for name, value in seconds.items())
        text.append(f"The call that finished the run took {told}; tiles include the start of workers.")
    repeated = [r for r in tiles if r.attempt > 1]
    lost = ", ".join(f"{count} ({loss})" for loss, count in subject.lost.items())
    if repeated or lost:
        tries = sum(r.attempt - 1 for r in repeated)
        text.append(
            f"Lost and computed again: {counted(len(repeated), 'tile')}, {tries} tries in all"
            + (f"; what became of the workers that had them: {lost}." if lost else ".")
        )
    else:
        text.append("Nothing was lost: each tile was computed once.")
    return text


def memory_part(subject: Subject) -> Part:
    """Draw the most that each worker held, beside what was planned."""
    workers = _by_worker(subject.receipts)
    if not workers:
        return Part("memory", "Memory", (GONE,))
    peaks = {name: max(r.peak_memory_bytes for r in found) for name, found in workers.items()}
    most, planned = max(peaks.values()), subject.forecast
    text = f"No worker held more than {human_bytes(most)}"
    text += (
        f"; {human_bytes(planned.memory_bytes)} were planned and {human_bytes(planned.allowed_bytes)} allowed."
        if planned
        else "."
    )
    with new_figure(9, min(1.6 + 0.3 * len(workers), 12)) as figure:
        limit = planned.memory_bytes / 1e6 if planned else None
        draw_memory(figure.add_subplot(), [peak / 1e6 for peak in peaks.values()], list(peaks), limit)
        picture = take(figure, "memory", f"Most resident memory of each worker. {text}")
    note = "Memory is the worker's process, resident; in a run in one process, all of that process."
    rows = ((name, human_bytes(peak)) for name, peak in peaks.items())
    return Part("memory", "Memory", (text, note), (picture,), Table.of(("worker", "held at most"), rows))


def _by_worker(receipts: list[Receipt]) -> dict[str, list[Receipt]]:
    """Sort receipts by the process that wrote them, in order of time."""
    found: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in sorted(receipts, key=lambda r: r.finished):
        found[f"{printable(receipt.host)[:20]} {receipt.pid}"].append(receipt)
    return dict(sorted(found.items()))
