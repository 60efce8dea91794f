"""Pages on what runs left: on a Hessian, on a sweep of them, on several held against each other."""

from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from pipeline.analysis.comparison import Comparison, Vector, compare
from pipeline.analysis.hessian import Hessian, open_hessian
from pipeline.analysis.report.comparison_page import comparison_page
from pipeline.analysis.report.page import chosen_parts, drawn, put_page, require_drawing
from pipeline.analysis.report.subject import may_be_whole
from pipeline.analysis.report.sweep_page import PARTS, Step, sweep_page
from pipeline.analysis.report.write import write_report
from pipeline.errors import HessianError
from pipeline.progress import Reporter
from pipeline.runs.lease import read_lease
from pipeline.runs.sweep_table import Row, Sweep
from pipeline.storage.output import REPORT, Output, open_readable
from pipeline.storage.run_files import read_manifest

COMPARISON = "compare.html"


def report_on(
    url: str, endpoint_url: str | None = None, *, without: Collection[str] = (), report: Reporter | None = None
) -> str:
    """Make the page on what lies at a URL: a Hessian, or the sweep that `hessian run-due` keeps there.

    Args:
        url: of the output, or of the sweep.
        endpoint_url: of its server, where it is not the cloud's own.
        without: parts to leave out.
        report: told about progress.

    Returns:
        The page's URL.

    Raises:
        SpecError: there is no such part, or matplotlib or jinja2 is not installed.
        IncompleteError: the Hessian is not finished, or damaged.
        OutputError: there is neither, or it cannot be read or written.
    """
    output, report = open_readable(url, url, endpoint_url), report or Reporter()
    if read_manifest(output) is None and (sweep := Sweep.stored(output)) is not None and sweep.rows:
        return _report_on_sweep(output, sweep, endpoint_url, without, report)
    hessian = open_hessian(url, endpoint_url, unproven=True)
    lease = read_lease(output)
    return write_report(hessian, without=without, report=report, lost=lease.holder.state.lost if lease else {})


def compared(
    urls: Sequence[str],
    endpoint_url: str | None = None,
    *,
    page: str | None = None,
    report: Reporter | None = None,
) -> tuple[Comparison, str | None]:
    """Hold finished Hessians against the first.

    Args:
        urls: of their outputs.
        endpoint_url: of their server, where it is not the cloud's own.
        page: a folder, or its URL, into which a page goes; None for no page.
        report: told about progress.

    Returns:
        What was found, and the page's URL.

    Raises:
        SpecError: parameters differ, or matplotlib or jinja2 is not installed.
        HessianError: an output cannot be read.
    """
    if page is not None:
        require_drawing()
    hessians = [open_hessian(url, endpoint_url) for url in urls]
    for hessian in hessians:
        hessian.report = report or Reporter()
    found = compare(hessians)
    if page is None:
        return found, None
    labels = short_names([hessian.url for hessian in hessians])
    pairs = zip(hessians, found.differences, strict=True)
    spectra = {labels[hessian.url]: _spectrum(hessian, difference.eigenvalues) for hessian, difference in pairs}
    made = comparison_page(found, labels, spectra)
    return found, put_page(Output(page, endpoint_url), made, "compare", COMPARISON)


def short_names(urls: Sequence[str]) -> dict[str, str]:
    """Name outputs by the ends of their URLs, as much of each as tells them apart."""
    parts = {url: PurePosixPath(url).parts for url in urls}
    length = 1
    while length < max(map(len, parts.values())) and len({p[-length:] for p in parts.values()}) < len(parts):
        length += 1
    return {url: "/".join(p[-length:]).replace("//", "/") for url, p in parts.items()}


def _spectrum(hessian: Hessian, outermost: Vector) -> Vector:
    return hessian.eigvalsh() if may_be_whole(hessian.shape[0]) else outermost


def _report_on_sweep(
    output: Output, sweep: Sweep, endpoint_url: str | None, without: Collection[str], report: Reporter
) -> str:
    """Make the page on a sweep."""
    wanted, rows = chosen_parts(PARTS, without), sweep.in_order()
    steps = [_step(row, endpoint_url) for row in rows]
    parts = drawn(wanted, steps, report)
    page = sweep_page(steps, str(sweep.job.get("problem") or "A sweep"), rows[-1].parameters, parts)
    return put_page(output, page, REPORT)


def _step(row: Row, endpoint_url: str | None) -> Step:
    """Take a row of the table; its Hessian where that is kept."""
    nan = float("nan")
    return Step(
        PurePosixPath(row.checkpoint).stem,
        row.loss,
        row.gradient_norm,
        nan if row.trace is None else row.trace,
        nan if row.norm is None else row.norm,
        {(block["row"], block["col"]): block["norm"] for block in row.blocks},
        _kept(row.output, endpoint_url),
        row.worker_seconds,
    )


def _kept(url: str | None, endpoint_url: str | None) -> Hessian | None:
    """Open what is kept of a checkpoint; None where somebody took it away."""
    if url is None:
        return None
    try:
        return open_hessian(url, endpoint_url)
    except HessianError:
        return None
